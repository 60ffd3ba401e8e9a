"""Opening and removing what is below a folder, through no symbolic link.

A store is a closed folder: no link inside is followed, so no byte outside is read as the store's, or removed with the
store. Only the folder itself may be behind a link. Each component of a name is opened relative to the one before, which
costs one system call a component and leaves no moment in which a folder could become a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla.stores.errors import CorruptionError, StoreError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""`O_NONBLOCK`: opening a named pipe returns at once; regular files ignore the flag."""


class HeldFolder:
    """A folder that is held open, so that its inode number goes to no other folder.

    A path can become the path of another folder between two readings; `require_in_place` finds that out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, _FOLDER)
        self._status = os.fstat(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def require_in_place(self) -> None:
        """Raise `StoreError` where the path now leads to another folder, or to none."""
        try:
            same = os.path.samestat(self.path.stat(), self._status)
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise StoreError(
                f"{self.path} was replaced or moved while it was being read",
                expected="the store that was opened",
                fix="the same command once more, after the store is complete",
            )

    def open(self, name: str) -> int:
        """Return a descriptor of a file, as `open_below` does. Raises `StoreError` where the folder was replaced."""
        self.require_in_place()
        return _open(self._descriptor, self.path, name)

    def open_again(self, name: str, inode: int, changed_ns: int) -> int | None:
        """Return a descriptor of a file that was opened before, None where another file or none bears the name now.

        One system call for all components of the name: the file is the one that was reached through no link.
        """
        self.require_in_place()
        try:
            descriptor = os.open(name, _FILE, dir_fd=self._descriptor)
        except OSError:  # `open` says why
            return None
        status = os.fstat(descriptor)
        if (status.st_ino, status.st_ctime_ns) == (inode, changed_ns):
            return descriptor
        os.close(descriptor)
        return None

    def remove(self, name: str) -> bool:
        """Remove a file, an empty folder, or a link but never its target; return whether there was one."""
        *_, last = name.split("/")
        try:
            with _parent(self._descriptor, self.path, name) as parent:
                if stat.S_ISDIR(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode):
                    os.rmdir(last, dir_fd=parent)
                else:
                    os.unlink(last, dir_fd=parent)
        except (FileNotFoundError, CorruptionError):
            return False
        return True


def open_below(root: Path, name: str) -> int:
    """Return a descriptor, for reading, of the regular file `name` below `root`; the caller closes it.

    Raises `CorruptionError` naming what is missing, a link, or no regular file.
    """
    at = os.open(root, _FOLDER)
    try:
        return _open(at, root, name)
    finally:
        os.close(at)


def read_below(root: Path, name: str, most: int) -> bytes:
    """Return the bytes of a file below `root`. Raises `CorruptionError` for more than `most` bytes, before reading."""
    with os.fdopen(open_below(root, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CorruptionError(f"{root / name} has {size} bytes", expected=f"at most {most}")
        return file.read(size)


def link_below(root: Path, name: str) -> Path | None:
    """Return the first component of `name` below `root` that is a symbolic link; None where there is none."""
    path = root
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            return path
    return None


def require_no_link(root: Path, name: str) -> None:
    """Raise `StoreError` where a component of `name` below `root` is a symbolic link."""
    link = link_below(root, name)
    if link is not None:
        raise StoreError(f"{link} is a symbolic link", expected="no link inside a store", fix=f"rm {link}")


def _open(root: int, path: Path, name: str) -> int:
    *_, last = name.split("/")
    try:
        with _parent(root, path, name) as parent:
            descriptor = os.open(last, _FILE, dir_fd=parent)
    except OSError as error:
        raise _explained(error, path, name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptionError(f"{path / name} is no file", fix=f"vla verify {path}")
    return descriptor


@contextmanager
def _parent(root: int, path: Path, name: str) -> Iterator[int]:
    """Yield a descriptor of the folder that holds `name`. Raises `CorruptionError` where a component is a link."""
    *folders, _ = name.split("/")
    at = os.dup(root)
    try:
        for folder in folders:
            try:
                deeper = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            except OSError as error:
                raise _explained(error, path, name) from None
            os.close(at)
            at = deeper
        yield at
    finally:
        os.close(at)


def _explained(error: OSError, path: Path, name: str) -> Exception:
    """Return a `CorruptionError` for what the layout never has, and the error itself for all else."""
    if error.errno == errno.ENOENT:
        return CorruptionError(f"{path / name} is missing", fix=f"vla verify {path}")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR):
        link = link_below(path, name)
        found = f"{path / name} is no file" if link is None else f"{link} is a symbolic link"
        return CorruptionError(found, expected="no link inside a store", fix=f"vla verify {path}")
    error.filename = str(path / name)
    return error
