"""Writing a store: created whole, filled unit by unit, each unit committed or absent.

The order of one commit: every file of the unit under a temporary name, fsynced, renamed, its folder fsynced; then the
commit record in the same way. A crash anywhere leaves the units before as they were and this one absent; the next
writer sweeps the debris and computes the unit again. Committed units are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.below import require_no_link
from vla.stores.commits import Commit, FileRecord, read_commits
from vla.stores.errors import MachineError, StoreError, UsageError
from vla.stores.filesystem import PARTIAL, explaining, fsync_dir, fsync_tree, write_atomic_parts, writer_lock
from vla.stores.fingerprint import digest_array, require_equal
from vla.stores.formats.base import UnitContent
from vla.stores.formats.registry import format_of, unit_files
from vla.stores.layout import COMMITS, LOCK, commit_file, write_metadata
from vla.stores.manifest import Manifest
from vla.stores.metadata import check_arrays, read_manifest, read_tables, table_digests
from vla.stores.owned import STORE, delete_folder, doomed, remove_owned, require_debris, require_owned, sweep
from vla.stores.remote.options import require_folder
from vla.stores.tables import EpisodeTable
from vla.stores.unit_buffer import UnitBuffer, empty_value, unit_buffer


class StoreWriter:
    """The one writer of a store. Use `open_writer`, which holds the lock."""

    def __init__(self, root: Path | str, manifest: Manifest) -> None:
        root = Path(root)
        self.root, self.manifest = root, manifest
        self.commits = read_commits(root, manifest)

    def pending(self) -> list[int]:
        """Units of the plan that are not committed."""
        return [unit for unit in range(self.manifest.units) if unit not in self.commits]

    def claim(self, unit: int) -> bool:
        """Return whether a unit is this writer's to compute: any that is not committed, as it is the only writer."""
        return unit not in self.commits

    def begin(self, unit: int) -> UnitBuffer:
        """Allocate the buffers of a unit. Raises `StoreError` where it is committed already."""
        self._require_pending(unit)
        return unit_buffer(self.manifest, unit)

    def commit(self, buffer: UnitBuffer) -> Commit:
        """Make a filled unit durable and committed. Raises `MachineError` on a full disk and the like."""
        unit = buffer.unit
        self._require_pending(unit)
        self._require_whole(buffer)
        count = len(buffer.rows)
        parts: dict[str, NDArray[Any]] = {f"steps/{name}": values[:count] for name, values in buffer.steps.items()}
        shards, crcs, rounding = {}, {}, dict(buffer.rounding)
        for name, feature in buffer.features.items():
            moments = feature.finish(buffer.present)
            parts[f"stats/{name}"] = buffer.statistics.get(name, moments).to_array()
            shards[name], crcs[name] = feature.shard, feature.shard.checksums(buffer.present)
            parts[f"checksums/{name}"] = crcs[name]
            if feature.rounding is not None:
                rounding[name] = feature.rounding
            if feature.scales is not None:
                parts[f"scales/{name}"] = feature.scales
        files: dict[str, FileRecord] = {}
        form = format_of(self.manifest)
        content = UnitContent(unit, buffer.present, shards, crcs, parts)
        for path, data in form.encode(self.manifest, content):
            sha256 = write_atomic_parts(self.root / path, data)
            files[path] = FileRecord(sum(view.nbytes for view in data), sha256)
        digests = {part: digest_array(parts[part]) for part in form.digested_parts(self.manifest)}
        commit = Commit(unit, files, dict(buffer.skipped), digests, rounding)
        write_atomic_parts(self.root / commit_file(unit), [commit.to_bytes(self.manifest)])
        self.commits[unit] = commit
        return commit

    def _require_whole(self, buffer: UnitBuffer) -> None:
        """Blank what was left out. Raises `StoreError` where a row was neither computed nor left out."""
        kept = buffer.kept
        buffer.present &= kept
        for values in buffer.steps.values():
            values[: len(kept)][~kept] = empty_value(values.dtype)
        missing = np.flatnonzero(kept & ~buffer.present) + buffer.rows.start
        if len(missing):
            rows_missing = f"{missing[0]}..{missing[-1]}"
            raise StoreError(f"unit {buffer.unit} of {self.root} lacks rows {rows_missing}", expected="all rows")

    def _require_pending(self, unit: int) -> None:
        if unit in self.commits:
            raise StoreError(f"unit {unit} of {self.root} is committed", expected="a pending unit")


