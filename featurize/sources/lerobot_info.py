"""`meta/info.json` of a LeRobot data set: version, columns, and where its files are, taken with suspicion.

A data set comes from strangers: its path templates may not leave its folder, nor may links inside it.
Format: LeRobot's `lerobot/datasets/utils.py` (CODEBASE_VERSION, DEFAULT_*_PATH, create_empty_dataset_info).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from vla.featurize.sources.mapping import PRIVILEGED, Column
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError
from vla.stores.pointers import is_pointer, pointer_error

INFO = "meta/info.json"
VERSIONS = ("v3.0", "v2.1", "v2.0")
"""v2.0 and v2.1 differ in where statistics are kept (meta/stats.json, meta/episodes_stats.jsonl); neither is read."""

CHUNK = ("episode_chunk", "chunk_index", "chunk")
EPISODE = ("episode_index", "file_index", "episode")
CAMERA = ("video_key", "camera_key", "image_key", "camera")
"""What v2 templates in circulation call the three facts of a file's place; the first of each is LeRobot's."""

MAX_JSON_BYTES = 64 << 20
"""A thousand times the largest info.json met; refuses one made to fill the memory."""

_SPEC = re.compile(r"0?\d{0,2}d?")
"""Format specifications of a path number, such as 03d; `{x:099999999d}` would fill the memory."""

_NUMBERS = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32"}
NUMBERS = frozenset(_NUMBERS | {"float64"})


@dataclass(frozen=True)
class Info:
    """What info.json says. `root` is absolute; templates are checked; `chunk_size` counts episodes (v2.1)."""

    root: Path
    version: str
    fps: float
    columns: dict[str, Column]
    data_path: str
    video_path: str
    chunk_size: int
    total_episodes: int | None
    total_frames: int | None
    licence: str


def read_info(root: Path) -> Info:
    """Read and check `meta/info.json`. Raises `SourceError` naming the field that does not conform."""
    root = root.resolve()
    file = root / INFO
    raw = read_json(file)
    version = _version(raw, file)
    features = raw.get("features")
    if not isinstance(features, dict) or not all(isinstance(spec, dict) for spec in features.values()):
        raise SourceError(f"{file} has no table 'features'", expected=f"LeRobot {version} metadata")
    fps = number(raw.get("fps"))
    if fps is None or not (math.isfinite(fps) and fps > 0):
        raise SourceError(f"{file} says fps = {raw.get('fps')!r}", expected="frames per second, above 0")
    has_video = any(spec.get("dtype") == "video" for spec in features.values())
    keys = ("chunk_index", "file_index") if version == "v3.0" else (*CHUNK, *EPISODE)
    video_keys = (*keys, *(CAMERA[:1] if version == "v3.0" else CAMERA))
    return Info(
        root=root,
        version=version,
        fps=fps,
        columns={str(name): _column(str(name), spec, file) for name, spec in features.items()},
        data_path=_template(raw, "data_path", keys, file),
        video_path=_template(raw, "video_path", video_keys, file) if has_video else "",
        chunk_size=_count(raw, "chunks_size", 1000, file),
        total_episodes=_count(raw, "total_episodes", 0, file, least=0) if "total_episodes" in raw else None,
        total_frames=_count(raw, "total_frames", 0, file, least=0) if "total_frames" in raw else None,
        licence=_licence(raw, root),
    )


def inside(root: Path, relative: str) -> Path:
    """Return the real path of `relative`. Raises `SourceError` where it, or a link on its way, leaves `root`.

    Where `root` is a snapshot in the hub's cache, links into the `blobs` of the same repository are followed; the path
    then keeps its name in the snapshot, as a blob's own name says nothing.
    """
    path = (root / relative).resolve()
    if path.is_relative_to(root):
        return path
    blobs = _hub_blobs(root)
    if blobs is not None and path.is_relative_to(blobs):
        return root / relative
    copy = f"cp -rL {shlex.quote(str(root))} COPY"
    raise SourceError(f"{relative!r} in {root} leads out of it, to {path}", expected="a path inside", fix=copy)


def _hub_blobs(root: Path) -> Path | None:
    """Return the `blobs` of the repository whose snapshot holds `root`: `datasets--NAME/{blobs,snapshots/COMMIT}`."""
    for folder in root.parents:
        if folder.name == "snapshots" and re.match(r"(datasets|models|spaces)--", folder.parent.name):
            blobs = folder.parent / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def _is_inside(root: Path, relative: str) -> bool:
    try:
        inside(root, relative)
    except SourceError:
        return False
    return True


def missing_file(root: Path, relative: str, what: str, fix: str = "") -> SourceError:
    """Return the error for a file that is not there, proposing `mv` where its top folder has another name."""
    top = Path(relative).parts[0]
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != top):
        if (folder / Path(relative).relative_to(top)).is_file():
            found = f"{root / relative} is missing, but {folder.name}/ holds it while {INFO} says {top}/"
            move = "cp -rn {}/. {}" if (root / top).exists() else "mv {} {}"
            fix = move.format(shlex.quote(str(folder)), shlex.quote(str(root / top)))
            return SourceError(found, expected=f"one name for {what}", fix=fix)
    return SourceError(f"{root / relative} is missing", expected=what, fix=fix)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `SourceError` where it is missing, too large, or none."""
    if not file.is_file():
        raise SourceError(f"{file} is missing", expected="LeRobot metadata", fix="the folder that holds meta/info.json")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise SourceError(f"{file} has {file.stat().st_size} bytes", expected=f"at most {MAX_JSON_BYTES}")
    return parse_object(file.read_bytes(), str(file))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object. Raises `SourceError` naming `where`, `PointerError` for a Git-LFS pointer."""
    if is_pointer(text):
        raise pointer_error(where)
    try:
        value = parse_json(text)
    except ValueError:
        raise SourceError(f"{where} is not JSON", expected="an object") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where} holds a {type(value).__name__}", expected="an object")
    return value


def number(value: Any) -> float | None:
    """Return a number of info.json, written as a number or as text ("30.0"); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def whole(value: Any) -> int | None:
    """Return a count, written as 3, 3.0 or "3"; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() else None


def _version(raw: dict[str, Any], file: Path) -> str:
    version = raw.get("codebase_version")
    if version in VERSIONS:
        return str(version)
    fix = "lerobot's own converters (v1 to v2.0, v2.0 to v2.1, v2.1 to v3.0)"
    raise SourceError(f"{file} says codebase_version = {version!r}", expected=" or ".join(VERSIONS), fix=fix)


def _column(name: str, spec: dict[str, Any], file: Path) -> Column:
    dtype, shape = str(spec.get("dtype")), spec.get("shape")
    counts = [whole(n) for n in (shape if isinstance(shape, list | tuple) else [])]
    shape = tuple(n for n in counts if n is not None and n >= 0)
    if len(shape) != len(counts):
        raise SourceError(f"{file}: {name!r} has shape {spec.get('shape')}", expected="a list of counts")
    if dtype in ("video", "image"):
        details = spec.get("info") or spec.get("video_info") or {}
        depth = isinstance(details, dict) and (details.get("video.is_depth_map") or details.get("is_depth_map"))
        if depth:
            return Column("unused", "depth map", shape)
        return Column("video" if dtype == "video" else "picture", dtype, shape, size=_size(shape, spec.get("names")))
    if dtype not in NUMBERS:
        return Column("unused", dtype, shape)
    privileged = spec.get("privileged") is True or name == PRIVILEGED
    return Column("number", dtype, shape, _names(spec.get("names"), math.prod(shape)), privileged)


def _size(shape: tuple[int, ...], names: Any) -> tuple[int, int] | None:
    """Return (height, width): by the axes' names where they are given, else [H, W, C] before [C, H, W]."""
    if len(shape) != 3:
        return None
    if isinstance(names, list) and "height" in names and "width" in names and len(names) == 3:
        return shape[names.index("height")], shape[names.index("width")]
    return (shape[1], shape[2]) if shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4) else (shape[0], shape[1])


