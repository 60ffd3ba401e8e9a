"""HDF5 files from strangers: only what lies in the file itself is read.

External and soft links, virtual data sets and raw data kept in other files are refused: such a file reads any other
file of the machine.
"""

from __future__ import annotations

from typing import Any

import h5py

from vla.featurize.sources.episode_checks import SKIP
from vla.stores.errors import SourceError


def find(file: h5py.File, path: str) -> Any:
    """Return a group or data set reached through hard links only, or None where there is no such name."""
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
    """Return a data set. Raises `SourceError` naming what is there instead."""
    node = find(file, path)
    if not isinstance(node, h5py.Dataset):
        above = find(file, path.rpartition("/")[0]) if "/" in path else file
        there = (
            f"holds {', '.join(sorted(above))[:120] or 'nothing'}" if isinstance(above, h5py.Group) else "is missing"
        )
        group = path.rpartition("/")[0] or "/"
        raise SourceError(f"{file.filename} has no {path}: {group} {there}", expected=f"a data set {path}", fix=SKIP)
    return node


def names(file: h5py.File, path: str) -> list[str]:
    """Return the names in a group, sorted; none where there is no such group."""
    node = find(file, path)
    return sorted(node) if isinstance(node, h5py.Group) else []
