"""Reading HDF5 files from strangers: only what lies in the file itself.

External and soft links, virtual and externally stored data sets are refused, because such a file reads any other file
of the machine. Files are opened for one call and closed again, so that no handle crosses threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer

SKIP = "--skip-bad leaves the episode out"


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading. What HDF5 raises on damage becomes a `SourceError`."""
    try:
        # The driver is named: a file may not choose another one, which might open other files.
        with h5py.File(path, "r", locking=False, driver="sec2") as file:
            yield file
    # h5py raises OSError on truncation and failed checksums, RuntimeError and KeyError on damaged links.
    except (OSError, RuntimeError, KeyError) as error:
        refuse_pointer(path)
        raise SourceError(f"{path} does not read: {error}", expected="a whole HDF5 file", fix=SKIP) from None


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
