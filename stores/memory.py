"""How much memory there is, and keeping what was freed.

On a virtual machine the first touch of a page can cost more than computing what goes in it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

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


def memory_limit(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory, page cache included, that this process may have: the machine's or its cgroup's.

    The same at every call, unlike what happens to be free. `groups` and `mounted`: see cgroups(7); both versions.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = mounted / controllers
        folder = top / path.strip("/")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # A parent's limit binds as well. In a container, the path may be the host's and lie outside what is mounted.
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            file = place / name
            if file.is_file() and (text := file.read_text().strip()).isdigit():  # "max": no limit
                limits.append(int(text))
    return min(limits)
