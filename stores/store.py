"""Opening a store: what is committed, as episodes, steps, statistics and feature rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.below import HeldFolder
from vla.stores.commits import Commit, read_commits
from vla.stores.compressed import CompressedReader
from vla.stores.dtypes import WIDENING, Rounding
from vla.stores.errors import CorruptionError, StoreError, UsageError
from vla.stores.filesystem import explaining
from vla.stores.fingerprint import digest, digest_array
from vla.stores.formats.registry import format_of
from vla.stores.manifest import FeatureInfo, Manifest, copy_name
from vla.stores.metadata import check_arrays, read_manifest, read_tables
from vla.stores.reader import FeatureReader, Verify
from vla.stores.remote.options import RemoteOptions, is_url, require_folder
from vla.stores.settings import nearest
from vla.stores.statistics import ChannelStatistics
from vla.stores.tables import EpisodeTable
from vla.stores.untrusted import is_backed

READER_BYTES = 21
"""Memory of a reader for each row: offset and size 8 each, checksum 4, one flag."""


@dataclass(frozen=True)
class Store:
    """A committed view of a store on disk. Immutable: units committed after opening are not seen.

    `usable` (bool [E]) marks the episodes all of whose rows are committed and that were not left out. Of a
    remote store, `root` is its folder in the cache, `url` where it is, and `remote_reader` makes its readers. `held`
    is the folder as it was when it was opened: readers refuse another one under its name.
    """

    root: Path
    manifest: Manifest
    episodes: EpisodeTable
    commits: dict[int, Commit]
    usable: NDArray[np.bool_]
    skipped: dict[str, str]
    url: str = ""
    remote_reader: Callable[[Store, str, Verify], FeatureReader] | None = None
    held: HeldFolder | None = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where the store is: its folder or its URL."""
        return self.url or str(self.root)

    @property
    def complete(self) -> bool:
        """Whether every planned unit is committed."""
        return len(self.commits) == self.manifest.units

    @property
    def skipped_episodes(self) -> dict[str, str]:
        """{episode: reason} of all that were left out, when the store was planned and while it was filled."""
        return {**self.manifest.provenance.get("skipped_episodes", {}), **self.skipped}

    @cached_property
    def left_out(self) -> NDArray[np.bool_]:
        """Rows committed as absent, bool [rows].

        Each unit says for itself which episodes it leaves out: of one that is left out in another unit, its rows are
        committed like any other, though the episode is not usable.
        """
        self._require_committed(1)
        absent = np.zeros(self.manifest.rows, bool)
        for unit, commit in self.commits.items():
            rows = self.manifest.unit_range(unit)
            absent[rows.start : rows.stop] = self.episodes.rows_of(commit.skipped, rows)
        return absent

    def present_rows(self, unit: int) -> NDArray[np.int64]:
        """Return the rows that a committed unit holds, int64 [n]: all but those of episodes left out."""
        rows = self.manifest.unit_range(unit)
        return np.arange(rows.start, rows.stop)[~self.episodes.rows_of(self.commits[unit].skipped, rows)]

    def present_runs(self, unit: int) -> Iterator[NDArray[np.int64]]:
        """Yield the runs of neighbouring rows that a unit holds, int64 [n] each."""
        kept = self.present_rows(unit)
        if len(kept):
            yield from np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)

    def steps(self, name: str) -> NDArray[Any]:
        """Return a step array [rows, *shape] in memory. Rows of units that are not committed hold the fill value."""
        info = self.manifest.steps.get(name)
        if info is None:
            known = ", ".join(self.manifest.steps)
            hint = nearest(name, self.manifest.steps)
            raise UsageError(f"{self.place} has no steps {name!r}{hint}", expected=f"one of {known}")
        dtype = np.dtype(info.dtype)
        self._require_committed(dtype.itemsize * math.prod(info.shape))
        fill = np.nan if np.issubdtype(dtype, np.floating) else 0
        values = np.full((self.manifest.rows, *info.shape), fill, dtype)
        for unit, commit in self.commits.items():
            rows = self.manifest.unit_range(unit)
            part = format_of(self.manifest).read_part(self.root, self.manifest, commit, f"steps/{name}")
            values[rows.start : rows.stop] = part
        return values

    def statistics(self, feature: str) -> ChannelStatistics:
        """Return the statistics of a feature's channels over all rows that are committed and not `left_out`."""
        channels = self.feature_info(feature).shape[-1]
        total = ChannelStatistics.empty(channels)
        for unit in sorted(self.commits):
            total = total.merge(self.unit_statistics(feature, unit))
        return total

    def unit_statistics(self, feature: str, unit: int) -> ChannelStatistics:
        """Return the statistics of a feature's channels over the rows of one committed unit."""
        part = format_of(self.manifest).read_part(self.root, self.manifest, self.commits[unit], f"stats/{feature}")
        return ChannelStatistics.from_array(part)

    def content(self) -> str:
        """Return a digest of the committed features, by their statistics: equal in every form of the same store.

        The fingerprint says how features were computed; this says which ones were.
        """
        return digest({name: digest_array(self.statistics(name).to_array()) for name in self.manifest.features})

    def scales(self, feature: str) -> NDArray[np.float32] | None:
        """Return the scales of an int8 feature, float32 [units, C]; 0 in units not committed. None for other dtypes."""
        info = self.feature_info(feature)
        if info.dtype != "int8":
            return None
        scales = np.zeros((self.manifest.units, info.shape[-1]), np.float32)
        for unit, commit in self.commits.items():
            scales[unit] = format_of(self.manifest).read_part(self.root, self.manifest, commit, f"scales/{feature}")
        return scales

    def live_scales(self, feature: str) -> NDArray[np.float32] | None:
        """Return the int8 grid of live features, float32 [C]: the coarsest of the units'. None for other dtypes.

        But at most `WIDENING` times their median, of the units where the channel is not 0: one wide unit does not
        coarsen what a policy sees for ever.
        """
        scales = self.scales(feature)
        if scales is None:
            return None
        used = np.ma.masked_equal(scales, 0.0)
        middle = np.ma.filled(np.ma.median(used, axis=0), 0.0).astype(np.float32)  # type: ignore[no-untyped-call]
        grid: NDArray[np.float32] = np.minimum(scales.max(axis=0), np.float32(WIDENING) * middle)
        return grid

    def rounding(self, feature: str) -> Rounding | None:
        """Return what int8 cost a feature and its augmented copies; None where no unit has it recorded.

        Error and saturation are means over the units that have it recorded; `erased` is that of the worst unit.
        """
        names = [feature, *(copy_name(feature, number) for number in range(1, self.manifest.copies + 1))]
        commits = self.commits.values()
        units = [commit.rounding[name] for name in names for commit in commits if name in commit.rounding]
        if not units:
            return None
        return Rounding(
            sum(unit.error for unit in units) / len(units),
            sum(unit.saturated for unit in units) / len(units),
            max((unit.erased for unit in units if unit.erased is not None), default=None),
        )

    def reader(self, feature: str, verify: Verify = "first") -> FeatureReader:
        """Return a reader of one feature; one a thread."""
        self.feature_info(feature)
        self._require_committed(READER_BYTES)
        if self.remote_reader is not None:
            return self.remote_reader(self, feature, verify)
        kind = FeatureReader if self.manifest.compression == "none" else CompressedReader
        return kind(self.root, self.manifest, self.commits, feature, verify, self.held)

    def read(self, feature: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows of a feature [n, *shape] as they are stored, in new memory, verified. For loops, use `reader`."""
        info = self.feature_info(feature)
        out = np.empty((len(rows), *info.shape), info.stored)
        reader = self.reader(feature, "always")
        try:
            reader.read(np.asarray(rows, np.int64), out)
        finally:
            reader.close()
        return out

    def _require_committed(self, row_bytes: int) -> None:
        """Raise `StoreError` where the committed units do not account for `row_bytes` of memory for every row."""
        rows = self.manifest.rows
        committed = sum(len(self.manifest.unit_range(unit)) for unit in self.commits)
        if not is_backed(rows * row_bytes, committed * row_bytes):
            found = f"{self.place} declares {rows} rows and has {committed} of them"
            raise StoreError(found, expected="enough units to read", fix=f"vla verify {self.place}")

    def feature_info(self, feature: str) -> FeatureInfo:
        """Return the `FeatureInfo` of a feature. Raises `UsageError` naming those that exist."""
        info = self.manifest.features.get(feature)
        if info is None:
            known = ", ".join(self.manifest.features)
            hint = nearest(feature, self.manifest.features)
            raise UsageError(f"{self.place} has no feature {feature!r}{hint}", expected=f"one of {known}")
        return info


def open_store(
    root: Path | str,
    *,
    allow_partial: bool = False,
    remote: RemoteOptions = RemoteOptions(),  # noqa: B008 - frozen
) -> Store:
    """Open the store at `root`: a folder, or a URL such as `s3://bucket/prefix`, read as `remote` says.

    Raises `StoreError` where there is none, or where units are missing and `allow_partial` is not set (features that
    were never computed must not go unnoticed), `CorruptionError` where metadata or records do not match.
    """
    if is_url(root):
        from vla.stores.remote.mirror import open_remote

        return open_remote(str(root), remote, allow_partial=allow_partial)
    root = require_folder(root)
    with explaining(root):
        return _open(root, allow_partial)


def open_damaged(root: Path) -> tuple[Store, dict[Path, CorruptionError]]:
    """Open what is sound of a store, and return with it the commit records that lie; their units count as absent.

    Raises like `open_store` where the manifest, the metadata of an array or the tables are damaged.
    """
    lying: dict[Path, CorruptionError] = {}
    with explaining(root):
        return _open(root, True, lying), lying


def _open(root: Path, allow_partial: bool, lying: dict[Path, CorruptionError] | None = None) -> Store:
    held = HeldFolder(root) if root.is_dir() else None
    manifest = read_manifest(root)
    check_arrays(root, manifest)
    episodes = read_tables(root, manifest)
    _check_tables(root, manifest, episodes)
    commits = read_commits(root, manifest, lying)
    skipped = {name: reason for commit in commits.values() for name, reason in commit.skipped.items()}
    if len(commits) < manifest.units and not allow_partial:
        raise StoreError(
            f"{root} has {len(commits)} of {manifest.units} units",
            expected="a complete store",
            fix="the same `vla featurize` command with --resume; to train without: --set data.allow_partial=true",
        )
    committed = np.asarray(sorted(commits), np.int64)
    first = episodes.row_start // manifest.unit_rows
    last = (episodes.row_start + episodes.length - 1) // manifest.unit_rows
    usable = np.searchsorted(committed, last + 1) - np.searchsorted(committed, first) == last - first + 1
    if skipped:
        usable &= ~np.isin(np.asarray(episodes.ids), np.asarray(list(skipped)))
    if held is not None:
        held.require_in_place()
    return Store(root, manifest, episodes, commits, usable, skipped, held=held)


def _check_tables(root: Path, manifest: Manifest, episodes: EpisodeTable) -> None:
    ends = episodes.row_start + episodes.length
    counts = {len(episodes.ids), len(ends), len(episodes.task)}
    bad = (
        len(counts) > 1
        or (episodes.length < 1).any()
        or (episodes.row_start < 0).any()
        or int(ends.max()) != manifest.rows
        or len(set(episodes.ids)) < len(episodes.ids)
    )
    # Episodes lie end to end: one that overlaps another would read its frames.
    order = np.argsort(episodes.row_start, kind="stable") if not bad else np.zeros(0, np.int64)
    bad = bad or not np.array_equal(episodes.row_start[order], np.r_[0, ends[order][:-1]])
    bad = bad or not _in_range(episodes.task, len(episodes.tasks))
    if episodes.labels:
        bad = bad or len(episodes.label) != len(episodes) or not _in_range(episodes.label, len(episodes.labels))
    if bad:
        raise CorruptionError(f"{root}: the episode table does not fit the manifest", fix=f"vla verify {root}")


def _in_range(index: NDArray[np.int64], count: int) -> bool:
    return bool(((index >= 0) & (index < count)).all())
