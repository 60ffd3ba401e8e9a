"""Reading a small committed file whole, compared with its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vla.stores.errors import CorruptionError
from vla.stores.filesystem import explaining

if TYPE_CHECKING:
    from vla.stores.commits import Commit


def read_committed(root: Path, commit: Commit, path: str) -> bytes:
    """Return a small committed file after comparing it with its digest. Raises `CorruptionError`."""
    file, record = root / path, commit.files.get(path)
    if record is None or not file.is_file() or file.stat().st_size != record.size:
        raise CorruptionError(f"unit {commit.unit}: {file} is missing or has another size", fix=f"vla verify {root}")
    with explaining(file):
        data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CorruptionError(f"unit {commit.unit}: {file} differs from its commit", fix=f"vla verify {root}")
    return data
