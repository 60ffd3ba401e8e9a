"""Every kind of store in every place where a store may be: one table of kinds, one table of places, equal content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import CorruptionError
from vla.stores.inspect import describe
from vla.stores.join import join_stores
from vla.stores.layout import is_metadata
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo, copy_name
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.publish import open_remote_writer
from vla.stores.repair import repair_store
from vla.stores.store import Store, open_store
from vla.stores.tables import LABELS, TABLES, EpisodeTable
from vla.stores.verify import verify_store
from vla.stores.writer import StoreWriter, open_writer

URL = "s3://bucket/some/s"
LENGTHS = (5, 9, 6)
ROWS, UNIT_ROWS = sum(LENGTHS), 8
GRID = {"grid": ((2, 3, 4), "float16")}
TEXTS: list[Mapping[str, str]] = [{"subtask": "pick – ü", "high_level_task": "set"}, {}, {"subtask": "wipe"}]


@dataclass(frozen=True)
class Kind:
    """What distinguishes a store; the default is one feature in float16."""

    features: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=lambda: GRID)
    tasks: Sequence[str] = ("pick", "place", "pick")
    texts: Sequence[Mapping[str, str]] | None = None
    left_out: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    compression: str = "none"


KINDS: dict[str, Kind] = {
    "one feature": Kind(),
    "labels": Kind(texts=TEXTS),
    "instructions in two scripts": Kind(tasks=("pick – ü", "置く", "")),
    "augmented copies": Kind(
        features={copy_name("grid", copy): GRID["grid"] for copy in range(3)},
        fingerprint={"augment": {"copies": 2, "seed": 0}},
    ),
    "int8 with scales": Kind(features={"grid": ((2, 3, 4), "int8")}),
    "bfloat16": Kind(features={"grid": ((2, 3, 4), "bfloat16")}),
    "float32": Kind(features={"grid": ((2, 3, 4), "float32")}),
    "masks and token ids": Kind(features={**GRID, "mask": ((2, 3), "uint8"), "tokens": ((1, 5), "int32")}),
    "several features": Kind(features={**GRID, "pooled": ((1, 5), "float32"), "ray": ((2, 2, 2), "int8")}),
    "composed backbone": Kind(
        features={"siglip.grid": GRID["grid"], "dino+x": ((2, 7), "bfloat16")},
        fingerprint={"backbone": {"name": "compose", "options": {"of": ["toy", "rgb"]}}},
    ),
    "an episode left out": Kind(left_out="episode-1", texts=TEXTS),
    "zstd": Kind(compression="zstd"),
}


class Made:
    """The content of a kind of store, and writers for parts of it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        ids = [f"episode-{number}" for number in range(len(LENGTHS))]
        self.episodes = EpisodeTable.plan(ids, LENGTHS, kind.tasks, kind.texts)
        infos = {
            name: FeatureInfo(shape=shape, dims=("view", *(f"axis_{n}" for n in range(1, len(shape)))), dtype=dtype)
            for name, (shape, dtype) in kind.features.items()
        }
        steps = {
            "action": StepInfo(shape=(2,), dtype="float32", role="action", names=("x", "y")),
            "valid": StepInfo(shape=(), dtype="bool", role="other"),
        }
        self.manifest = Manifest(
            rows=ROWS,
            unit_rows=UNIT_ROWS,
            compression=kind.compression,
            fps=10.0,
            cameras=("front", "wrist"),
            features=infos,
            steps=steps,
            fingerprint={"source": {"digest": "a"}, **kind.fingerprint},
            tables={},
            provenance={},
        )

    def fill(self, writer: StoreWriter, units: int | None = None) -> None:
        """Commit the pending units, at most `units`."""
        for unit in writer.pending()[:units]:
            buffer = writer.begin(unit)
            rows = np.arange(buffer.rows.start, buffer.rows.stop)
            kept = rows[~self.episodes.rows_of([self.kind.left_out], range(rows[0], rows[-1] + 1))]
            for row in kept.tolist():
                buffer.put(row, {name: _values(info, row)[None] for name, info in self.manifest.features.items()})
                buffer.steps["action"][row - rows[0]] = row
                buffer.steps["valid"][row - rows[0]] = row % 3 == 0
            if len(kept) < len(rows):
                inside = self.episodes.rows_in(self.episodes.position[self.kind.left_out], buffer.rows)
                buffer.leave_out(self.kind.left_out, inside, "its video does not decode")
            writer.commit(buffer)

    def local(self, root: Path, units: int | None = None, **flags: bool) -> Path:
        with open_writer(root, self.manifest, self.episodes, **flags) as writer:
            self.fill(writer, units)
        return root

    def remote(self, options: RemoteOptions, units: int | None = None, **flags: bool) -> None:
        with open_remote_writer(URL, self.manifest, self.episodes, options, **flags) as writer:
            self.fill(writer, units)


