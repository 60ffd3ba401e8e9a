"""Telling the kernel what will be read, so that the disk works on many rows at a time while one thread reads.

A cold read waits for the disk once a row: one at a time, a disk gives about half of what it can. Announced a batch
ahead, rows are in the page cache, or on their way, when they are read (benchmarks/cold_reads.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla.stores.open_files import budget

CHUNK_BYTES = 128 << 10
"""The kernel reads at most its read-ahead size for one piece of advice, 128 KiB by default (mm/readahead.c)."""

THREADS = 4
"""Advice returns before the disk does, but not before the kernel has found memory for the pages: that takes longer than
copying them where a page is touched for the first time."""


class Located(Protocol):
    """A reader that says where rows lie."""

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield (file descriptor, offset, bytes) of rows [n], ascending."""
        ...


class Readahead:
    """Announces the rows of one stream; close it before the readers.

    `again`: announce rows each time (the store exceeds memory); otherwise only before their first reading, because
    afterwards they lie in the page cache and advice would be a system call for nothing.
    """

    def __init__(self, readers: Iterable[Located], rows: int, *, again: bool) -> None:
        self._readers = tuple(readers)
        self._announced = None if again else np.zeros(rows, bool)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="vla-readahead")
        # Each advice holds a descriptor of its own until the kernel has it.
        self._places = threading.BoundedSemaphore(max(budget() // 8, 1))
        self._begun: list[Future[None]] = []

    def announce(self, rows: NDArray[np.int64]) -> None:
        """Begin to read store rows, in any order and any number of times; raises what finding them raises.

        Waits until the advice of the call before has been given.
        """
        if self._announced is not None:
            rows = rows[~self._announced[rows]]
            self._announced[rows] = True
        if not hasattr(os, "posix_fadvise") or not len(rows):  # macOS has no such advice
            return
        rows = np.unique(rows)
        for advice in self._begun:
            advice.result()
        self._begun = []
        for reader in self._readers:
            for descriptor, offset, size in reader.extents(rows):
                self._places.acquire()
                # The reader may close its file at any time; the duplicate is the thread's.
                self._begun.append(self._threads.submit(self._advise, os.dup(descriptor), offset, size))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _advise(self, descriptor: int, offset: int, size: int) -> None:
        try:
            for at in range(offset, offset + size, CHUNK_BYTES):
                os.posix_fadvise(descriptor, at, min(CHUNK_BYTES, offset + size - at), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
            self._places.release()
