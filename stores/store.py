"""Opening a store: what is committed, as episodes, steps, statistics and feature rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.commits import Commit, read_commits
from vla.stores.errors import CorruptionError, StoreError, UsageError
from vla.stores.filesystem import explaining
from vla.stores.layout import statistics_file, step_file
from vla.stores.manifest import Manifest
from vla.stores.metadata import check_arrays, read_manifest, read_tables
from vla.stores.reader import Blocks, FeatureReader, Verify, read_committed
from vla.stores.remote.options import RemoteOptions, is_url
from vla.stores.settings import nearest
from vla.stores.shard import CRC_BYTES
from vla.stores.statistics import MOMENTS, ChannelStatistics
from vla.stores.tables import EpisodeTable


@dataclass(frozen=True)
class Store:
    """A committed view of a store on disk. Immutable: units committed after opening are not seen.

    `usable` (bool [E]) marks the episodes all of whose rows are committed and that were not left out. Of a remote
    store, `root` is its folder in the cache, and `remote` makes what fetches blocks for one reader.
    """

    root: Path
    manifest: Manifest
    episodes: EpisodeTable
    commits: dict[int, Commit]
    usable: NDArray[np.bool_]
    skipped: dict[str, str]
    remote: Callable[[], Blocks] | None = None

    @property
    def complete(self) -> bool:
        """Whether every planned unit is committed."""
        return len(self.commits) == self.manifest.units

    def steps(self, name: str) -> NDArray[Any]:
        """Return a step array [rows, *shape] in memory. Rows of units that are not committed hold the fill value."""
        info = self.manifest.steps.get(name)
        if info is None:
            known = ", ".join(self.manifest.steps)
            hint = nearest(name, self.manifest.steps)
            raise UsageError(f"{self.root} has no steps {name!r}{hint}", expected=f"one of {known}")
        dtype = np.dtype(info.dtype)
        fill = np.nan if np.issubdtype(dtype, np.floating) else 0
        values = np.full((self.manifest.rows, *info.shape), fill, dtype)
        for unit, commit in self.commits.items():
            rows = self.manifest.unit_range(unit)
            raw = read_committed(self.root, commit, step_file(name, unit, len(info.shape)))
            chunk = np.frombuffer(raw[:-CRC_BYTES], dtype.newbyteorder("<"))
            values[rows.start : rows.stop] = chunk.reshape(-1, *info.shape)[: len(rows)]
        return values

    def statistics(self, feature: str) -> ChannelStatistics:
        """Return the statistics of a feature's channels over all committed rows, merged from the commits."""
        channels = self.feature_info(feature).shape[-1]
        total = ChannelStatistics.empty(channels)
        for unit in sorted(self.commits):
            raw = read_committed(self.root, self.commits[unit], statistics_file(feature, unit))
            values = np.frombuffer(raw[:-CRC_BYTES], "<f8").reshape(len(MOMENTS), channels)
            total = total.merge(ChannelStatistics.from_array(values))
        return total

    def reader(self, feature: str, verify: Verify = "first") -> FeatureReader:
        """Return a reader of one feature; one a thread."""
        self.feature_info(feature)
        if self.remote is None:
            return FeatureReader(self.root, self.manifest, self.commits, feature, verify)
        # A block may be dropped and fetched again: rows that were right once are compared again.
        always: Verify = "always" if verify == "first" else verify
        return FeatureReader(self.root, self.manifest, self.commits, feature, always, self.remote())

    def read(self, feature: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows of a feature [n, *shape] in new memory, verified. For loops, use `reader`."""
        info = self.feature_info(feature)
        out = np.empty((len(rows), *info.shape), info.dtype)
        reader = self.reader(feature, "always")
        try:
            reader.read(np.asarray(rows, np.int64), out)
        finally:
            reader.close()
        return out

    def feature_info(self, feature: str) -> Any:
        """Return the `FeatureInfo` of a feature. Raises `UsageError` naming those that exist."""
        info = self.manifest.features.get(feature)
        if info is None:
            known = ", ".join(self.manifest.features)
            hint = nearest(feature, self.manifest.features)
            raise UsageError(f"{self.root} has no feature {feature!r}{hint}", expected=f"one of {known}")
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
    root = Path(root)
    with explaining(root):
        return _open(root, allow_partial)


def _open(root: Path, allow_partial: bool) -> Store:
    manifest = read_manifest(root)
    check_arrays(root, manifest)
    episodes = read_tables(root, manifest)
    _check_tables(root, manifest, episodes)
    commits = read_commits(root, manifest)
    skipped = {name: reason for commit in commits.values() for name, reason in commit.skipped.items()}
    if len(commits) < manifest.units and not allow_partial:
        raise StoreError(
            f"{root} has {len(commits)} of {manifest.units} units",
            expected="a complete store",
            fix="the same `vla featurize` command with --resume, or --allow-partial to use what is there",
        )
    committed = np.asarray(sorted(commits), np.int64)
    first = episodes.row_start // manifest.unit_rows
    last = (episodes.row_start + episodes.length - 1) // manifest.unit_rows
    usable = np.searchsorted(committed, last + 1) - np.searchsorted(committed, first) == last - first + 1
    if skipped:
        usable &= ~np.isin(np.asarray(episodes.ids), np.asarray(list(skipped)))
    return Store(root, manifest, episodes, commits, usable, skipped)


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
    if bad or (episodes.task < 0).any() or (episodes.task >= len(episodes.tasks)).any():
        raise CorruptionError(f"{root}: the episode table does not fit the manifest", fix=f"vla verify {root}")
