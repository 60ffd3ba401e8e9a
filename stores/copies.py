"""Reading augmented copies: which copy of a row is wanted is part of its address.

A place is row + copy * rows: a store with K copies is addressed like one of (K + 1) * rows rows, and all that works on
rows (announcing them to the kernel, reading, scales) works on places. Places that are sorted by copy cost one call an
array.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla.stores.reader import MAX_OPEN_FILES


class RowReader(Protocol):
    """A reader by rows or by places; see `FeatureReader` and `JoinedReader`."""

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill `out` [n, *shape] with rows [n]."""
        ...

    def scales(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return what int8 rows [n] are to be multiplied with, float32 [n, C]; None for other dtypes."""
        ...

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield (file descriptor, offset, bytes) of rows [n], ascending."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


class ArrayReader(RowReader, Protocol):
    """A reader of one array, whose open files can be limited."""

    def limit_files(self, count: int) -> None:
        """Hold at most `count` files open."""
        ...


class PlaceReader:
    """The arrays of one feature, plain and copies, addressed by places of a store of `rows` rows.

    A feature without copies has one array, which serves every copy.
    """

    def __init__(self, readers: Sequence[ArrayReader], rows: int) -> None:
        self._readers, self._rows = tuple(readers), rows
        for reader in self._readers:  # together as many as the one array of a feature without copies
            reader.limit_files(max(MAX_OPEN_FILES // len(self._readers), 1))

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill `out` [n, *shape] with the given places [n]. Raises as `FeatureReader.read` does."""
        for reader, part, found in self._runs(rows):
            reader.read(found, out[part])

    def scales(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return what int8 values at places [n] are to be multiplied with, float32 [n, C]; None for other dtypes."""
        known = [part for reader, _, found in self._runs(rows) if (part := reader.scales(found)) is not None]
        return np.concatenate(known) if known else None

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """See `FeatureReader.extents`, for places."""
        for reader, _, found in self._runs(rows):
            yield from reader.extents(np.unique(found))

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()

    def _runs(self, places: NDArray[np.int64]) -> Iterator[tuple[ArrayReader, slice, NDArray[np.int64]]]:
        """Yield (reader, where among the places, rows) of each run of places of one array."""
        if not len(places):
            return
        copies, rows = np.divmod(places, self._rows)
        if len(self._readers) == 1:
            copies[:] = 0
        ends = [0, *(np.flatnonzero(np.diff(copies)) + 1).tolist(), len(places)]
        for first, last in itertools.pairwise(ends):
            yield self._readers[int(copies[first])], slice(first, last), rows[first:last]