def _values(info: FeatureInfo, row: int) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(row).normal(size=info.shape)
    return (np.abs(drawn) * 50).astype(info.dtype) if info.dtype in ("uint8", "int32") else drawn.astype(np.float32)


@dataclass(frozen=True)
class Places:
    """What a place needs to put a store there."""

    bucket: Any
    options: RemoteOptions
    folder: Path

    def convert(self, root: Path | str, name: str, format: str, compression: str = "none") -> Path:
        options = ConvertOptions.build({"format": format, "compression": compression}, where="a test")
        convert_store(root, self.folder / name, options)
        return self.folder / name


def copied_there(made: Made, at: Places) -> str:
    root = made.local(at.folder / "s")
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            at.bucket.objects[f"some/s/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return URL


def written_there(made: Made, at: Places) -> str:
    made.remote(at.options)
    return URL


def resumed_there(made: Made, at: Places) -> str:
    made.remote(at.options, 1)
    made.remote(at.options, resume=True)
    return URL


def repaired_there(made: Made, at: Places) -> str:
    made.remote(at.options)
    path = "some/s/steps/action/c.1.0"
    at.bucket.objects[path] = bytes(len(at.bucket.objects[path]))
    assert repair_store(URL).dropped == [1]
    made.remote(at.options, resume=True)
    return URL


def overwritten_there(made: Made, at: Places) -> str:
    Made(Kind()).remote(at.options)
    made.remote(at.options, overwrite=True)
    return URL


def resumed_here(made: Made, at: Places) -> Path:
    made.local(at.folder / "s", 2)
    return made.local(at.folder / "s", resume=True)


def repaired_here(made: Made, at: Places) -> Path:
    root = made.local(at.folder / "s")
    (root / "commits/unit-000001.json").write_bytes(b"{}")
    assert repair_store(root).dropped == [1]
    return made.local(root, resume=True)


def h5_here(made: Made, at: Places) -> Path:
    return at.convert(made.local(at.folder / "s"), "h5", "h5")


def h5_and_back(made: Made, at: Places) -> Path:
    return at.convert(h5_here(made, at), "zarr", "zarr", made.kind.compression)


def converted_from_there(made: Made, at: Places) -> Path:
    return at.convert(written_there(made, at), "h5", "h5")


PLACES: dict[str, Callable[[Made, Places], Path | str]] = {
    "a folder": lambda made, at: made.local(at.folder / "s"),
    "a folder, resumed": resumed_here,
    "a folder, repaired": repaired_here,
    "h5": h5_here,
    "h5 and back": h5_and_back,
    "a bucket, copied": copied_there,
    "a bucket, written": written_there,
    "a bucket, resumed": resumed_there,
    "a bucket, repaired": repaired_there,
    "a bucket, overwritten": overwritten_there,
    "a bucket, converted to h5": converted_from_there,
}


def everything(store: Store) -> dict[str, Any]:
    """All that a store says and holds, by name."""
    rows = np.flatnonzero(~store.left_out)
    names, episodes = store.manifest.features, store.episodes
    found: dict[str, Any] = {name: store.read(name, rows).tobytes() for name in names}
    found |= {f"{name}, statistics": store.statistics(name).to_array().tobytes() for name in names}
    found |= {f"{name}, scales": None if (of := store.scales(name)) is None else of.tobytes() for name in names}
    found |= {name: store.steps(name).tobytes() for name in store.manifest.steps}
    found |= {path: table.tobytes() for path, table in episodes.to_arrays().items()}
    found["texts"] = [dict(episodes.texts(episode)) for episode in range(len(episodes))]
    found["skipped"], found["usable"] = store.skipped, store.usable.tolist()
    found["copies"], found["fingerprint"] = store.manifest.copies, store.manifest.fingerprint
    found["joined"] = join_stores([store]).usable.tolist()
    return found


EVERYWHERE = ("labels", "augmented copies", "several features", "an episode left out")
"""Kinds with tables, arrays or gaps that others lack: the short run has them in every place."""
EVERY_KIND = ("a folder", "h5 and back", "a bucket, resumed")
"""Places that together write, convert, upload and resume: the short run has every kind in them."""


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        pytest.param(kind, place, marks=[] if kind in EVERYWHERE or place in EVERY_KIND else pytest.mark.long)
        for kind in KINDS
        for place in PLACES
    ],
)
def test_a_store_reads_the_same_in_every_place(
    kind: str,
    place: str,
    bucket: Any,
    options: RemoteOptions,
    memory_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLA_CACHE", str(options.folder))
    made = Made(KINDS[kind])
    reference = made.local(memory_path / "reference")
    where = PLACES[place](made, Places(bucket, options, memory_path))
    wanted = everything(open_store(reference))
    assert everything(open_store(where, remote=options)) == wanted
    assert everything(open_store(where, remote=options)) == wanted  # the second time through a warm cache
    assert verify_store(where).findings == []
    assert repair_store(where).dropped == []
    here = describe(reference)
    assert {name: value for name, value in describe(where).items() if here[name] != value}.keys() <= {
        "store",
        "format",
        "bytes",
        "manifest_sha256",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_store_is_metadata_or_a_units_or_a_lock(kind: str, memory_path: Path) -> None:
    """A table that a later version adds is mirrored without a second list: the layout alone says what it is."""
    made = Made(KINDS[kind])
    root = made.local(memory_path / "s", 0)
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {path for path in files if not is_metadata(path)} == {"commits/writer.lock"}
    made.local(root, resume=True)
    committed = {path for commit in open_store(root).commits.values() for path in commit.files}
    assert {path for path in committed if is_metadata(path)} == set()


def test_the_names_of_all_tables_are_written_once() -> None:
    table = EpisodeTable.plan(["a"], [1], ["b"], [{"c": "d"}])
    assert set(table.to_arrays()) == {*TABLES, *LABELS}


def test_only_files_of_the_layout_are_mirrored(
    bucket: Any, options: RemoteOptions, memory_path: Path, files_of: Any
) -> None:
    Made(KINDS["labels"]).remote(options)
    foreign = ["README.md", "notes/x.json", "labelled/x", "episodes.old/id/c.0", "commits/other.json", "zarr.json.bak"]
    bucket.objects |= {f"some/s/{path}": b"{}" for path in foreign}
    open_store(URL, remote=options)
    mirrored = {path.partition("/files/")[2] for path in files_of(options.folder)}
    assert mirrored & set(foreign) == set()


@pytest.mark.parametrize("path", ["zarr.json", "labels/zarr.json", "commits/unit-000000.json"])
def test_an_object_larger_than_any_metadata_is_refused_before_it_is_fetched(
    path: str, bucket: Any, options: RemoteOptions
) -> None:
    Made(KINDS["labels"]).remote(options)
    bucket.objects[f"some/s/{path}"] = bytes((16 << 20) + 1)
    bucket.requests.clear()
    with pytest.raises(CorruptionError, match=path):
        open_store(URL, remote=options)
    with pytest.raises(CorruptionError, match=path):
        Made(KINDS["labels"]).remote(options, resume=True)
    assert [request for request in bucket.requests if request.key == f"some/s/{path}"] == []
