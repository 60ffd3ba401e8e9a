"""Files made to run code, to fill the memory, to read elsewhere or to hang: one table, opened as `vla` opens them.

Each is refused by an error that names it, in seconds, within 500 MB (opener.py), and no canary is ever made. Lies told
in single fields of a store's own metadata are in test_hostile_stores.py, of the h5 form in tests/stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vla.stores.fingerprint import canonical, digest
from vla.stores.formats.registry import format_of
from vla.stores.layout import write_metadata
from vla.stores.manifest import Manifest
from vla.stores.metadata import table_digests

pytestmark = [
    pytest.mark.timeout(300),  # seconds of work, minutes on a machine that does something else
    pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process"),
]

GOLDEN = Path(__file__).parents[1] / "golden/schema-1"
SHARD = "frames/grid/c.1.0.0.0.0"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@dataclass(frozen=True)
class Artefact:
    """`make(folder, canary)` makes it in an empty folder and returns what is opened, `how` see opener.WAYS."""

    how: str
    make: Callable[[Path, Path], Path]
    says: str = ""


# ---- stores ----


def store(change: Callable[[Path, Path], object], form: str = "zarr") -> Artefact:
    def make(folder: Path, canary: Path) -> Path:
        shutil.copytree(GOLDEN / form, folder / "s")
        change(folder / "s", canary)
        return folder / "s"

    return Artefact("store", make, "s")


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def resign(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest and renew its digest, as someone who means harm would."""

    def renew(document: dict[str, Any]) -> None:
        change(document["attributes"]["vla"])
        document["attributes"]["vla_sha256"] = digest(document["attributes"]["vla"])

    edit(root / "zarr.json", renew)


def record(root: Path, file: str) -> None:
    """Renew the record of unit 1 for a file as it is now."""
    commit = root / "commits/unit-000001.json"
    body = json.loads(commit.read_bytes())
    body.pop("sha256")
    data = (root / file).read_bytes()
    body["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit.write_bytes(canonical({**body, "sha256": digest(body)}) + b"\n")


def pickling_codec(root: Path, canary: Path) -> None:
    codec = {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}
    edit(root / "frames/grid/zarr.json", lambda array: array.update(codecs=[codec]))
    (root / SHARD).write_bytes(pickle.dumps(Bomb(canary)))


def pickling_zarr_2(root: Path, canary: Path) -> None:
    """A store of zarr version 2 whose one chunk is a pickle."""
    shutil.rmtree(root)
    (root / "grid").mkdir(parents=True)
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    metadata = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None}
    (root / "grid/.zarray").write_text(json.dumps({**metadata, "compressor": None, "filters": [{"id": "pickle"}]}))
    (root / "grid/0").write_bytes(pickle.dumps(Bomb(canary)))


def million_arrays(root: Path, canary: Path) -> None:
    feature = b'"f%d":{"shape":[1,1],"dims":["view","c"],"dtype":"float16"}'
    features = b",".join(feature % number for number in range(1_000_000))
    whole = (root / "zarr.json").read_text().replace('"features": {', '"features": {MANY,', 1)
    assert "MANY" in whole
    (root / "zarr.json").write_bytes(whole.encode().replace(b"MANY", features))


def fifty_thousand_arrays(root: Path, canary: Path) -> None:
    """Few enough for the manifest to be read."""
    feature = {"shape": [1, 1], "dims": ["view", "c"], "dtype": "float16"}
    resign(root, lambda manifest: manifest.update(features={f"f{n}": feature for n in range(50_000)}))


def hundred_megabytes_of_json(root: Path, canary: Path) -> None:
    (root / "zarr.json").write_bytes(b'{"zarr_format": 3, "x": "' + b"x" * (100 << 20) + b'"}')


