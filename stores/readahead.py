"""Telling the kernel what will be read, so that the disk works on many rows at a time while one thread reads.

A cold read waits for the disk once a row: one at a time, a disk gives about half of what it can. Announced a batch
ahead, rows are in the page cache, or on their way, when they are read (benchmarks/cold_reads.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 128 << 10
"""The kernel reads at most its read-ahead size for one piece of advice, 128 KiB by default (mm/readahead.c)."""


def advise(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to read a range of a file into the page cache. Returns at once; a no-op where there is none."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for at in range(offset, offset + size, CHUNK_BYTES):
        os.posix_fadvise(descriptor, at, min(CHUNK_BYTES, offset + size - at), os.POSIX_FADV_WILLNEED)


class Announcing(Protocol):
    """A reader that passes on which rows will be read."""

    def announce(self, rows: NDArray[np.int64]) -> None:
        """Begin to read store rows [n]."""
        ...


class Readahead:
    """Announces rows to the readers of one stream.

    `again`: announce rows each time (the store exceeds memory); otherwise only before their first reading, because
    afterwards they lie in the page cache and advice would be a system call for nothing.
    """

    def __init__(self, readers: Iterable[Announcing], rows: int, *, again: bool) -> None:
        self._readers = tuple(readers)
        self._announced = None if again else np.zeros(rows, bool)

    def announce(self, rows: NDArray[np.int64]) -> None:
        """Announce store rows, in any order and any number of times."""
        if self._announced is not None:
            rows = rows[~self._announced[rows]]
            self._announced[rows] = True
        if len(rows):
            rows = np.unique(rows)
            for reader in self._readers:
                reader.announce(rows)
