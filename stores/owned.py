"""Which names this software writes into a folder of its own, and the only functions that delete such folders.

Deleting goes by name: what a layout does not list is somebody else's, and is refused before anything is deleted. No
symbolic link is followed: a link in the place of a file or folder of the layout goes, its target stays.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vla.stores.errors import StoreError, UsageError
from vla.stores.filesystem import PARTIAL
from vla.stores.formats.registry import FORMATS
from vla.stores.layout import CLAIMS, COMMITS, LOCK
from vla.stores.remote.options import is_url
from vla.stores.tables import LABELS, TABLES


class Layout(NamedTuple):
    """The names in one kind of folder, as regular expressions of paths below it, without the suffix `PARTIAL`."""

    what: str
    files: str
    folders: str

    def has_file(self, path: str) -> bool:
        """Return whether `path`, finished or not, is a file of this layout."""
        return re.fullmatch(self.files, _finished(path)) is not None

    def has_folder(self, path: str) -> bool:
        """Return whether `path`, finished or not, is a folder of this layout."""
        return re.fullmatch(self.folders, _finished(path)) is not None


def _any(names: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, names)))


_TABLES = (*TABLES, *LABELS)
_GROUPS = _any({table.partition("/")[0] for table in _TABLES})
_UNITS = _any(folder for form in FORMATS.values() for folder in form.folders)
_ARRAY = r"(zarr\.json|c([./]\d+)*)"
"""An array's metadata and its chunks; plain zarr separates the chunk's axes by '/', stores by '.'."""

STORE = Layout(
    "a store",
    rf"zarr\.json|{_any((LOCK, CLAIMS))}|{COMMITS}/writer\.lease|{COMMITS}/unit-\d{{6,}}\.json|units/unit-\d{{6,}}\.h5"
    rf"|({_GROUPS}|{_UNITS})/zarr\.json|({_any(_TABLES)})/{_ARRAY}|({_UNITS})/[^/]+/{_ARRAY}",
    rf"{COMMITS}|{_GROUPS}|({_any(_TABLES)})(/c(/\d+)*)?|({_UNITS})(/[^/]+(/c(/\d+)*)?)?",
)
CHECKPOINT = Layout("a checkpoint", r"(model|ema|optimizer)\.safetensors|(state|artefact|complete)\.json", "")
RUN = Layout(
    "a run",
    rf"(run|best)\.json|metrics\.jsonl|checkpoints/step-\d{{8,}}/({CHECKPOINT.files})"
    r"|vla/([^/]+/)*(events\.out\.tfevents\.[^/]+|hparams\.yml)",
    r"checkpoints(/step-\d{8,})?|vla(/[^/]+)*",
)
"""`vla/` is what accelerate's TensorBoard tracker writes."""

DATA_SET = Layout(
    "a LeRobot data set",
    r"README\.md|meta/(info|stats|recording)\.json|meta/tasks\.parquet"
    r"|(data|meta/episodes)/chunk-\d{3,}/file-\d{3,}\.parquet|videos/[^/]+/chunk-\d{3,}/file-\d{3,}\.mp4",
    r"meta|(data|meta/episodes)(/chunk-\d{3,})?|videos(/[^/]+(/chunk-\d{3,})?)?",
)


def foreign(folder: Path, layout: Layout) -> list[str]:
    """Return the paths in a folder that `layout` does not have; of a foreign folder, only its own path."""
    found = {entry.path: entry.is_folder for entry in _entries(folder) if not entry.belongs(layout)}
    return sorted(path + "/" * is_folder for path, is_folder in found.items() if not found.keys() & _above(path))


def require_owned(folder: Path, layout: Layout) -> None:
    """Raise `UsageError` naming what --overwrite of `folder` would delete though `layout` does not have it."""
    found = foreign(folder, layout)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"--overwrite of {folder} would delete {', '.join(found[:3])}{more}",
            expected=f"nothing but {layout.what}",
            fix="move that away first, or another --out",
        )


def remove_owned(folder: Path, layout: Layout, *, keep: Collection[str] = ()) -> None:
    """Delete what `layout` has in a folder, and the folder unless `keep` names paths in it that stay.

    A link in the folder's own place is deleted itself. Nothing happens where there is nothing. Raises `UsageError`, and
    deletes nothing, where the folder holds anything else.
    """
    if folder.is_symlink() and not keep:
        folder.unlink()
        return
    if not folder.exists():
        return
    require_owned(folder, layout)
    for entry in _entries(folder):
        if entry.path not in keep and entry.belongs(layout):  # something foreign may have come in between
            entry.remove()
    if not keep:
        folder.rmdir()


def remove_debris(folder: Path, layout: Layout) -> None:
    """Delete what an interrupted run left at `folder`. Raises `StoreError` where it holds anything else."""
    require_debris(folder, layout)
    remove_owned(folder, layout)