@contextmanager
def open_writer(
    root: Path | str, manifest: Manifest, episodes: EpisodeTable, *, resume: bool = False, overwrite: bool = False
) -> Iterator[StoreWriter]:
    """Create the store at `root`, or go on with it, and hold its writer lock.

    `manifest.tables` is filled in here. Raises `UsageError` where `root` exists and neither flag is given,
    `FingerprintError` where a resumed store was made with other settings, `StoreError` where another writer holds it.
    """
    root = Path(root)
    with explaining(require_folder(root)):
        root = root.resolve()  # behind a link, the store is made and replaced where it lies
        manifest = with_tables(manifest, episodes)
        begin_store(root, manifest, episodes, resume=resume, overwrite=overwrite)
    with writer_lock(root):
        with explaining(root):
            found = require_store(root, manifest)
            sweep(root, STORE)
            writer = StoreWriter(root, found)
        yield writer


def with_tables(manifest: Manifest, episodes: EpisodeTable) -> Manifest:
    """Return a planned manifest with the digests of its tables."""
    return manifest.model_copy(update={"tables": table_digests(episodes.to_arrays())})


def refuse_existing(root: Path | str, *, resume: bool, overwrite: bool) -> None:
    """Raise `UsageError` where there is something at `root` and neither flag is given, or a store at `root` holds
    what `overwrite` must not delete."""
    root = Path(root)
    if root.exists() and not (resume or overwrite):
        fix = "--resume to go on with it, --overwrite to replace it, or another --out"
        raise UsageError(f"{root} exists", fix=fix)
    if root.exists() and not resume and (root / "zarr.json").is_file():
        require_owned(root, STORE)


def require_store(root: Path, wanted: Manifest) -> Manifest:
    """Return the manifest of the store at `root`. Raises `FingerprintError` naming what differs from the one wanted."""
    found = read_manifest(root)
    _require_same(root, found, wanted)
    check_arrays(root, found)
    read_tables(root, found)
    for path in unit_files(found, 0):
        require_no_link(root, path.rpartition("/")[0])  # else units would be written where the link leads
    return found


def begin_store(
    root: Path, manifest: Manifest, episodes: EpisodeTable, *, resume: bool = False, overwrite: bool = False
) -> None:
    """See to it that there is a store at `root`: the one to resume, or a new one without units.

    Raises as `open_writer` does.
    """
    if root.name.endswith(PARTIAL):
        raise UsageError(f"{root} ends in {PARTIAL!r}", expected="another name; it marks unfinished files")
    manifest.require_sound(root)
    refuse_existing(root, resume=resume, overwrite=overwrite)
    if root.exists():
        read_manifest(root)
        if not overwrite:
            return
        _remove_store(root)
    _create(root, manifest, episodes)


def _create(root: Path, manifest: Manifest, episodes: EpisodeTable) -> None:
    """Make a store without units under a temporary name, and rename it. The lock keeps a second process out."""
    partial, old = root.with_name(root.name + PARTIAL), doomed(root)
    require_debris(old, STORE)
    with _unmade(root, partial):
        remove_owned(old, STORE)
        remove_owned(partial, STORE, keep=(COMMITS, LOCK))
        form = format_of(manifest)
        folders = form.folders if form.shared_files else ()
        write_metadata(partial, manifest, episodes.to_arrays(), form.arrays(manifest), folders)
        fsync_tree(partial)
        partial.rename(root)
        fsync_dir(root.parent)


@contextmanager
def _unmade(root: Path, partial: Path) -> Iterator[None]:
    """Hold the folder that becomes the store at `root`. Raises `StoreError` where another process has made that."""
    made = StoreError(f"{root} was made by another process just now", fix="--resume")
    with ExitStack() as held:
        try:
            require_debris(partial, STORE)
            (partial / COMMITS).mkdir(parents=True, exist_ok=True)
            held.enter_context(writer_lock(partial))
        except (OSError, MachineError):
            if root.exists():  # the other renamed the folder away between two of these lines
                raise made from None
            raise
        if root.exists():
            with suppress(OSError):  # a third process that comes too late may be at it
                remove_owned(partial, STORE)
            raise made
        yield


def _remove_store(root: Path) -> None:
    """Delete an existing store; its manifest has been read."""
    with writer_lock(root):
        delete_folder(root, STORE)


def _require_same(root: Path, found: Manifest, wanted: Manifest) -> None:
    fix = "the settings it was made with, --overwrite to replace it, or another --out"
    require_equal(found.fingerprint, wanted.fingerprint, what=str(root), fix=fix)
    plan = {"features", "steps", "rows", "unit_rows", "cameras", "fps", "tables"}
    forms = ({"format": of.format, "compression": of.compression} for of in (found, wanted))
    old, new = (of.model_dump(mode="json", include=plan) | next(forms) for of in (found, wanted))
    require_equal(old, new, what=f"the plan of {root}", fix=fix)
