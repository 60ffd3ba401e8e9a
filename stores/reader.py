"""Reading rows of one feature straight from the shards into memory that the caller owns.

The shard indices (or HDF5's chunk indices) become one table of byte offsets; a batch is sorted into runs of
neighbouring rows; each run is one `preadv` that scatters rows into the output and their checksums into a scratch
buffer. No codec layer, no allocation per row: a warm read costs about what copying the same rows in memory costs
(benchmarks/read_windows.py).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.below import HeldFolder
from vla.stores.commits import Commit
from vla.stores.errors import CorruptionError, StoreError
from vla.stores.filesystem import digest_open, explaining
from vla.stores.formats.base import RowTable
from vla.stores.formats.registry import format_of
from vla.stores.manifest import Manifest
from vla.stores.open_files import OpenFiles
from vla.stores.shard import CRC_BYTES

Verify = Literal["first", "always", "never"]
MAX_OPEN_FILES = 128
"""Files of one reader: more save little, because the kernel finds a file by its name in microseconds."""

MAX_RUN = 512
"""Rows a single `preadv`: two buffers a row, and the kernel takes at most 1024 (IOV_MAX)."""


class FeatureReader:
    """Rows of one feature. One reader a thread; it does not survive `fork` (checked) and is not pickled.

    `verify`: compare each row's crc32c with the commit the first time it is read (`first`), on every read (`always`),
    or not at all (`never`). `held`: the folder as it was when the store was opened. A file that is opened again after
    others took its place among the open ones is compared with the commit whole if it is not the file of the first time.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        commits: dict[int, Commit],
        name: str,
        verify: Verify,
        held: HeldFolder | None = None,
    ) -> None:
        self.root, self.name, self.info = root, name, manifest.features[name]
        self._manifest, self._commits, self._verify = manifest, commits, verify
        self._format = format_of(manifest)
        self._row_bytes, self._stored = self.info.row_bytes, self.info.stored
        # Zeros, which the kernel hands out untouched: opening a store of 10^8 rows costs no memory until they are read.
        self._located = np.zeros(manifest.units, bool)
        self._offsets = np.zeros(manifest.rows, np.int64)  # -1: no such row; valid where its unit is located
        self._crcs = np.zeros(manifest.rows, np.uint32)
        self._verified = np.zeros(manifest.rows, bool)
        self._seen = np.zeros((manifest.units, 2), np.uint64)  # inode and time of change of each file that was opened
        self.files = OpenFiles[int](MAX_OPEN_FILES)
        self._descriptors = self.files.descriptors
        self._held = held or HeldFolder(root)
        self._scratch = memoryview(bytearray(CRC_BYTES))
        self._pid = os.getpid()

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill `out` [n, *shape] (C-contiguous, the feature's stored dtype) with the given store rows [n].

        Raises `StoreError` for rows that are not committed, `CorruptionError` where bytes differ from the commit.
        """
        info = self.info
        if out.shape != (len(rows), *info.shape) or out.dtype != self._stored or not out.flags.c_contiguous:
            wanted = f"{self._stored} {(len(rows), *info.shape)}"
            raise ValueError(f"out is {out.dtype} {out.shape}, not contiguous {wanted}")
        if len(rows) == 0:
            return
        with explaining(self.root), self.files.in_use():
            self._read(rows, out)

    def _read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        units = rows // self._manifest.unit_rows
        offsets = self._locate(rows, units)
        stride = self._row_bytes + CRC_BYTES
        follows = (np.diff(offsets) == stride) & (np.diff(units) == 0)
        starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(rows)]
        target = out.reshape(-1).view(np.uint8).data
        positions, which = offsets.tolist(), units.tolist()
        for first, last in itertools.pairwise(starts):
            for at in range(first, last, MAX_RUN):
                self._read_run(which[at], positions[at], target, at, min(at + MAX_RUN, last))
        if self._verify != "never":
            self._check(rows, out.reshape(len(rows), -1).view(np.uint8))

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield (file descriptor, offset, bytes) of each run of rows [n], ascending. Raises as `read` does.

        A descriptor is the reader's and may be closed with the next one.
        """
        with explaining(self.root), self.files.in_use():
            units = rows // self._manifest.unit_rows
            offsets = self._locate(rows, units)
            stride = self._row_bytes + CRC_BYTES
            ends = np.flatnonzero((np.diff(offsets) != stride) | (np.diff(units) != 0))
            for first, last in zip([0, *(ends + 1).tolist()], [*ends.tolist(), len(rows) - 1], strict=True):
                yield self._open(int(units[first])), int(offsets[first]), int(last - first + 1) * stride

    def close(self) -> None:
        """Close all files."""
        self.files.close()

    def _locate(self, rows: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
        if int(rows.min()) < 0 or int(rows.max()) >= self._manifest.rows:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {self._manifest.rows}")
        located = self._located[units]
        if not located.all():
            for unit in np.unique(units[~located]).tolist():
                self._read_index(unit)
        offsets = self._offsets[rows]
        if (offsets < 0).any():
            raise StoreError(f"row {int(rows[(offsets < 0).argmax()])} of {self.root} was left out when it was made")
        return offsets

    def _read_index(self, unit: int) -> None:
        commit = self._commits.get(unit)
        if commit is None:
            raise StoreError(f"unit {unit} of {self.root} is not committed", fix="vla featurize … --resume")
        rows = self._manifest.unit_range(unit)
        size = commit.files[self._file(unit)].size
        descriptor = self._open(unit)
        found = os.fstat(descriptor).st_size
        if found != size:
            raise self._corrupt(unit, f"has {found} bytes, {size} were committed")
        table = self._format.locate(self.root, self._manifest, commit, self.name, descriptor)
        crcs = self._format.read_part(self.root, self._manifest, commit, f"checksums/{self.name}")
        self._keep_table(rows, table)
        self._crcs[rows.start : rows.stop] = crcs
        self._located[unit] = True

    def _keep_table(self, rows: range, table: RowTable) -> None:
        self._offsets[rows.start : rows.stop] = table.offsets

    def _open(self, unit: int) -> int:
        if os.getpid() != self._pid:
            raise RuntimeError("a store reader was carried over fork(); open the store in the child process instead")
        descriptor = self._descriptors.get(unit)
        return self.files.get(unit, self._open_file) if descriptor is None else descriptor

    def _open_file(self, unit: int) -> int:
        seen = self._seen[unit].tolist()
        if seen != [0, 0]:
            descriptor = self._held.open_again(self._file(unit), *seen)
            if descriptor is not None:
                return descriptor
        try:
            descriptor = self._held.open(self._file(unit))
        except CorruptionError as error:
            raise CorruptionError(f"feature {self.name!r}, unit {unit}: {error.found}", fix=error.fix) from None
        try:
            self._require_committed(unit, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_committed(self, unit: int, descriptor: int) -> None:
        """Compare a file with its commit where another one was read for this unit before.

        Rows that were verified once are not verified again, and the index is not read again.
        """
        status = os.fstat(descriptor)
        if self._seen[unit].any():
            record = self._commits[unit].files[self._file(unit)]
            if status.st_size != record.size or digest_open(descriptor) != record.sha256:
                raise self._corrupt(unit, "was replaced while it was being read, and differs from its commit")
        self._seen[unit] = status.st_ino, status.st_ctime_ns

    def _read_run(self, unit: int, offset: int, target: memoryview, first: int, last: int) -> None:
        size = self._row_bytes
        descriptor = self._open(unit)
        if last - first == 1:  # by far the most common run of a shuffled batch
            buffers = [target[first * size : last * size]]
        else:
            buffers = []
            for row in range(first, last):
                buffers += (target[row * size : (row + 1) * size], self._scratch)
            buffers.pop()
        wanted = (last - first) * (size + CRC_BYTES) - CRC_BYTES
        done = os.preadv(descriptor, buffers, offset)
        while done < wanted:  # a signal or a 2 GiB limit may cut a read short
            rest = _skip(buffers, done)
            more = os.preadv(descriptor, rest, offset + done)
            if more == 0:
                raise self._corrupt(unit, "ends before its index says")
            done += more

    def _check(self, rows: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        todo = np.arange(len(rows)) if self._verify == "always" else np.flatnonzero(~self._verified[rows])
        if not len(todo):
            return
        expected = self._crcs[rows].tolist()
        value = google_crc32c.value
        for index in todo.tolist():
            if value(data[index]) != expected[index]:
                row = int(rows[index])
                raise self._corrupt(row // self._manifest.unit_rows, f"differs from its commit in row {row}")
        self._verified[rows[todo]] = True

    def _file(self, unit: int) -> str:
        return self._format.feature_file(self._manifest, self.name, unit)

    def _corrupt(self, unit: int, what: str) -> CorruptionError:
        path = self.root / self._file(unit)
        return CorruptionError(f"feature {self.name!r}, unit {unit}: {path} {what}", fix=f"vla verify {self.root}")


def _skip(buffers: list[memoryview], done: int) -> list[memoryview]:
    """Return the buffers that remain when `done` bytes have been filled."""
    rest = []
    for buffer in buffers:
        if done >= buffer.nbytes:
            done -= buffer.nbytes
        else:
            rest.append(buffer[done:])
            done = 0
    return rest
