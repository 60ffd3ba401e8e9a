"""Where RoboTwin keeps the files of an episode: demonstrations, planner paths, instructions, pictures in folders.

    ROOT/data/episode{N}.hdf5 or episode_{N:07d}.hdf5      frames and joints
    ROOT/_traj_data/episode{N}.pkl                         the planner's segments
    ROOT/instructions/episode{N}.json or instruction/episode_{N:07d}.json
    IMAGES/episode{N}/[CAMERA/]step_0000.png               pictures of one camera, or a folder a camera

ROOT is one task. A folder of such folders, up to two levels down (TASK or TASK/CONFIG), is several tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla.featurize.sources.episode_checks import SKIP
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError, UsageError
from vla.stores.pointers import refuse_pointer

DATA, PLANS = "data", "_traj_data"
HDF5, PKL = "episode*.hdf5", "episode*.pkl"
ONE_CAMERA = "head_camera"
"""The camera of pictures that lie in an episode's folder itself: RoboTwin's exports to folders are of this one."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MAX_JSON_BYTES = 1 << 24
"""A hundred instructions of a task take some kilobytes."""

_EPISODE = re.compile(r"(?:episode_?)?(\d{1,9})")
_FRAME = re.compile(r"(?:.*\D)?(\d{1,9})")
_CONFIG = re.compile(r"(demo_|aloha|franka|arx|piper|ur5).*", re.IGNORECASE)
"""Names that RoboTwin gives to settings and robots; the task is then the folder above."""


@dataclass(frozen=True)
class TaskFolder:
    """One task: `name` is its folder relative to the source ("" for the source itself), `task` its own name."""

    root: Path
    name: str
    task: str


@dataclass(frozen=True)
class Files:
    """What there is of one episode. `images` maps a camera to its pictures in order of their numbers."""

    id: str
    number: int
    folder: TaskFolder
    data: Path | None = None
    plan: Path | None = None
    text: Path | None = None
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file of the episode."""
        own = tuple(path for path in (self.data, self.plan, self.text) if path)
        return own + tuple(path for paths in self.images.values() for path in paths)


def task_folders(root: Path) -> list[TaskFolder]:
    """Return the tasks below `root`, or `root` itself. Raises `SourceError` where there are none."""
    if _is_task(root):
        named = root.resolve()
        return [TaskFolder(root, "", (named.parent if _CONFIG.fullmatch(named.name) else named).name)]
    found = []
    for outer in _folders(root):
        for folder in [outer] if _is_task(outer) else [inner for inner in _folders(outer) if _is_task(inner)]:
            name = folder.relative_to(root).as_posix()
            found.append(TaskFolder(folder, name, name.split("/")[0]))
    if not found:
        expected = f"{DATA}/episode0.hdf5 or {PLANS}/episode0.pkl in it or in a folder of it"
        raise SourceError(f"{root} holds no RoboTwin task", expected=expected, fix="--source DIR")
    return found


def episodes_of(folder: TaskFolder, images: str | None) -> list[Files]:
    """Return the episodes of a task in order of their numbers; those with a data file, or else with a path.

    `images` is the folder of the pictures, relative to the task; `{task}` and `{config}` in it stand for the two
    parts of the task's folder. None: `images` below the task, where it exists.
    """
    data, plans = _numbered(folder.root / DATA, (".hdf5",)), _numbered(folder.root / PLANS, (".pkl",))
    texts = _numbered(folder.root / "instructions", (".json",)) | _numbered(folder.root / "instruction", (".json",))
    pictures = _numbered(_images_root(folder, images), ())
    prefix = f"{folder.name}/" if folder.name else ""
    return [
        Files(
            f"{prefix}episode_{number}",
            number,
            folder,
            data.get(number),
            plans.get(number),
            texts.get(number),
            _pictures(pictures[number]) if number in pictures else {},
        )
        for number in sorted(data or plans)
    ]


def unlisted(folder: TaskFolder, images: str | None) -> list[str]:
    """Return a line for each path, text and folder of pictures of a task that belongs to none of `episodes_of`."""
    numbers = {files.number for files in episodes_of(folder, images)}
    places = [
        _numbered(folder.root / PLANS, (".pkl",)),
        _numbered(folder.root / "instructions", (".json",)),
        _numbered(folder.root / "instruction", (".json",)),
        _numbered(_images_root(folder, images), ()),
    ]
    return [
        f"{path} belongs to no episode of {folder.root}"
        for place in places
        for number, path in place.items()
        if number not in numbers
    ]


def choose_text(texts: Iterable[str], number: int, index: int) -> str:
    """Return text `index` (counted round and round), or with -1 that of the episode's own number."""
    listed = list(texts)
    return listed[(number if index < 0 else index) % len(listed)]


