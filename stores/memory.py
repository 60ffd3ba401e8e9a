"""Keeping freed memory: on a virtual machine the first touch of a page can cost more than computing what goes in it."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt(3)`."""


def keep_freed_memory() -> bool:
    """Tell the C allocator to reuse large freed blocks instead of returning them to the kernel.

    A network's activations are megabytes each; by default glibc maps and unmaps every one, and the kernel clears the
    pages anew (measured here: two thirds of EfficientNet-Lite0's time on a CPU). Costs: memory once used stays with the
    process. Returns whether the allocator took the settings (glibc only; a no-op elsewhere).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