def bomb_of_zstd(root: Path, canary: Path) -> None:
    """A row that unpacks to 1 GB, with a valid checksum, index and record."""
    shard = bytearray((root / SHARD).read_bytes())
    slots = 9
    tail = 16 * slots + 4
    index = np.frombuffer(shard[-tail:-4], "<u8").reshape(slots, 2).copy()
    packed = numcodecs.Zstd(level=1).encode(bytes(1 << 22))
    chunk = bytes(packed) + int(google_crc32c.value(bytes(packed))).to_bytes(4, "little")
    assert len(chunk) < 220, "it has to pass for a row of ours"
    index[2] = len(shard) - tail, len(chunk)
    body = index.tobytes()
    crc = int(google_crc32c.value(body)).to_bytes(4, "little")
    (root / SHARD).write_bytes(bytes(shard[:-tail]) + chunk + body + crc)
    record(root, SHARD)


def pipe_at(file: str) -> Callable[[Path, Path], None]:
    """Put a named pipe in a file's place: whoever opens it waits for ever."""

    def change(root: Path, canary: Path) -> None:
        (root / file).unlink()
        os.mkfifo(root / file)

    return change


def device_at(file: str) -> Callable[[Path, Path], None]:
    """Put a file without end in a file's place."""

    def change(root: Path, canary: Path) -> None:
        (root / file).unlink()
        (root / file).symlink_to("/dev/zero")

    return change


def in_h5(change: Callable[[h5py.File, Path], object]) -> Artefact:
    """Edit unit 1 of the h5 form and renew its record."""

    def edit_unit(root: Path, canary: Path) -> None:
        name = "units/unit-000001.h5"
        with h5py.File(root / name, "r+", libver=("v110", "v110")) as file:
            del file["frames/grid"]
            change(file, root.parent / "secret.h5")
        record(root, name)

    def with_secret(root: Path, canary: Path) -> None:
        with h5py.File(root.parent / "secret.h5", "w") as file:
            file.create_dataset("frames/grid", (9, 2, 2, 2, 8), "f2", chunks=(1, 2, 2, 2, 8), fletcher32=True)
        edit_unit(root, canary)

    return store(with_secret, "h5")


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((9, 2, 2, 2, 8), np.float16)
    layout[:] = h5py.VirtualSource(str(secret), "frames/grid", (9, 2, 2, 2, 8), np.float16)
    file.create_virtual_dataset("frames/grid", layout)


def zipped(name: str, data: bytes) -> Artefact:
    def make(folder: Path, canary: Path) -> Path:
        with zipfile.ZipFile(folder / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name.format(canary=canary.name), data)
            archive.writestr("zarr.json", (GOLDEN / "zarr/zarr.json").read_text())
        return folder / "s.zip"

    return Artefact("store", make, "s.zip")


# ---- heads and weights ----


def head(change: Callable[[Path, Path], object], says: str) -> Artefact:
    def make(folder: Path, canary: Path) -> Path:
        shutil.copytree(GOLDEN / "head", folder / "head")
        change(folder / "head", canary)
        complete = json.loads((folder / "head/complete.json").read_text())
        for name in complete["files"]:
            data = b"" if (folder / "head" / name).is_fifo() else (folder / "head" / name).read_bytes()
            complete["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "head/complete.json").write_text(json.dumps(complete))
        return folder / "head"

    return Artefact("head", make, says)


def safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> Callable[[Path, Path], None]:
    """Write the averaged weights by hand."""

    def change(root: Path, canary: Path) -> None:
        size = len(header) if length is None else length
        (root / "ema.safetensors").write_bytes(struct.pack("<Q", size) + header + data)

    return change


def tensors(**entries: tuple[str, list[int], list[int]]) -> bytes:
    listed = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in entries.items()}
    return json.dumps(listed).encode()


def config(**values: Any) -> Callable[[Path, Path], None]:
    """Claim another network: it is built before its weights could fit."""
    return lambda root, canary: edit(root / "artefact.json", lambda artefact: artefact["config"].update(values))


