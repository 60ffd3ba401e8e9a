"""Readers of remote stores: the local ones, with the blocks that they are about to read held on disk.

Whatever `verify` says but "never", every read compares every row: a block may be dropped and fetched again between two
reads, and what has arrived and what the cache holds are both compared only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.commits import Commit
from vla.stores.compressed import CompressedReader
from vla.stores.errors import CorruptionError
from vla.stores.manifest import Manifest
from vla.stores.reader import FeatureReader, Verify
from vla.stores.remote.blocks import BlockCache, Shard
from vla.stores.remote.bucket import Bucket
from vla.stores.remote.naming import named
from vla.stores.shard import CRC_BYTES, index_bytes
from vla.stores.store import Store


class RemoteReader(FeatureReader):
    """A `FeatureReader` of the sparse files in the cache; raises `MachineError` where blocks cannot be fetched."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        commits: dict[int, Commit],
        name: str,
        verify: Verify,
        blocks: BlockCache,
    ) -> None:
        super().__init__(root, manifest, commits, name, "never" if verify == "never" else "always")
        self._blocks = blocks

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """See `FeatureReader.read`. Rows that are damaged are fetched once more before `CorruptionError` is raised."""
        with named(self._blocks.url, self.root):
            super().read(rows, out)

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield nothing: the kernel cannot read ahead what is not on this disk."""
        del rows
        return iter(())

    def close(self) -> None:
        """Close all files and end the threads that fetch."""
        super().close()
        self._blocks.close()

    def _read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        self._blocks.begin()
        try:
            self._read_held(rows, out)
        except CorruptionError:
            # Of the way, of this cache, or of the bucket: only fresh bytes can tell.
            self._blocks.drop_used()
            self._located[rows // self._manifest.unit_rows] = False
            try:
                self._read_held(rows, out)
            except CorruptionError as error:
                raise CorruptionError(f"{error.found} (fetched twice)", fix=f"vla verify {self._blocks.url}") from None

    def _read_held(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        units = rows // self._manifest.unit_rows
        offsets, sizes = self._locate(rows, units), self._stored_sizes(rows)
        wanted = {}
        for unit in np.unique(units).tolist():
            of_unit = units == unit
            wanted[self._file(unit)] = (offsets[of_unit], sizes[of_unit])
        with self._blocks.holding(wanted):
            super()._read(rows, out)

    def _read_index(self, unit: int) -> None:
        commit = self._commits.get(unit)
        if commit is None:  # said by the reader below
            super()._read_index(unit)
            return
        path, size = self._file(unit), index_bytes(self._manifest.unit_rows)
        start = commit.files[path].size - size
        with self._blocks.holding({path: (np.array([start]), np.array([size]))}):
            super()._read_index(unit)

    def _require_committed(self, unit: int, descriptor: int) -> None:
        """Remember and compare nothing: a file of the cache changes with each block, and every read compares rows."""

    def _stored_sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(rows), self._row_bytes + CRC_BYTES)


class RemoteArchiveReader(RemoteReader, CompressedReader):
    """The same of rows that vary in size."""

    def _stored_sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._sizes[rows]


def readers_of(
    bucket: Bucket, folder: Path, shards: Mapping[str, Shard]
) -> Callable[[Store, str, Verify], FeatureReader]:
    """Return what makes the readers of one remote store, whose files are in the cache's `folder`."""

    def reader(store: Store, feature: str, verify: Verify) -> FeatureReader:
        kind = RemoteReader if store.manifest.compression == "none" else RemoteArchiveReader
        blocks = BlockCache(bucket, folder, shards)
        return kind(store.root, store.manifest, store.commits, feature, verify, blocks)

    return reader
