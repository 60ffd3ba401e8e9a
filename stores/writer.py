"""Writing a store: created whole, filled unit by unit, each unit committed or absent.

The order of one commit: every file of the unit under a temporary name, fsynced, renamed, its folder fsynced; then the
commit record in the same way. A crash anywhere leaves the units before as they were and this one absent; the next
writer sweeps the debris and computes the unit again. Committed units are never touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.commits import Commit, FileRecord, read_commits
from vla.stores.errors import DataError, StoreError, UsageError
from vla.stores.filesystem import (
    PARTIAL,
    explaining,
    fsync_dir,
    fsync_tree,
    sweep_partial,
    write_atomic_parts,
    writer_lock,
)
from vla.stores.fingerprint import require_equal
from vla.stores.layout import (
    COMMITS,
    checksum_file,
    commit_file,
    feature_file,
    statistics_file,
    step_file,
    write_metadata,
)
from vla.stores.manifest import Manifest
from vla.stores.metadata import check_arrays, read_manifest, read_tables, table_digests
from vla.stores.shard import ShardBuffer
from vla.stores.statistics import of_rows
from vla.stores.tables import EpisodeTable

_CONTENTS = {"zarr.json", "frames", "steps", "checksums", "stats", "episodes", "tasks", COMMITS}


@dataclass
class UnitBuffer:
    """The rows of one unit being filled, in memory.

    `features[name]` is `[n, *shape]`, `steps[name]` `[n, *shape]`; rows not marked in `present` [n] stay empty.
    `skipped` names episodes left out and why.
    """

    unit: int
    rows: range
    shards: dict[str, ShardBuffer]
    steps: dict[str, NDArray[Any]]
    present: NDArray[np.bool_]
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[range] = field(default_factory=list)

    def leave_out(self, episode: str, rows: range, reason: str) -> None:
        """Leave an episode out of the store; `rows` are those of its rows that lie in this unit."""
        self.skipped[episode] = reason
        self.dropped.append(rows)

    def put(self, start: int, features: Mapping[str, NDArray[Any]]) -> None:
        """Store every feature `{name: [k, *shape]}` of k rows from store row `start` on.

        Raises `DataError` on names, shapes or rows that are not this unit's, and on NaN or infinity, also where
        float32 values overflow a float16 store.
        """
        at = start - self.rows.start
        count = len(next(iter(features.values()), ()))
        if features.keys() != self.shards.keys() or not 0 <= at <= at + count <= len(self.rows):
            raise DataError(
                f"features {sorted(features)} for rows {start}..{start + count - 1}",
                expected=f"{sorted(self.shards)} in rows {self.rows.start}..{self.rows.stop - 1}",
            )
        for name, values in features.items():
            target = self.shards[name].rows
            if values.shape != (count, *target.shape[1:]):
                raise DataError(f"feature {name!r} has shape {values.shape}", expected=f"{(count, *target.shape[1:])}")
            _require_representable(name, values, target.dtype, start)
            target[at : at + count] = values
        self.present[at : at + count] = True


class StoreWriter:
    """The one writer of a store. Use `open_writer`, which holds the lock."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self.commits = read_commits(root, manifest)

    def pending(self) -> list[int]:
        """Units of the plan that are not committed."""
        return [unit for unit in range(self.manifest.units) if unit not in self.commits]

    def begin(self, unit: int) -> UnitBuffer:
        """Allocate the buffers of a unit. Raises `StoreError` where it is committed already."""
        self._require_pending(unit)
        rows = self.manifest.unit_range(unit)
        slots = self.manifest.unit_rows
        shards = {name: ShardBuffer.allocate(info, len(rows), slots) for name, info in self.manifest.features.items()}
        steps = {name: _blank(slots, info.shape, info.dtype) for name, info in self.manifest.steps.items()}
        return UnitBuffer(unit, rows, shards, steps, np.zeros(len(rows), bool))

    def commit(self, buffer: UnitBuffer) -> Commit:
        """Make a filled unit durable and committed. Raises `MachineError` on a full disk and the like."""
        unit, slots = buffer.unit, self.manifest.unit_rows
        self._require_pending(unit)
        wanted = np.ones(len(buffer.rows), bool)
        for rows in buffer.dropped:
            part = slice(rows.start - buffer.rows.start, rows.stop - buffer.rows.start)
            wanted[part] = buffer.present[part] = False
            for values in buffer.steps.values():
                values[part] = _fill(values.dtype)
        missing = np.flatnonzero(wanted & ~buffer.present) + buffer.rows.start
        if len(missing):
            raise StoreError(f"unit {unit} of {self.root} lacks rows {missing[0]}..{missing[-1]}", expected="all rows")
        files: dict[str, FileRecord] = {}
        for name, info in self.manifest.features.items():
            parts, crcs = buffer.shards[name].encode(buffer.present)
            self._write(files, feature_file(name, unit, len(info.shape)), parts)
            padded = np.zeros(slots, "<u4")
            padded[: len(crcs)] = crcs
            self._write(files, checksum_file(name, unit), _checked(padded))
            encoded = buffer.shards[name].rows
            moments = of_rows(encoded if buffer.present.all() else encoded[buffer.present], info.shape[-1])
            self._write(files, statistics_file(name, unit), _checked(moments.to_array()))
        for name, step in self.manifest.steps.items():
            self._write(files, step_file(name, unit, len(step.shape)), _checked(buffer.steps[name]))
        commit = Commit(unit, files, dict(buffer.skipped))
        write_atomic_parts(self.root / commit_file(unit), [commit.to_bytes(self.manifest)])
        self.commits[unit] = commit
        return commit

    def _require_pending(self, unit: int) -> None:
        if unit in self.commits:
            raise StoreError(f"unit {unit} of {self.root} is committed", expected="a pending unit")

    def _write(self, files: dict[str, FileRecord], path: str, parts: list[memoryview]) -> None:
        sha256 = write_atomic_parts(self.root / path, parts)
        files[path] = FileRecord(sum(part.nbytes for part in parts), sha256)


