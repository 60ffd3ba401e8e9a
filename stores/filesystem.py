"""Every write that a store makes, in one place: whole files, durable before they get their name.

A file is written under a temporary name in its own folder, fsynced, renamed, and the folder fsynced. Whatever
bears the temporary suffix is debris of an interrupted run and may be deleted by the one writer of the store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vla.stores.below import require_no_link
from vla.stores.errors import MachineError, StoreError, UsageError
from vla.stores.layout import LOCK

PARTIAL = ".partial"
"""Suffix of files and folders that are being written."""

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free space, then run the same command with --resume"),
    errno.EDQUOT: ("the disk quota is used up", "free space, then run the same command with --resume"),
    errno.EACCES: ("permission is denied", "choose another --out, or change the folder's permissions"),
    errno.EROFS: ("the file system is read-only", "choose another --out"),
    errno.EMFILE: ("too many files are open", "raise the limit with `ulimit -n 4096`"),
    errno.EFBIG: ("the file is larger than this process or file system is allowed", "`ulimit -f unlimited`"),
    errno.ELOOP: ("a symbolic link is in the way", "remove the link"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, then run with --resume"),
}

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""NFS without a lock daemon, FUSE without locks, Lustre without `-o flock`."""


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn an `OSError` while working on `path` into a one-line `MachineError` that says what to do."""
    try:
        yield
    except OSError as error:
        cause, fix = _CAUSES.get(error.errno or 0, (str(error.strerror or error), ""))
        raise MachineError(f"{error.filename or path}: {cause}", fix=fix) from error


def refuse_file(path: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` where there is a file at `path` and `overwrite` is not set, and for anything but a file."""
    if path.is_symlink():  # a video would be written where the link leads
        raise UsageError(f"{path} is a symbolic link", fix="the file's own name")
    if path.exists() and not (overwrite and path.is_file()):
        fix = "--overwrite to replace it, or another name" if path.is_file() else "another name"
        raise UsageError(f"{path} exists{'' if path.is_file() else ' and is no file'}", fix=fix)


def write_atomic(path: Path, data: bytes | memoryview) -> str:
    """Write `data` to `path` so that the name never shows anything but the whole; return its SHA-256 (hex)."""
    return write_atomic_parts(path, [data])


def write_atomic_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Like `write_atomic` for data in several buffers."""
    partial = path.with_name(path.name + PARTIAL)
    digest = hashlib.sha256()
    with explaining(path):
        if partial.is_symlink():  # what the link leads to would be written over
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(partial))
        with partial.open("wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                digest.update(view)
                while view:  # an unbuffered write may be short
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_dir(path.parent)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make a freshly written folder durable: every file and every folder in it."""
    for folder, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(Path(folder))


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_open(descriptor: int) -> str:
    """SHA-256 (hex) of the content of an open file, which stays open."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def translate_lock_errors(path: Path, fix: str = "another --out, on a local disk") -> Iterator[None]:
    """Raise `MachineError` where the file system of `path` grants no locks; the error of a lock held by others passes.

    Going on without a lock would let two writers into a store.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        found = f"{path}: the file system grants no locks ({error.strerror})"
        raise MachineError(found, expected="NFS with rpc-statd, Lustre mounted with -o flock", fix=fix) from error


@contextmanager
def writer_lock(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the store's only writer place, or one of the places of writers that share it (shared_writer.py).

    Raises `StoreError` where another process holds it, or sharers do and this one does not share.

    The lock is the kernel's: it is gone with its process, however that one ended, and it follows the folder through a
    rename. On a file opened for writing, because NFS grants no exclusive lock on anything else (flock(2)).
    """
    file = root / LOCK
    require_no_link(root, LOCK)
    with explaining(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with explaining(file):
            try:
                with translate_lock_errors(file):
                    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                # Between opening and locking, the store may have been renamed away by the writer before.
                held = os.path.samestat(os.fstat(descriptor), file.stat())
            except (BlockingIOError, FileNotFoundError):
                held = False
        if not held:
            raise StoreError(f"{root} is being written by another process", expected="one writer a store")
        yield
    finally:
        os.close(descriptor)