def read_texts(path: Path, split: str) -> list[str]:
    """Return the instructions of an episode: `{"seen": [...], "unseen": [...]}`, a list, or one text."""
    return texts_of(_json(path), split, str(path))


def texts_of(value: Any, split: str, where: str) -> list[str]:
    """Return the instructions of a split in decoded JSON. Raises `SourceError` where there are none."""
    if isinstance(value, dict):
        keys = [split, *(("instructions", "instruction") if split == "seen" else ())]
        value = next((value[key] for key in keys if value.get(key)), None)
    elif split != "seen":
        value = None  # a bare list does not say, and is what training uses
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise SourceError(
            f"{where} has no {split} instructions",
            expected=f'{{"{split}": ["..."]}}',
            fix='--set source_options.task="WHAT IS DONE", or source_options.instruction=seen or unseen',
        )
    return texts


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path} has {path.stat().st_size} bytes", expected=f"at most {MAX_JSON_BYTES}")
        return parse_json(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        refuse_pointer(path)
        raise SourceError(f"{path} does not parse: {error}", expected="JSON", fix=SKIP) from None


def _is_task(folder: Path) -> bool:
    return any(next(folder.glob(f"{place}/{name}"), None) for place, name in ((DATA, HDF5), (PLANS, PKL)))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _images_root(folder: TaskFolder, images: str | None) -> Path:
    if images is None:
        return folder.root / "images"
    parts = [*folder.name.split("/"), ""] if folder.name else [folder.task, ""]
    place = folder.root / images.replace("{task}", parts[0]).replace("{config}", parts[1])
    if not place.is_dir():
        raise UsageError(
            f"{place} is no folder", expected="episode0/step_0000.png in it", fix="--set source_options.images=DIR"
        )
    return place


def _numbered(folder: Path, suffixes: tuple[str, ...]) -> dict[int, Path]:
    """Return {episode number: path} of the files with one of the suffixes, or of the folders where there are none."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _EPISODE.fullmatch(path.stem if suffixes else path.name)
        if not match or (path.suffix not in suffixes if suffixes else not path.is_dir()):
            continue
        number = int(match[1])
        if number in found:
            raise SourceError(f"{found[number]} and {path} are both episode {number}", expected="one of them")
        found[number] = path
    return found


def _pictures(episode: Path) -> dict[str, tuple[Path, ...]]:
    """Return the pictures of an episode's folder, or of each camera's folder in it."""
    cameras = {folder.name: _in_order(folder) for folder in _folders(episode)}
    return {ONE_CAMERA: own} if (own := _in_order(episode)) else {name: p for name, p in cameras.items() if p}


def _in_order(folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder by number; gaps are for `require_unbroken` to find."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    return tuple(sorted(files, key=lambda path: (frame_number(path), path.name)))


def frame_number(path: Path) -> int:
    """Return the number that a picture's name ends with, or -1."""
    match = _FRAME.fullmatch(path.stem)
    return int(match[1]) if match else -1


def require_unbroken(paths: tuple[Path, ...], where: str) -> None:
    """Raise `SourceError` where a frame is missing, doubled or not numbered; numbers may begin anywhere."""
    first = frame_number(paths[0])
    for place, path in enumerate(paths):
        if frame_number(path) != first + place or first < 0:
            expected = f"frame {first + place}" if first >= 0 else "a name that ends in its frame's number"
            raise SourceError(f"{where}: {path} comes at frame {place}", expected=expected, fix=SKIP)
