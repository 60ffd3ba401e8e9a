"""Reading HDF5 files from strangers: only what lies in the file itself.

External and soft links, virtual and externally stored data sets are refused, because such a file reads any other file
of the machine. Files are opened for one call and closed again, so that no handle crosses threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla.stores.errors import SourceError, VlaError
from vla.stores.hdf5_files import open_hdf5
from vla.stores.pointers import refuse_pointer
from vla.stores.untrusted import is_backed

SKIP = "--skip-bad leaves the episode out"


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, without a lock: many file systems grant none.

    What HDF5 raises on damage becomes a `SourceError` naming the file; `MachineError` as `open_hdf5`.
    """
    try:
        with open_hdf5(path) as file:
            yield file
    # h5py raises OSError on truncation and failed checksums, RuntimeError and KeyError on damaged links,
    # ValueError and TypeError on types that numpy has not, MemoryError on sizes that the file only claims.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        if isinstance(error, VlaError):
            raise
        refuse_pointer(path)
        reason = " ".join(str(error).split())[:160]
        raise SourceError(f"{path} does not read: {reason}", expected="a whole HDF5 file", fix=SKIP) from None


def hard_member(file: h5py.File, path: str) -> Any:
    """Return what `path` names, reached through hard links only. Raises `SourceError` where that is not possible."""
    node: Any = file
    for part in path.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) and part in node else None
        if link is None or type(link) is not h5py.HardLink:
            found = "missing" if link is None else f"a {type(link).__name__} at {part!r}"
            raise SourceError(f"{file.filename}:{path} is {found}", expected="data in the file itself", fix=SKIP)
        node = node[part]
    return node


def dataset(file: h5py.File, path: str, kinds: str = "fiub") -> h5py.Dataset:
    """Return a data set that lies in this file, of numpy's `kinds` (numbers and booleans). Raises `SourceError`."""
    node = hard_member(file, path)
    if not isinstance(node, h5py.Dataset) or node.is_virtual or node.external or node.dtype.kind not in kinds:
        raise SourceError(f"{file.filename}:{path} is no plain array", expected="numbers in the file itself", fix=SKIP)
    return node


def read_whole(data: h5py.Dataset) -> Any:
    """Return all of a data set. Raises `SourceError` where the file does not account for its size."""
    _require_backed(data, data.nbytes)
    return data[()]


def read_rows(data: h5py.Dataset, start: int, stop: int) -> Any:
    """Return rows `start..stop-1` of a data set. Raises like `read_whole`."""
    require_rows(data, stop - start)
    return data[start:stop]


def require_rows(data: h5py.Dataset, rows: int) -> None:
    """Raise `SourceError` where `rows` rows, or a chunk that reading one row unpacks, are more than the file holds."""
    row_bytes = data.dtype.itemsize * math.prod(data.shape[1:])
    chunk_bytes = data.dtype.itemsize * math.prod(data.chunks or ())
    _require_backed(data, max(rows * row_bytes, chunk_bytes))


def _require_backed(data: h5py.Dataset, claimed: int) -> None:
    """Compare a size in memory with the bytes on the disk.

    What was never written reads as fill values and has no bytes; gzip packs zeros a thousandfold; and the size of a
    contiguous array is a number in its header.
    """
    if is_backed(claimed, 0):
        return
    present = min(data.id.get_storage_size(), Path(data.file.filename).stat().st_size)
    if not is_backed(claimed, present):
        found = f"{data.file.filename}:{data.name} declares {claimed} bytes and holds {present}"
        raise SourceError(found, expected="numbers that were written", fix=SKIP)


def group(file: h5py.File, path: str, expected: str) -> h5py.Group:
    """Return a group of this file. Raises `SourceError` saying what was expected."""
    top = path.partition("/")[0]
    node = hard_member(file, path) if top in file and type(file.get(top, getlink=True)) is h5py.HardLink else None
    if not isinstance(node, h5py.Group):
        raise SourceError(f"{file.filename} has no group {path!r}", expected=expected)
    return node


def text_attribute(node: Any, name: str) -> str | None:
    """Return an attribute that is text, of fixed or variable length and alone or in an array of one, or None."""
    value = node.attrs.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str) else None
