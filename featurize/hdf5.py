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
NUMBERS = "fiub"
"""numpy's kinds of numbers and booleans."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, without a lock: many file systems grant none.

    What HDF5 raises on damage becomes a `SourceError` naming the file; `MachineError` as `open_hdf5`.
    """
    try:
        with open_hdf5(path) as file:
            yield file
    except VlaError:
        raise
    # h5py raises OSError on truncation and failed checksums, RuntimeError and KeyError on damaged links,
    # ValueError and TypeError on types that numpy has not, MemoryError on sizes that the file only claims.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        refuse_pointer(path)
        reason = " ".join(str(error).split())[:160]
        raise SourceError(f"{path} does not read: {reason}", expected="a whole HDF5 file", fix=SKIP) from None


def find(file: h5py.File, path: str) -> Any:
    """Return a group or data set reached through hard links only, or None where there is no such name.

    Raises `SourceError` for a link, and for data that lie in other files.
    """
    node: Any = file
    for part in path.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) and part in node else None
        if link is None:
            return None
        if type(link) is not h5py.HardLink:
            found = f"{file.filename}:{path} is a {type(link).__name__} at {part!r}"
            raise SourceError(found, expected="data in the file itself", fix=SKIP)
        node = node[part]
    if isinstance(node, h5py.Dataset) and (node.is_virtual or node.external):
        raise SourceError(f"{file.filename}:{path} lies in other files", expected="data in the file itself", fix=SKIP)
    return node


def need(file: h5py.File, path: str) -> h5py.Dataset:
    """Return a data set of any type. Raises `SourceError` naming what is there instead."""
    node = find(file, path)
    if not isinstance(node, h5py.Dataset):
        group = path.rpartition("/")[0]
        above = find(file, group) if group else file
        there = (
            f"holds {', '.join(sorted(above))[:120] or 'nothing'}" if isinstance(above, h5py.Group) else "is missing"
        )
        found = f"{file.filename} has no {path}: {group or '/'} {there}"
        raise SourceError(found, expected=f"a data set {path}", fix=SKIP)
    return node


def dataset(file: h5py.File, path: str, kinds: str = NUMBERS) -> h5py.Dataset:
    """Return a data set of numpy's `kinds`. Raises `SourceError`."""
    node = need(file, path)
    if node.dtype.kind not in kinds:
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


def arrays(file: h5py.File, path: str) -> dict[str, h5py.Dataset]:
    """Return {name: array of numbers, one axis or more} of a group; nothing else that lies there, and no link."""
    node = find(file, path)
    own = [name for name in node if type(node.get(name, getlink=True)) is h5py.HardLink] if _is_group(node) else []
    found = {name: node[name] for name in own if isinstance(node.get(name), h5py.Dataset)}
    return {
        name: data
        for name, data in found.items()
        if data.ndim and data.dtype.kind in NUMBERS and not (data.is_virtual or data.external)
    }


def group(file: h5py.File, path: str, expected: str) -> h5py.Group:
    """Return a group of this file. Raises `SourceError` saying what was expected."""
    node = find(file, path)
    if not _is_group(node):
        raise SourceError(f"{file.filename} has no group {path!r}", expected=expected)
    return node


def names(file: h5py.File, path: str) -> list[str]:
    """Return the names in a group, sorted; none where there is no such group."""
    node = find(file, path)
    return sorted(node) if _is_group(node) else []


def text_attribute(node: Any, name: str) -> str | None:
    """Return an attribute that is text, of fixed or variable length and alone or in an array of one, or None."""
    value = node.attrs.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str) else None


def count_attribute(node: Any, name: str) -> int | None:
    """Return a count that an attribute states, as a number or as text, alone or in an array of one, or None."""
    text = text_attribute(node, name)
    if text is not None:
        return int(text) if text.strip().isdecimal() else None
    value = np.asarray(node.attrs.get(name, ()))
    return int(value.reshape(-1)[0]) if value.size == 1 and value.dtype.kind in "iuf" else None


def _is_group(node: Any) -> bool:
    return isinstance(node, h5py.Group)
