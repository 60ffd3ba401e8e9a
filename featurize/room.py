"""Whether there is room for a store: bytes, inodes, and no more files than a file system handles well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vla.featurize.plan import Plan
from vla.stores.commits import committed_units
from vla.stores.errors import MachineError, UsageError

MANY_FILES = 1_000_000
"""More files than this are slow to list, copy and delete anywhere, and above what many quotas allow."""


def require_room(plan: Plan, out: Path, *, overwrite: bool = False, accept: bool = False) -> None:
    """Compare what is still to be written with the disk. `accept` (--yes): the user knows better.

    With `overwrite` that is all of it, and there is the room of the old store, which goes before the new one begins.

    Raises `MachineError` where there is too little space or there are too few inodes, `UsageError` for too many files.
    """
    if accept:
        return
    done = set() if overwrite else committed_units(out)
    share = max(1 - len(done) / plan.manifest.units, 0.0)
    needed, files = plan.bytes * share, int(plan.files * share)
    existing = next(path for path in (out, *out.resolve().parents) if path.exists())
    free, inodes = shutil.disk_usage(existing).free, os.statvfs(existing).f_favail
    without = ""
    if overwrite and out.exists():
        old_bytes, old_files = _freed(out)
        free, inodes, without = free + old_bytes, inodes and inodes + old_files, " without the old store"
    if needed > free:
        raise MachineError(
            f"{existing} has {free / 2**30:.1f} GiB free{without}",
            expected=f"{needed / 2**30:.1f} GiB for {plan.manifest.rows} frames",
            fix="another --out, fewer cameras, a smaller feature (see `vla backbones`), or --yes",
        )
    if 0 < inodes < files:  # 0: a file system that does not count them
        fix = "--set store.unit_mb=256, or --yes"
        raise MachineError(f"{existing} has room for {inodes} more files{without}", expected=f"{files}", fix=fix)
    if files > MANY_FILES:
        fix = "--set store.unit_mb=256, --format h5, or --yes"
        raise UsageError(f"{files} files", expected=f"at most {MANY_FILES}", fix=fix)


def _freed(folder: Path) -> tuple[int, int]:
    """Return the bytes and the files that deleting a folder gives back: what is linked elsewhere too, gives nothing."""
    held = [(Path(at) / name).lstat() for at, _, names in os.walk(folder) for name in names]
    # st_blocks counts 512 bytes each, whatever the disk's blocks are.
    alone = [file.st_blocks * 512 for file in held if file.st_nlink == 1]
    return sum(alone), len(alone)