def require_debris(folder: Path, layout: Layout) -> None:
    """Raise `StoreError` naming what a folder in the way holds that no interrupted run of ours has left."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} is in the way and is no folder", expected="what an interrupted run left")
    found = foreign(folder, layout) if folder.exists() else []
    if found:
        raise StoreError(f"{folder} is in the way and holds {found[0]}", expected="what an interrupted run left")


def debris(folder: Path, layout: Layout) -> list[str]:
    """Return the paths below a folder that an interrupted write left: names of `layout` with the suffix `PARTIAL`.

    A partial folder that holds anything foreign is not among them.
    """
    found, occupied = [], set[str]()
    for entry in _entries(folder):
        if not entry.belongs(layout):
            occupied |= {entry.path, *_above(entry.path)}
        elif entry.path not in occupied and any(part.endswith(PARTIAL) for part in entry.path.split("/")):
            found.append(entry.path)
    return found


def links(folder: Path, layout: Layout) -> list[str]:
    """Return the paths below a folder that are symbolic links and bear a name of `layout`."""
    return [entry.path for entry in _entries(folder) if entry.is_link and entry.belongs(layout)]


def sweep(folder: Path, layout: Layout) -> list[str]:
    """Delete the `debris` below a folder; return its paths. Only for the one writer of the folder."""
    found = debris(folder, layout)
    gone = set(found)
    for entry in _entries(folder):
        if entry.path in gone:
            entry.remove()
    return found


def delete_folder(root: Path, layout: Layout) -> None:
    """Delete a store, or another folder of `layout`, that has been recognised as one.

    Raises `UsageError`, and deletes nothing, where the folder holds anything else.
    """
    require_owned(root, layout)
    # Renamed first: a crash while deleting must not leave half a store under its own name.
    old = doomed(root)
    remove_debris(old, layout)
    root.rename(old)
    remove_owned(old, layout)


def doomed(root: Path) -> Path:
    """Return the name under which `root` is deleted."""
    return root.with_name(root.name + ".old" + PARTIAL)


def require_name(name: str, flag: str) -> str:
    """Return a name that becomes one folder. Raises `UsageError` where it would lead elsewhere or be an option."""
    outside = name in ("", ".", "..") or {"/", "\\"} & set(name)
    if outside or name.startswith(("-", "~")) or name.endswith(PARTIAL) or not name.isprintable() or len(name) > 200:
        found, expected = f"{flag} {name!r}", "the name of one folder, such as toy or push-v3_2"
        raise UsageError(found, expected=expected, fix="--out for another place")
    return name


def refuse_overlap(out: Path | str, read: Iterable[Path | str]) -> None:
    """Refuse to write to `out` what is made from `read`: neither may be, or be inside, the other.

    Folders are compared by device and inode, so that a link, `..` or another case is no disguise. Raises `UsageError`
    naming both.
    """
    for path in read:
        if is_url(out) or is_url(path):
            mine, theirs = f"{str(out).rstrip('/')}/", f"{str(path).rstrip('/')}/"
            inside, around = mine.startswith(theirs), theirs.startswith(mine)
        elif Path(path).exists():  # a missing input is its reader's error
            inside, around = _within(Path(out), Path(path)), _within(Path(path), Path(out))
        else:
            continue
        fix = "another --out or --name"
        if around:
            raise UsageError(f"--overwrite of {out} would delete {path}, which is read", fix=fix)
        if inside:
            raise UsageError(f"{out} lies in {path}, which is read", expected="an output apart from it", fix=fix)


def _within(inner: Path, outer: Path) -> bool:
    inner, outer = inner.resolve(), outer.resolve()
    if inner == outer or outer in inner.parents:
        return True
    if not outer.exists():
        return False
    wanted = outer.stat()
    return any(os.path.samestat(path.stat(), wanted) for path in (inner, *inner.parents) if path.exists())


class _Entry(NamedTuple):
    """Something below a folder: its path there, its name in the open folder `parent`, and what it is."""

    path: str
    name: str
    parent: int
    is_folder: bool
    is_link: bool

    def belongs(self, layout: Layout) -> bool:
        as_folder = (self.is_folder or self.is_link) and layout.has_folder(self.path)
        return as_folder or (not self.is_folder and layout.has_file(self.path))

    def remove(self) -> None:
        if self.is_folder:
            os.rmdir(self.name, dir_fd=self.parent)
        else:
            os.unlink(self.name, dir_fd=self.parent)


def _entries(folder: Path) -> Iterator[_Entry]:
    """Yield everything below a folder, what a folder holds before the folder itself; no link is followed."""
    top = folder.resolve()
    for at, folders, files, parent in os.fwalk(top, topdown=False, onerror=_raise, follow_symlinks=False):
        for name in (*files, *folders):
            try:
                mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            except FileNotFoundError:  # a writer has renamed its temporary file since the folder was listed
                continue
            path = f"{at}/{name}"[len(str(top)) + 1 :]
            yield _Entry(path, name, parent, stat.S_ISDIR(mode), stat.S_ISLNK(mode))


def _above(path: str) -> set[str]:
    """Return the paths of the folders that hold `path`."""
    parts = path.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts))}


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that a writer has renamed since the listing
        raise error


def _finished(path: str) -> str:
    return "/".join(part.removesuffix(PARTIAL) for part in path.split("/"))
