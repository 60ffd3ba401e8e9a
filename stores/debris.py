"""Deleting stores and what interrupted runs left, and nothing else: a folder is looked into before it goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from vla.stores.errors import StoreError, UsageError
from vla.stores.filesystem import PARTIAL
from vla.stores.formats.registry import FORMATS
from vla.stores.layout import COMMITS, METADATA, TABLE_FOLDERS
from vla.stores.remote.options import is_url

CONTENTS = frozenset(
    {
        METADATA,
        COMMITS,
        *TABLE_FOLDERS,
        *(folder for form in FORMATS.values() for folder in form.folders),
    }
)
"""What may lie in the folder of a store, whole or cut short, in any form."""


def doomed(root: Path) -> Path:
    """Return the name under which `root` is deleted."""
    return root.with_name(root.name + ".old" + PARTIAL)


def refuse_overwriting(root: Path | str, read: Iterable[Path | str]) -> None:
    """Refuse to replace the store at `root` by what is made from it: what is `read` must outlast the run.

    Raises `UsageError` naming the folder or URL of `read` that is `root` or lies in it.
    """
    own = _place(root)
    for path in read:
        place = _place(path)
        if own == place or (isinstance(own, Path) and isinstance(place, Path) and own in place.parents):
            raise UsageError(f"--overwrite of {root} would delete {path}, which is read", fix="another --out or --name")


def _place(path: Path | str) -> Path | str:
    return str(path).rstrip("/") if is_url(path) else Path(path).resolve()


def require_debris(folder: Path) -> None:
    """Refuse to delete a folder that holds anything a store does not. Raises `StoreError` naming it."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in inside if name not in CONTENTS and not name.endswith(PARTIAL)]
    if foreign:
        raise StoreError(f"{folder} is in the way and holds {foreign[0]}", expected="what an interrupted run left")


def remove(path: Path) -> None:
    """Delete a file or a folder; a link itself, never what it points to. Nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_folder(root: Path) -> None:
    """Delete a store that has been recognised as one."""
    # Renamed first: a crash while deleting must not leave half a store under its own name.
    old = doomed(root)
    require_debris(old)
    remove(old)
    root.rename(old)
    remove(old)