def pickled(folder: Path, canary: Path) -> Path:
    torch.save(Bomb(canary), folder / "weights.pth")
    return folder / "weights.pth"


def pickled_as_safetensors(folder: Path, canary: Path) -> Path:
    torch.save({"weight": Bomb(canary)}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def yaml(folder: Path, canary: Path) -> Path:
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']\n")
    return folder / "config.yaml"


def deep_json(folder: Path, canary: Path) -> Path:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return folder / "config.json"


def pickled_array(folder: Path, canary: Path) -> Path:
    np.save(folder / "episode_000000.npy", np.array([Bomb(canary)], object), allow_pickle=True)
    return folder


def endless_array(folder: Path, canary: Path) -> Path:
    """A header of 10^12 numbers before nine bytes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 111111111111), }\n"
    (folder / "episode_000000.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + b"x" * 9)
    return folder


def source_of(write: Callable[[Path], object]) -> Artefact:
    def make(folder: Path, canary: Path) -> Path:
        shutil.copytree(Path(__file__).parents[2] / "examples/push/meta", folder / "set/meta")
        write(folder / "set")
        return folder / "set"

    return Artefact("source", make, "set")


def millions_of_rows(root: Path) -> None:
    """Hold 25,000,000 rows, all of them empty."""
    file = root / "data/chunk-000/file-000.parquet"
    file.parent.mkdir(parents=True)
    schema = pq.read_schema(Path(__file__).parents[2] / "examples/push/data/chunk-000/file-000.parquet")
    rows = 5_000_000
    table = pa.table([pa.nulls(rows, field.type) for field in schema], schema=schema.remove_metadata())
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(table)


# ---- sizes that no byte accounts for ----


def zarr_2(folder: Path, shape: list[int], chunks: list[int], dtype: str = "<f4", **files: bytes) -> None:
    folder.mkdir(parents=True)
    metadata = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "order": "C", "fill_value": 0}
    compressor = {"id": "zstd", "level": 1} if files else None
    (folder / ".zarray").write_text(json.dumps({**metadata, "compressor": compressor, "filters": None}))
    for name, data in files.items():
        (folder / name.removeprefix("at").replace("_", ".")).write_bytes(data)


def packed(values: np.ndarray[Any, Any]) -> bytes:
    return bytes(numcodecs.Zstd(level=19).encode(np.ascontiguousarray(values)))


def replay_buffer(
    rows: int, picture: tuple[list[int], list[int]], action: tuple[list[int], list[int]], how: str = "replay buffer"
) -> Artefact:
    """One episode of `rows` rows; (shape, chunks) of the pictures and of the actions, one chunk of each is there."""

    def make(folder: Path, canary: Path) -> Path:
        (folder / "s").mkdir()
        (folder / "s/.zgroup").write_text('{"zarr_format": 2}')
        zarr_2(folder / "s/meta/episode_ends", [1], [1], "<i8", at0=packed(np.array([rows])))
        zarr_2(folder / "s/data/img", *picture, "|u1", at0_0_0_0=packed(np.zeros(1, "u1")))
        zarr_2(folder / "s/data/action", *action, at0_0=packed(np.zeros(9 << 20, "<f4")))
        return folder / "s"

    return Artefact(how, make, "s/data")


def endless_ends(folder: Path, canary: Path) -> Path:
    """No chunk at all: every episode ends at the fill value."""
    (folder / "s").mkdir()
    (folder / "s/.zgroup").write_text('{"zarr_format": 2}')
    zarr_2(folder / "s/meta/episode_ends", [10**12], [10**12], "<i8")
    zarr_2(folder / "s/data/img", [9, 8, 8, 3], [9, 8, 8, 3], "|u1")
    zarr_2(folder / "s/data/action", [9, 2], [9, 2])
    return folder / "s"


def robomimic(write: Callable[[h5py.Group], object], how: str = "source", edit: Any = None) -> Artefact:
    """One demonstration whose arrays `write` makes; `edit` changes the bytes of the file."""

    def make(folder: Path, canary: Path) -> Path:
        with h5py.File(folder / "s.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo.create_group("obs")
            file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            write(demo)
        if edit is not None:
            (folder / "s.hdf5").write_bytes(edit((folder / "s.hdf5").read_bytes()))
        assert (folder / "s.hdf5").stat().st_size < 400_000
        return folder / "s.hdf5"

    return Artefact(how, make, "s.hdf5")


def empty_rows(demo: h5py.Group, rows: int = 10**8) -> None:
    """Arrays of which nothing was written: they read as zeros."""
    demo.create_dataset("actions", (rows, 7), "f8", chunks=(1024, 7))
    demo.create_dataset("obs/front_image", (rows, 84, 84, 3), "u1", chunks=(1, 84, 84, 3))
    demo.create_dataset("obs/grid", (rows, 64), "f4", chunks=(1024, 64))


def packed_rows(demo: h5py.Group) -> None:
    """Zeros that gzip packs a thousandfold."""
    data = np.zeros((12 << 20, 2), "f4")
    demo.create_dataset("actions", data=data, chunks=(1 << 20, 2), compression="gzip", compression_opts=9)
    demo.create_dataset("obs/front_image", (len(data), 8, 8, 3), "u1", chunks=(1, 8, 8, 3))


def contiguous(demo: h5py.Group) -> None:
    demo.create_dataset("actions", data=np.ones((317, 7)))
    demo.create_dataset("obs/front_image", (10**8, 8, 8, 3), "u1", chunks=(1, 8, 8, 3))


def longer_than_the_file(data: bytes) -> bytes:
    """Claim 10^8 rows where the file has 317: in the shape and in the layout of the contiguous array."""
    shape, size = struct.pack("<QQ", 317, 7), struct.pack("<Q", 317 * 7 * 8)
    assert data.count(shape) == 2
    assert data.count(size) == 1
    return data.replace(shape, struct.pack("<QQ", 10**8, 7)).replace(size, struct.pack("<Q", 10**8 * 7 * 8))


def one_giant_picture(demo: h5py.Group) -> None:
    demo.create_dataset("actions", data=np.ones((3, 7)))
    demo.create_dataset("obs/front_image", (3, 10**6, 10**6, 3), "u1", chunks=(1, 64, 64, 3))[0, 0, 0] = 1


def a_filter_of_names(demo: h5py.Group) -> None:
    demo.create_dataset("actions", data=np.ones((3, 7)))
    demo.create_dataset("obs/front_image", data=np.ones((3, 8, 8, 3), "u1"))
    demo.file.create_dataset("mask/train", (10**9,), h5py.string_dtype(), chunks=(1024,))


def hollow_store(rows: int, unit_rows: int, **changes: Any) -> Artefact:
    """A store without a commit, one episode of `rows` rows, every digest and every declared shape in agreement."""

    def make(folder: Path, canary: Path) -> Path:
        root = folder / "s"
        shutil.copytree(GOLDEN / "zarr", root)
        for path in (root / "commits").iterdir():
            path.unlink()
        tables: dict[str, np.ndarray[Any, Any]] = {
            "episodes/id": np.frombuffer(b"x", np.uint8)[None],
            "episodes/row_start": np.zeros(1, np.int64),
            "episodes/length": np.array([rows]),
            "episodes/task": np.zeros(1, np.int64),
            "tasks/text": np.frombuffer(b"t", np.uint8)[None],
        }

        def renew(manifest: dict[str, Any]) -> None:
            manifest.update(rows=rows, unit_rows=unit_rows, tables=table_digests(tables), **changes)

        resign(root, renew)
        manifest = Manifest.model_validate(json.loads((root / "zarr.json").read_text())["attributes"]["vla"])
        shutil.rmtree(root)
        write_metadata(root, manifest, tables, format_of(manifest).arrays(manifest), format_of(manifest).folders)
        return root

    return Artefact("empty store", make, "s")


def lost_in_brackets(depth: int) -> str:
    """JSON that parses and is nested `depth` deep."""
    return '{"a":' * depth + "1" + "}" * depth


def deep_in(file: str, key: str) -> Callable[[Path], object]:
    """Nest a value of a JSON file 900 deep: the parser takes it, what walks it afterwards may not."""

    def change(root: Path) -> None:
        document = json.loads((root / file).read_text()) if (root / file).exists() else {}
        (root / file).write_text(json.dumps({**document, key: "DEEP"}).replace('"DEEP"', lost_in_brackets(900)))

    return change


def deep_manifest(root: Path, canary: Path) -> None:
    """A valid digest over a fingerprint that is nested 900 deep."""
    resign(root, lambda manifest: manifest["provenance"].update(deep=json.loads(lost_in_brackets(900))))


def deep_record(root: Path, canary: Path) -> None:
    file = root / "commits/unit-000001.json"
    body = json.loads(file.read_bytes())
    body.pop("sha256")
    body["skipped"] = json.loads(lost_in_brackets(900))
    file.write_bytes(canonical({**body, "sha256": digest(body)}) + b"\n")


def parquet_of_rows(root: Path) -> None:
    """A footer that claims 10^12 rows above three."""
    file = root / "data/chunk-000/file-000.parquet"
    file.parent.mkdir(parents=True)
    table = pq.read_table(Path(__file__).parents[2] / "examples/push/data/chunk-000/file-000.parquet")
    pq.write_table(table.slice(0, 3).replace_schema_metadata(), file)
    data = file.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    footer, claimed = data[-8 - size : -8], 2 * 10**12  # zigzag
    varint = b""
    while claimed:
        varint, claimed = varint + bytes([claimed & 127 | (128 if claimed > 127 else 0)]), claimed >> 7
    assert footer.count(b"\x16\x06\x19\x1c") == 1
    footer = footer.replace(b"\x16\x06\x19\x1c", b"\x16" + varint + b"\x19\x1c")
    file.write_bytes(data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


ARTEFACTS: dict[str, Artefact] = {
    # code
    "store: a codec that unpickles": store(pickling_codec),
    "store: zarr 2 with a filter that unpickles": store(pickling_zarr_2),
    "head: a pickle named safetensors": head(
        lambda root, canary: torch.save(Bomb(canary), root / "ema.safetensors"), "ema.safetensors"
    ),
    "head: a pickle named json": head(
        lambda root, canary: (root / "artefact.json").write_bytes(pickle.dumps(Bomb(canary))), "artefact.json"
    ),
    "weights: a pickle": Artefact("weights", pickled, "weights.pth"),
    "weights: a pickle named safetensors": Artefact("weights", pickled_as_safetensors, "weights.safetensors"),
    "config: YAML tags": Artefact("config", yaml, "config.yaml"),
    "cache: an array of pickled objects": Artefact("arrays", pickled_array, "episode_000000.npy"),
    # memory
    "store: a million million rows": store(lambda root, canary: resign(root, lambda m: m.update(rows=10**12))),
    "store: a billion rows": store(lambda root, canary: resign(root, lambda m: m.update(rows=1 << 30))),
    "store: a row of a terabyte": store(
        lambda root, canary: resign(root, lambda m: m["features"]["grid"].update(shape=[2, 2, 2, 1 << 37]))
    ),
    "store: a manifest of a million arrays": store(million_arrays),
    "store: a manifest of fifty thousand arrays": store(fifty_thousand_arrays),
    "store: a hundred megabytes of JSON": store(hundred_megabytes_of_json),
    "store: JSON without end of depth": store(lambda root, canary: (root / "zarr.json").write_bytes(b"[" * 10**6)),
    "store: a row that unpacks to megabytes": store(bomb_of_zstd, "archive"),
    "store: a zip that unpacks to gigabytes": zipped("frames/grid/c.0", bytes(64 << 20)),
    "store: a device without end as manifest": store(device_at("zarr.json")),
    "store: a device without end as record": store(device_at("commits/unit-000001.json")),
    "head: a header of 2^60 bytes": head(safetensors(b"{}", length=1 << 60), "ema.safetensors"),
    "head: a header of 200 MB": head(safetensors(b'{"x":"' + b" " * (200 << 20) + b'"}'), "ema.safetensors"),
    "head: a tensor of terabytes": head(
        safetensors(tensors(x=("F32", [1 << 40], [0, 1 << 42])), bytes(8)), "ema.safetensors"
    ),
    "head: a net of terabytes": head(config(hidden=1_000_000), "head"),
    "head: a net of a hundred million layers": head(config(layers=100_000_000), "artefact.json"),
    "head: a horizon of terabytes": head(config(horizon=10**12), "head"),
    "head: a horizon beyond 64 bits": head(config(horizon=10**30), "artefact.json"),
    "config: JSON without end of depth": Artefact("config", deep_json, "config.json"),
    "cache: an array of terabytes": Artefact("arrays", endless_array, "episode_000000.npy"),
    "source: millions of rows in few bytes": source_of(millions_of_rows),
    "source: JSON without end of depth": source_of(lambda root: (root / "meta/info.json").write_bytes(b"[" * 10**6)),
    "store: a billion units, none committed": hollow_store(1 << 30, 1),
    "store: a billion rows, none committed": hollow_store(1 << 30, 1 << 20),
    "store: steps of terabytes, none committed": hollow_store(
        1 << 20, 1 << 20, steps={"action": {"shape": [1 << 20], "dtype": "float32", "role": "action", "names": []}}
    ),
    "store: a manifest nested 900 deep": store(deep_manifest),
    "store: the metadata of an array nested 900 deep": store(
        lambda root, canary: deep_in("frames/grid/zarr.json", "attributes")(root)
    ),
    "store: a record nested 900 deep": store(deep_record),
    "replay buffer: a thousand million chunks": replay_buffer(
        10**9, ([10**9, 8, 8, 3], [1, 8, 8, 3]), ([10**9, 2], [1, 2])
    ),
    "replay buffer: one chunk of terabytes": replay_buffer(
        10**9, ([10**9, 8, 8, 3], [10**9, 8, 8, 3]), ([10**9, 2], [10**9, 2])
    ),
    "replay buffer: a picture of terabytes": replay_buffer(
        3, ([3, 10**6, 10**6, 3], [3, 10**6, 10**6, 3]), ([3, 3 << 20], [3, 3 << 20])
    ),
    "replay buffer: actions that unpack to gigabytes": replay_buffer(
        9 << 20, ([9 << 20, 8, 8, 3], [9 << 20, 8, 8, 3]), ([9 << 20, 64], [9 << 20, 64])
    ),
    "replay buffer cache: a thousand million chunks": replay_buffer(
        10**9, ([10**9, 8, 8, 3], [1, 8, 8, 3]), ([10**9, 2], [1, 2]), "replay buffer cache"
    ),
    "replay buffer: ends that are the fill value": Artefact("replay buffer", endless_ends, "episode_ends"),
    "replay buffer cache: ends that are the fill value": Artefact("replay buffer cache", endless_ends, "episode_ends"),
    "robomimic: 10^8 rows of which none was written": robomimic(empty_rows),
    "robomimic cache: 10^8 rows of which none was written": robomimic(empty_rows, "robomimic cache"),
    "robomimic: zeros packed a thousandfold": robomimic(packed_rows),
    "robomimic: an array longer than its file": robomimic(contiguous, edit=longer_than_the_file),
    "robomimic: a filter of a thousand million names": robomimic(a_filter_of_names, "robomimic filter"),
    "robomimic: pictures of terabytes": robomimic(one_giant_picture),
    "source: a footer of 10^12 rows": source_of(parquet_of_rows),
    "source: info.json nested 900 deep": source_of(deep_in("meta/info.json", "robot_type")),
    "source: modality.json nested 900 deep": source_of(deep_in("meta/modality.json", "state")),
    # lies
    "head: tensors that overlap": head(
        safetensors(tensors(x=("F32", [2], [0, 8]), y=("F32", [2], [4, 12])), bytes(12)), "ema.safetensors"
    ),
    "head: a tensor outside the file": head(
        safetensors(tensors(x=("F32", [2], [4096, 4104])), bytes(8)), "ema.safetensors"
    ),
    "head: bytes that no tensor owns": head(safetensors(tensors(x=("F32", [1], [0, 4])), bytes(4096)), "ema"),
    "head: no tensor at all": head(safetensors(b"{}"), "head"),
    # elsewhere
    "store: an external link": in_h5(
        lambda file, secret: file.__setitem__("frames/grid", h5py.ExternalLink(str(secret), "/frames/grid"))
    ),
    "store: a soft link": in_h5(lambda file, secret: file.__setitem__("frames/grid", h5py.SoftLink("/steps/action"))),
    "store: a virtual data set": in_h5(virtual),
    "store: an external file": in_h5(
        lambda file, secret: file.create_dataset(
            "frames/grid", (9, 2, 2, 2, 8), "f2", external=[(str(secret), 0, 1152)]
        )
    ),
    "store: a feature above the store": store(
        lambda root, canary: resign(root, lambda m: m["features"].update({"../../x": m["features"].pop("grid")}))
    ),
    "store: a zip with a name that leads out": zipped("../{canary}", b"x"),
    "source: rows above the data set": source_of(
        lambda root: edit(root / "meta/info.json", lambda info: info.update(data_path="../{chunk_index}/{file_index}"))
    ),
    # waiting
    "store: a pipe as manifest": store(pipe_at("zarr.json")),
    "store: a pipe as record": store(pipe_at("commits/unit-000001.json")),
    "store: a pipe as shard": store(pipe_at(SHARD)),
    "store: a pipe as steps": store(pipe_at("steps/action/c.1.0")),
    "store: a pipe as h5 unit": store(pipe_at("units/unit-000001.h5"), "h5"),
    "head: a pipe as weights": head(pipe_at("ema.safetensors"), "ema.safetensors"),
    "source: a pipe as info": source_of(
        lambda root: ((root / "meta/info.json").unlink(), os.mkfifo(root / "meta/info.json"))
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each ended, all of them opened by one process that forks; "canary" where code was run."""
    root = tmp_path_factory.mktemp("hostile")
    asked, canaries = [], {}
    for number, (name, artefact) in enumerate(ARTEFACTS.items()):
        folder = root / str(number)
        folder.mkdir()
        canaries[name] = root / f"canary-{number}"
        asked.append([name, artefact.how, str(artefact.make(folder, canaries[name]))])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(Path(__file__).with_name("opener.py"))]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    for name, canary in canaries.items():
        found[name]["canary"] = canary.exists()
    shutil.rmtree(root)
    return found


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_hostile_artefact_is_refused_by_name_and_runs_nothing(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes[name]
    assert not found["canary"]
    assert found["ended"].endswith("Error"), found
    assert not found["ended"].startswith("crashed"), found
    assert "\n" not in found["said"]
    assert ARTEFACTS[name].says in found["said"]
    assert found["grown_mb"] < 500
    assert found["cpu_s"] < 5  # seconds of work: the clock also counts what else the machine does


def test_the_bombs_of_this_table_go_off(tmp_path: Path) -> None:
    for number, load in enumerate((pickle.loads, lambda data: np.load(tmp_path / "a.npy", allow_pickle=True))):
        canary = tmp_path / str(number)
        np.save(tmp_path / "a.npy", np.array([Bomb(canary)], object), allow_pickle=True)
        load(pickle.dumps(Bomb(canary)))
        assert canary.exists()
