"""Reading a small committed file whole, compared with its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vla.stores.below import read_below
from vla.stores.errors import CorruptionError
from vla.stores.filesystem import explaining

if TYPE_CHECKING:
    from vla.stores.commits import Commit


def read_committed(root: Path, commit: Commit, path: str) -> bytes:
    """Return a small committed file after comparing it with its digest. Raises `CorruptionError`."""
    file, record = root / path, commit.files[path]
    with explaining(file):
        try:
            data = read_below(root, path, record.size)
        except CorruptionError as error:
            raise CorruptionError(f"unit {commit.unit}: {error.found}", fix=f"vla verify {root}") from None
    if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
        raise CorruptionError(f"unit {commit.unit}: {file} differs from its commit", fix=f"vla verify {root}")
    return data