@contextmanager
def open_writer(
    root: Path, manifest: Manifest, episodes: EpisodeTable, *, resume: bool = False, overwrite: bool = False
) -> Iterator[StoreWriter]:
    """Create the store at `root`, or go on with it, and hold its writer lock.

    `manifest.tables` is filled in here. Raises `UsageError` where `root` exists and neither flag is given,
    `FingerprintError` where a resumed store was made with other settings, `StoreError` where another writer holds it.
    """
    with explaining(root):
        root = root.resolve()  # behind a link, the store is made and replaced where it lies
        manifest = manifest.model_copy(update={"tables": table_digests(episodes.to_arrays())})
        _begin(root, manifest, episodes, resume=resume, overwrite=overwrite)
    with writer_lock(root):
        with explaining(root):
            found = read_manifest(root)
            _require_same(root, found, manifest)
            check_arrays(root, found)
            read_tables(root, found)
            sweep_partial(root)
            writer = StoreWriter(root, found)
        yield writer


def _begin(root: Path, manifest: Manifest, episodes: EpisodeTable, *, resume: bool, overwrite: bool) -> None:
    """See to it that there is a store at `root`: the one to resume, or a new one without units."""
    if root.name.endswith(PARTIAL):
        raise UsageError(f"{root} ends in {PARTIAL!r}", expected="another name; it marks unfinished files")
    manifest.require_sound(root)
    if root.exists():
        if not (resume or overwrite):
            fix = "--resume to go on with it, --overwrite to replace it, or another --out"
            raise UsageError(f"{root} exists", fix=fix)
        read_manifest(root)
        if not overwrite:
            return
        _remove_store(root)
    _create(root, manifest, episodes)


def _create(root: Path, manifest: Manifest, episodes: EpisodeTable) -> None:
    """Make a store without units under a temporary name, and rename it. The lock keeps a second process out."""
    partial, doomed = root.with_name(root.name + PARTIAL), _doomed(root)
    _require_debris(partial)
    _require_debris(doomed)
    (partial / COMMITS).mkdir(parents=True, exist_ok=True)
    with writer_lock(partial):
        _remove(doomed)
        for path in partial.iterdir():
            if path.name != COMMITS:
                _remove(path)
        if root.exists():
            _remove(partial)
            raise StoreError(f"{root} was made by another process just now", fix="--resume")
        write_metadata(partial, manifest, episodes.to_arrays())
        fsync_tree(partial)
        partial.rename(root)
        fsync_dir(root.parent)


def _remove_store(root: Path) -> None:
    """Delete an existing store; its manifest has been read."""
    with writer_lock(root):
        # Renamed first: a crash while deleting must not leave half a store under its own name.
        doomed = _doomed(root)
        _require_debris(doomed)
        _remove(doomed)
        root.rename(doomed)
        _remove(doomed)


def _doomed(root: Path) -> Path:
    return root.with_name(root.name + ".old" + PARTIAL)


def _require_debris(folder: Path) -> None:
    """Refuse to delete a folder that holds anything a store does not."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in inside if name not in _CONTENTS and not name.endswith(PARTIAL)]
    if foreign:
        raise StoreError(f"{folder} is in the way and holds {foreign[0]}", expected="what an interrupted run left")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _require_same(root: Path, found: Manifest, wanted: Manifest) -> None:
    fix = "the settings it was made with, --overwrite to replace it, or another --out"
    require_equal(found.fingerprint, wanted.fingerprint, what=str(root), fix=fix)
    plan = {"features", "steps", "rows", "unit_rows", "cameras", "fps", "tables"}
    old, new = found.model_dump(mode="json", include=plan), wanted.model_dump(mode="json", include=plan)
    require_equal(old, new, what=f"the plan of {root}", fix=fix)


def _blank(rows: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.full((rows, *shape), _fill(np.dtype(dtype)), np.dtype(dtype).newbyteorder("<"))


def _fill(dtype: np.dtype[Any]) -> float:
    return np.nan if np.issubdtype(dtype, np.floating) else 0


def _require_representable(name: str, values: NDArray[Any], dtype: np.dtype[Any], start: int) -> None:
    limit = float(np.finfo(dtype).max)
    # Two passes and no copy; NaN passes through min and max, and every comparison with it is false.
    if -limit <= float(values.min(initial=0.0)) and float(values.max(initial=0.0)) <= limit:
        return
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat).all(axis=1)
    if not finite.all():
        raise DataError(f"feature {name!r} is not finite in row {start + int(finite.argmin())}")
    row = start + int((np.abs(flat).max(axis=1) > limit).argmax())
    raise DataError(
        f"feature {name!r} exceeds {dtype.name} in row {row}", expected=f"|x| <= {limit:.6g}", fix="--dtype float32"
    )


def _checked(values: NDArray[Any]) -> list[memoryview]:
    """Encode an array as zarr's `bytes` + `crc32c` codecs do."""
    import google_crc32c

    raw = values.tobytes()
    return [memoryview(raw), memoryview(int(google_crc32c.value(raw)).to_bytes(4, "little"))]