def _names(names: Any, width: int) -> tuple[str, ...]:
    """Return component names where there is one for each; data sets nest them in lists and groups, or not."""
    listed = tuple(_flat(names))
    fits = len(listed) == width and all(isinstance(name, str) for name in listed)
    return listed if fits else ()


def _flat(names: Any) -> Iterator[Any]:
    """Yield names in order from lists and groups of them, and from {name: place}."""
    if isinstance(names, dict) and names and all(type(place) is int for place in names.values()):
        yield from sorted(names, key=names.__getitem__)
    elif isinstance(names, dict | list):
        for part in names.values() if isinstance(names, dict) else names:
            yield from _flat(part)
    else:
        yield names


def _template(raw: dict[str, Any], key: str, fields: tuple[str, ...], file: Path) -> str:
    template = raw.get(key)
    if not isinstance(template, str) or not template:
        raise SourceError(f"{file} has no {key!r}", expected=f"a path with {', '.join(fields)}")
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        parts = [("", "?", "", None)]
    for _, field, spec, conversion in parts:
        fits = field is None or (field in fields and _SPEC.fullmatch(spec or "") and conversion is None)
        if not fits or (field == "video_key" and spec):
            raise SourceError(f"{file}: {key} is {template!r}", expected=f"only {', '.join(fields)} in braces")
    if template.startswith(("/", "\\", "~")) or ".." in Path(template).parts or "\0" in template:
        raise SourceError(f"{file}: {key} {template!r} leads out of the data set", expected="a path below it")
    return template


def _count(raw: dict[str, Any], key: str, default: int, file: Path, least: int = 1) -> int:
    value = whole(raw.get(key, default))
    if value is None or value < least:
        raise SourceError(f"{file} says {key} = {raw.get(key)!r}", expected=f"a count of at least {least}")
    return value


def _licence(raw: dict[str, Any], root: Path) -> str:
    """Return the licence that info.json or the front matter of the data card names."""
    named = raw.get("license", raw.get("licence"))
    card = root / "README.md"
    if not named and card.is_file() and _is_inside(root, card.name) and card.stat().st_size < MAX_JSON_BYTES:
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        line = re.search(r"^licen[cs]e:\s*(\S[^\n]*)", front[1], re.MULTILINE) if front else None
        named = line[1].strip().strip("\"'") if line else None
    return str(named or "unknown")


def inferred(dtype: str, shape: tuple[int, ...]) -> Column:
    """Describe a column that the data hold and info.json does not list, or lists with a type of its own."""
    if dtype not in NUMBERS:
        return Column("unused", dtype, ())
    return Column("number", np.dtype(dtype).name, shape)
