"""Files of a data set that others wrote: orders, links, JSON and numbers, taken with suspicion."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.episode_checks import SKIP, require_finite
from vla.featurize.sources.lerobot_info import MAX_JSON_BYTES, inside
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError
from vla.stores.filesystem import digest_file
from vla.stores.pointers import refuse_pointer

MAX_TEXT_BYTES = 64 << 10
"""An instruction is a sentence; a text file above this is something else."""


_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and what Python makes of bytes that are no UTF-8: ids are stored and printed."""


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `demo_10` comes after `demo_9`."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def digest_files(root: Path, files: Iterable[str]) -> str:
    """SHA-256 (hex) over sorted relative paths, sizes and contents. Raises `SourceError` where one is unreadable."""
    total = hashlib.sha256()
    for name in sorted(files):
        path = root / name
        try:
            total.update(f"{name}\0{path.stat().st_size}\0{digest_file(path)}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror or error}") from None
    return total.hexdigest()


def listing(root: Path, folder: Path, *, check_files: bool = True) -> list[Path]:
    """Return what a folder below `root` holds, hidden files left out, in natural order.

    `root` is absolute. Raises `SourceError` where the folder cannot be read, where it or a link in it leads out of
    `root`, and for a name that is no line of UTF-8. Without `check_files` only folders are checked: the caller looks
    at each file it takes, and can leave out the one episode that a bad link belongs to.
    """
    found = []
    inside(root, folder.relative_to(root).as_posix())
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and (check_files or entry.is_dir()):
                    inside(root, Path(entry.path).relative_to(root).as_posix())
                found.append(Path(entry.path))
    except OSError as error:
        raise SourceError(f"cannot read {folder}: {error.strerror or error}", expected="a folder") from None
    for path in found:
        if _UNFIT.search(path.name):
            raise SourceError(f"{folder} holds the name {path.name!r}", expected="a line of UTF-8", fix="rename it")
    return sorted(found, key=lambda path: natural(path.name))


def folders(root: Path, folder: Path) -> list[Path]:
    """Return the folders in a folder, as `listing` does."""
    return [path for path in listing(root, folder) if path.is_dir()]


def size_of(file: Path, limit: int, what: str, fix: str = SKIP) -> int:
    """Return the bytes of a regular file. Raises `SourceError` where it is missing, above `limit`, a pipe or a device,
    `PointerError` for a Git-LFS pointer.

    Opening a pipe would wait for ever, and a device has no end.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", expected=what, fix=fix) from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{file} is no regular file", expected=what, fix=fix)
    refuse_pointer(file)
    if status.st_size > limit:
        raise SourceError(f"{file} has {status.st_size} bytes", expected=f"at most {limit}", fix=fix)
    return status.st_size


def read_text(file: Path) -> str:
    """Return a short text without the spaces around it. Raises `SourceError` where it is empty, long, or no UTF-8."""
    size_of(file, MAX_TEXT_BYTES, "an instruction")
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {file}: {error}", expected="a text in UTF-8", fix=SKIP) from None
    if not text or "\0" in text:
        raise SourceError(f"{file} is {'binary' if text else 'empty'}", expected="an instruction", fix=SKIP)
    return text


def read_json(file: Path, what: str, fix: str = SKIP) -> Any:
    """Return the value of a JSON file of bounded size. Raises `SourceError` naming `what` it should have been."""
    size_of(file, MAX_JSON_BYTES, what, fix)
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", expected=what, fix=fix) from None
    except ValueError:
        raise SourceError(f"{file} is not JSON", expected=what, fix=fix) from None


def read_numbers(file: Path) -> NDArray[np.float32]:
    """Return the numbers of a .npy file, float32 [T, D], finite; [T] is read as [T, 1].

    Raises `SourceError` naming the file for pickled objects, other shapes, and a file that is longer or shorter than
    its header says (which is read first: a header may declare more than the memory holds).
    """
    found = size_of(file, sys.maxsize, "a .npy array")
    try:
        shape, dtype, begin = _npy_header(file)
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", expected="a .npy array", fix=SKIP) from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise SourceError(f"{file} is no .npy array ({reason})", expected="np.save of [T, D]", fix=SKIP) from None
    if dtype.kind not in "fiub":
        raise SourceError(f"{file} holds values of dtype {dtype}", expected="numbers, never pickled", fix=_RESAVE)
    if len(shape) not in (1, 2) or 0 in shape:
        raise SourceError(f"{file} has shape {shape}", expected="[T, D], at least one frame", fix=SKIP)
    size = begin + math.prod(shape) * dtype.itemsize
    if size != found:
        raise SourceError(f"{file} has {found} bytes", expected=f"{size} as its header says", fix=SKIP)
    values = np.load(file, allow_pickle=False)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        numbers: NDArray[np.float32] = values.reshape(len(values), -1).astype(np.float32)
    require_finite(numbers, str(file))
    return numbers


_RESAVE = "np.save(FILE, np.asarray(values, np.float32))"


def _npy_header(file: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype, and where the values begin."""
    with file.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        return shape, dtype, stream.tell()
