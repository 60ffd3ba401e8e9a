"""Emptying the page cache of our own files, and looking whether it is empty. Linux only; needs no privilege."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def drop(files: Iterable[Path]) -> None:
    """Make the files durable and take their pages out of the cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(files: Iterable[Path]) -> float:
    """Return which share of the files' pages is in the cache, by mincore(2)."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    pages = inside = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
            start = np.frombuffer(mapped, np.uint8)
            state = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            address = ctypes.c_void_p(start.ctypes.data)
            if mincore(address, ctypes.c_size_t(size), state.ctypes.data_as(ctypes.c_char_p)):
                raise OSError(ctypes.get_errno(), f"mincore of {file}")
            del start
        pages, inside = pages + len(state), inside + int((state & 1).sum())
    return inside / pages
