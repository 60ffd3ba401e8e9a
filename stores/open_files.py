"""How many files the readers of this process hold open together.

Each reader keeps its own open files, which only its own thread uses while it reads. Their number is shared: before a
reader opens one more, files of readers that are idle, or its own, are closed until all fit into a part of the limit of
the process (`ulimit -n`). Locks are taken once a batch and once a file that is opened, never once a row.
"""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
OTHERS = 64
"""Descriptors at least that are left to the rest of the process: libraries, pipes, sockets, the files of a run."""
MOST = 1 << 16


def budget() -> int:
    """Return how many files all readers of this process may hold open, by its limit as it is now."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = MOST if limit == resource.RLIM_INFINITY else min(limit, MOST)
    return max(limit - max(OTHERS, limit // 4), limit // 4)


class OpenFiles(Generic[K]):
    """The open files of one reader by a key, at most `most`, least recently opened first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.descriptors: OrderedDict[K, int] = OrderedDict()
        self._busy = threading.RLock()
        with _OPENING:
            _ALL.add(self)

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.descriptors)

    def in_use(self) -> AbstractContextManager[bool]:
        """Return a context in which no other reader closes these files: descriptors are used within."""
        return self._busy

    def get(self, key: K, opened: Callable[[K], int]) -> int:
        """Return the descriptor of a file, opened by `opened(key)` where it is not open. Within `in_use`."""
        descriptor = self.descriptors.get(key)
        if descriptor is None:
            self._take_place(key)
            try:
                descriptor = self.descriptors[key] = opened(key)
            except BaseException:
                del self.descriptors[key]
                raise
        return descriptor

    def close(self) -> None:
        """Close all files."""
        with self._busy:
            while self.descriptors:
                self._close_oldest()

    def _take_place(self, key: K) -> None:
        """Count a file from here on; it is opened afterwards, without the lock, because disks may be slow."""
        if len(self.descriptors) >= self.most:  # one for one: the number of all files stays
            self.descriptors[key] = -1
            self._close_oldest()
            return
        with _OPENING:
            self._make_room()
            self.descriptors[key] = -1

    def _make_room(self) -> None:
        most, readers = budget(), list(_ALL)
        count = sum(map(len, readers))
        while count >= most:
            # The reader with the most files gives first; none waits for one that is reading.
            for reader in sorted(readers, key=len, reverse=True):
                if len(reader) and reader._busy.acquire(blocking=False):
                    try:
                        reader._close_oldest()
                    finally:
                        reader._busy.release()
                    count -= 1
                    break
            else:  # every other reader is at work: one file a thread more than the budget
                return

    def _close_oldest(self) -> None:
        os.close(self.descriptors.popitem(last=False)[1])


_ALL: weakref.WeakSet[OpenFiles[Any]] = weakref.WeakSet()
_OPENING = threading.Lock()
"""Held while a file is counted, so that two readers do not both take the last place."""
os.register_at_fork(before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_OPENING.release)
