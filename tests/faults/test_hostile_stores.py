"""Stores made or edited to mislead: refused, named, and without taking the memory that they ask for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from vla.stores.errors import CorruptionError, StoreError
from vla.stores.fingerprint import canonical, digest
from vla.stores.metadata import table_digests
from vla.stores.store import open_store
from vla.stores.verify import verify_store

COMMIT = "commits/unit-000001.json"


@pytest.fixture
def form() -> str:
    """The zarr form alone: these lies are told in zarr's metadata. tests/stores/test_hdf5_units.py tells HDF5's."""
    return "zarr"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shape", "0"), 23),
        (("shape", "0"), 10**12),
        (("shape",), []),
        (("data_type",), "float32"),
        (("data_type",), "bfloat16"),
        (("chunk_grid", "configuration", "chunk_shape", "0"), 4),
        (("chunk_grid",), None),
        (("chunk_grid", "name"), "irregular"),
        (("chunk_key_encoding", "configuration", "separator"), "/"),
        (("chunk_key_encoding", "name"), "v2"),
        (("codecs",), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (("codecs",), [{"name": "pickle"}]),
        (("codecs", "0", "configuration", "index_location"), "start"),
        (("codecs", "0", "configuration", "codecs", "0", "configuration", "endian"), "big"),
        (("fill_value",), 0.0),
        (("dimension_names",), ["view", "row", "p", "c"]),
        (("zarr_format",), 2),
        (("node_type",), "group"),
        (("storage_transformers",), [{"name": "theirs"}]),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else str(value)[:16],
)
def test_edited_metadata_of_an_array_is_refused(
    root: Path,
    path: tuple[str, ...],
    value: Any,
    require_noticed: Callable[[Path, str, str], None],
    edit_metadata: Callable[..., None],
) -> None:
    edit_metadata(root / "frames/grid/zarr.json", *path, value=value)
    require_noticed(root, "frames/grid/zarr.json", ".".join(path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("attributes", "vla", "rows"), 10**12),
        (("attributes", "vla", "unit_rows"), 4),
        (("attributes", "vla", "fingerprint", "source", "digest"), "source-b"),
        (("attributes", "vla", "provenance", "random_weights"), False),
        (("attributes", "vla_sha256"), "0" * 64),
        (("attributes", "vla", "fps"), float("nan")),
        (("attributes", "vla", "schema_version"), 2),
        (("attributes", "vla", "schema_version"), None),
        (("attributes", "vla"), "text"),
        (("attributes",), [1]),
        (("zarr_format",), 2),
        (("node_type",), "array"),
    ],
)
def test_an_edited_manifest_is_refused(
    root: Path,
    path: tuple[str, ...],
    value: Any,
    require_noticed: Callable[[Path, str, str], None],
    edit_metadata: Callable[..., None],
) -> None:
    edit_metadata(root / "zarr.json", *path, value=value)
    require_noticed(root, "zarr.json", ".".join(path))


@pytest.mark.parametrize("path", ["zarr.json", "frames/grid/zarr.json", "frames/zarr.json", COMMIT])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"a": NaN}',
        b'{"attributes": {"vla": {"schema_version": 1, "x": NaN}}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"attributes": {"vla": {"schema_version": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}}}",
        b'{"sha256": "x", "unit": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"sha256": "\\ud800", "unit": "\\ud800"}',
    ],
    ids=lambda value: repr(value[:12]) + str(len(value)) if isinstance(value, bytes) else value,
)
def test_json_that_is_no_record_is_refused(
    root: Path, path: str, content: bytes, require_noticed: Callable[[Path, str, str], None]
) -> None:
    (root / path).write_bytes(content)
    require_noticed(root, path, repr(content[:20]))


@pytest.mark.parametrize("path", ["zarr.json", "steps/action/zarr.json", COMMIT])
def test_a_file_of_gigabytes_where_metadata_should_be_is_not_read(
    root: Path, path: str, require_noticed: Callable[[Path, str, str], None]
) -> None:
    os.truncate(root / path, 8 << 30)  # sparse: costs nothing on disk, everything in memory
    require_noticed(root, path, "8 GiB")


def resign(root: Path, **changes: Any) -> None:
    """Edit the manifest and renew its digest, as someone who means harm would."""
    file = root / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["vla"].update(changes)
    document["attributes"]["vla_sha256"] = digest(document["attributes"]["vla"])
    file.write_text(json.dumps(document))


FEATURE = {"shape": [1, 4], "dims": ["view", "channel"], "dtype": "float16"}


STEP = {"shape": [2], "dtype": "float32", "role": "action", "names": []}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**12},
        {"rows": 2**63},
        {"rows": 0},
        {"rows": "many"},
        {"unit_rows": 1, "rows": 10**12},
        {"unit_rows": 2**40},
        {"features": {"grid": FEATURE | {"shape": [2**32, 2**32]}}},
        {"features": {"grid": FEATURE | {"shape": [2**31, 4]}}},
        {"features": {"grid": FEATURE | {"shape": [-1, 4]}}},
        {"features": {"grid": FEATURE | {"shape": []}}},
        {"features": {"grid": FEATURE | {"dims": ["view"]}}},
        {"features": {"grid": FEATURE | {"dtype": "object"}}},
        {"features": {"../../elsewhere": FEATURE}},
        {"features": {"/etc": FEATURE}},
        {"steps": {"../elsewhere": STEP}},
        {"steps": {"action": STEP | {"shape": [-1]}}},
        {"steps": {"action": STEP | {"shape": [2**40]}}},
        {"tables": {}},
        {"provenance": {"picture_sizes": {"front": "large"}}},
        {"provenance": {"picture_sizes": [64, 64]}},
        {"unknown": 1},
    ],
    ids=lambda changes: canonical(changes).decode()[:60],
)
def test_a_manifest_that_lies_with_a_valid_digest_is_refused(root: Path, changes: dict[str, Any]) -> None:
    resign(root, **changes)
    with pytest.raises(StoreError) as raised:
        open_store(root, allow_partial=True)
    assert str(root) in str(raised.value)
    assert verify_store(root).findings


def test_a_hostile_store_of_a_trillion_rows_is_refused_before_memory_is_taken(
    root: Path, make_store: Callable[..., Any], edit_metadata: Callable[..., None]
) -> None:
    """Everything consistent, every digest valid, one episode of 10**12 rows: still no allocation by declared size."""
    lengths = np.array([10**12], np.int64)
    arrays = {
        "episodes/id": np.frombuffer(b"x", np.uint8)[None],
        "episodes/row_start": np.zeros(1, np.int64),
        "episodes/length": lengths,
        "episodes/task": np.zeros(1, np.int64),
        "tasks/text": np.frombuffer(b"t", np.uint8)[None],
    }
    shutil.rmtree(root)
    made = make_store(root, lengths=(2,), ids=("x",), unit_rows=1)
    for path, values in arrays.items():
        file = root / path / ("c" + ".0" * values.ndim)
        file.write_bytes(_with_crc(values))
        edit_metadata(root / path / "zarr.json", "shape", value=list(values.shape))
        edit_metadata(root / path / "zarr.json", "chunk_grid", "configuration", "chunk_shape", value=list(values.shape))
    resign(root, rows=10**12, tables=table_digests(arrays))
    for name in ("frames/grid", "checksums/grid", "stats/grid", "steps/action", "steps/done", "steps/clock"):
        edit_metadata(root / name / "zarr.json", "shape", "0", value=10**12)
    assert made.manifest.unit_rows == 1
    with pytest.raises(StoreError, match="1000000000000"):
        open_store(root, allow_partial=True)
    assert verify_store(root).findings


def _with_crc(values: np.ndarray[Any, Any]) -> bytes:
    raw = values.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(4, "little")


def test_a_table_of_other_episodes_with_valid_checksums_is_refused(
    root: Path, require_noticed: Callable[[Path, str, str], None]
) -> None:
    values = np.array([9, 10, 5], np.int64)
    (root / "episodes/length/c.0").write_bytes(_with_crc(values))
    require_noticed(root, "episodes/length", "another table")


@pytest.mark.parametrize(
    ("path", "shape", "dtype"),
    [
        ("episodes/length", [10**30], "int64"),
        ("episodes/length", [-1, -3], "int64"),
        ("episodes/length", [True, 3], "int64"),
        ("episodes/length", [3], "float64"),
        ("episodes/length", "3", "int64"),
        ("episodes/id", [24], "uint8"),
        ("episodes/id", [1e3], "uint8"),
    ],
)
def test_a_table_that_declares_a_wrong_shape_is_refused(
    root: Path,
    path: str,
    shape: Any,
    dtype: str,
    require_noticed: Callable[[Path, str, str], None],
    edit_metadata: Callable[..., None],
) -> None:
    edit_metadata(root / path / "zarr.json", "shape", value=shape)
    edit_metadata(root / path / "zarr.json", "data_type", value=dtype)
    require_noticed(root, path, f"{dtype} {shape}")


def resign_record(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((root / COMMIT).read_bytes())
    record.pop("sha256")
    change(record)
    (root / COMMIT).write_bytes(canonical({**record, "sha256": digest(record)}) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("files"),
        lambda record: record.pop("unit"),
        lambda record: record.pop("manifest_sha256"),
        lambda record: record.pop("skipped"),
        lambda record: record["files"].clear(),
        lambda record: record["files"].pop("checksums/grid/c.1"),
        lambda record: record["files"].update({"../../etc/passwd": {"size": 1, "sha256": "0"}}),
        lambda record: record["files"].update({"checksums/grid/c.1": "text"}),
        lambda record: record["files"]["checksums/grid/c.1"].update(size="large"),
        lambda record: record["files"]["checksums/grid/c.1"].pop("sha256"),
        lambda record: record.update(files=[1]),
        lambda record: record.update(skipped=7),
        lambda record: record.update(unit="1"),
    ],
)
def test_a_record_that_lies_with_a_valid_digest_is_refused(
    root: Path, change: Callable[[dict[str, Any]], None], require_noticed: Callable[[Path, str, str], None]
) -> None:
    resign_record(root, change)
    require_noticed(root, COMMIT, "record")


@pytest.mark.parametrize("path", ["checksums/grid/c.1", "stats/grid/c.1.0.0", "steps/action/c.1.0"])
def test_a_record_that_declares_another_size_is_refused(
    root: Path, path: str, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    """The file is as large as the record says: neither is what the manifest promises."""
    os.truncate(root / path, 2)
    short = (root / path).read_bytes()
    entry = {"size": 2, "sha256": hashlib.sha256(short).hexdigest()}
    resign_record(root, lambda record: record["files"].update({path: entry}))
    with pytest.raises(CorruptionError, match="unit 1"):
        read_everything(root)


def test_a_shard_index_that_points_elsewhere_with_a_valid_checksum_is_noticed(
    root: Path, read_everything: Callable[[Path], dict[str, bytes]], require_noticed: Callable[[Path, str, str], None]
) -> None:
    shard = root / "frames/grid/c.1.0.0.0"
    good = shard.read_bytes()
    tail = 8 * 16 + 4
    index = np.frombuffer(good[-tail:-4], "<u8").reshape(8, 2).copy()
    for offset, length in ((28, 28), (len(good), 28), (2**63, 28), (0, 2**40), (0, 24)):
        lying = index.copy()
        lying[2] = offset, length
        body = lying.tobytes()
        crc = int(google_crc32c.value(body)).to_bytes(4, "little")
        shard.write_bytes(good[:-tail] + body + crc)
        require_noticed(root, "frames/grid/c.1.0.0.0", f"slot 2 at {offset}, {length} bytes")
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptionError, match="the shard index does not match its checksum"):
        read_everything(root)
