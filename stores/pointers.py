"""Git-LFS pointers: small text files in the place of a file whose content was never fetched.

One clone without `git lfs pull` leaves one in the place of every large file. The error is no `SourceError`, so that
no loop over episodes turns one cause into a finding for each episode.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from vla.stores.errors import PointerError

HEADS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
"""How a pointer begins (the Git-LFS specification, `docs/spec.md`); the second before Git-LFS had its name."""

MAX_BYTES = 1024
"""The specification's limit for a pointer; a larger file is content."""


def is_pointer(data: bytes) -> bool:
    """Return whether `data`, a whole file or its beginning, is a Git-LFS pointer."""
    return data.startswith(HEADS)


def refuse_pointer(file: Path) -> None:
    """Raise `PointerError` where a file is a Git-LFS pointer. For readers whose own reading of the file failed."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return
        with file.open("rb") as stream:
            found = is_pointer(stream.read(MAX_BYTES))
    except OSError:
        return  # the caller's own error describes an unreadable file
    if found:
        raise pointer_error(str(file), file.parent)


def pointer_error(where: str, folder: Path | None = None) -> PointerError:
    """Return the error for a pointer found at `where`, with the command that fetches the content."""
    command = "git lfs pull" if folder is None else f"git -C {shlex.quote(str(folder))} lfs pull"
    return PointerError(f"{where} is a Git-LFS pointer, not the file", expected="its content", fix=command)
