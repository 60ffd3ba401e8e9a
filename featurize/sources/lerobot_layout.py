"""Which file, rows and seconds belong to which episode, in LeRobot v3.0, v2.1 and v2.0, read into one form.

v3.0: many episodes a file; `meta/episodes/*/*.parquet` names each one's data file and its seconds of each video.
v2.x: one parquet file and one video per camera for each episode; `meta/episodes.jsonl` and `meta/tasks.jsonl`.
Format: LeRobot's `lerobot/datasets/utils.py` and its documentation of LeRobotDataset v3.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from vla.featurize.sources.lerobot_info import CAMERA, CHUNK, EPISODE, INFO, Info, inside, missing_file, parse_object
from vla.featurize.sources.parquet import read_table, schema
from vla.stores.errors import SourceError

EPISODES_V3 = "meta/episodes"
EPISODES_V21 = "meta/episodes.jsonl"
ROWS = ("dataset_from_index", "dataset_to_index")


@dataclass(frozen=True)
class Span:
    """An episode's part of a video: from `start` seconds into `path` (below the root) to `stop` (None: not said)."""

    path: str
    start: float
    stop: float | None


@dataclass(frozen=True)
class EpisodeRow:
    """One episode as the metadata describe it. `data` is its parquet file below the root; `videos` by column.

    `tasks` are texts, or indices of `meta/tasks`; `rows` is (first, stop) in the whole data set (None: not said).
    """

    index: int
    length: int
    tasks: tuple[str | int, ...]
    data: str
    videos: Mapping[str, Span]
    rows: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """The stable key: the data set's own number, whatever the position."""
        return f"episode_{self.index:06d}"


@dataclass(frozen=True)
class Layout:
    """All episodes in the order of their indices. `files` are the metadata files read."""

    rows: tuple[EpisodeRow, ...]
    files: tuple[str, ...]


def read_layout(info: Info, videos: Sequence[str]) -> Layout:
    """Read the episodes, with the spans of the video columns `videos`.

    Raises `SourceError` naming the file that is missing or does not conform, and on an index listed twice.
    """
    episodes, files = (_episodes_v3 if info.version == "v3.0" else _episodes_v2)(info, videos)
    if not episodes:
        raise SourceError(f"{info.root / files[0]} lists no episode", expected="at least one")
    rows = sorted(episodes, key=lambda row: row.index)
    for row, following in itertools.pairwise(rows):
        if row.index == following.index:
            raise SourceError(f"{info.root / files[0]} lists episode {row.index} twice", expected="one entry for each")
    return Layout(tuple(rows), (INFO, *files))


def without_videos(info: Info, videos: Sequence[str]) -> list[str]:
    """Return those of the video columns `videos` that info.json declares and no episode has a file of."""
    if info.version == "v3.0":
        names = set().union(*(schema(inside(info.root, file)).names for file in _files_v3(info)))
        placed = [video for video in videos if f"videos/{video}/chunk_index" in names]
    else:
        placed = list(videos)
    rows = read_layout(info, placed).rows
    found = {video for video in placed if any(_has_file(info.root, row.videos[video].path) for row in rows)}
    return [video for video in videos if video not in found]


def _episodes_v3(info: Info, videos: Sequence[str]) -> tuple[list[EpisodeRow], list[str]]:
    files = _files_v3(info)
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    spans = [f"videos/{video}/{key}" for video in videos for key in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["tasks", *ROWS, *(f"videos/{video}/to_timestamp" for video in videos)]
    rows = []
    for file in files:
        for raw in read_table(inside(info.root, file), [*needed, *spans], optional).to_pylist():
            rows.append(_row_v3(info, raw, videos, file))
    return rows, files


def _has_file(root: Path, relative: str) -> bool:
    """Return whether a file is there; a path that leads out counts, as it is refused where the camera is chosen."""
    try:
        return inside(root, relative).is_file()
    except SourceError:
        return True


def _files_v3(info: Info) -> list[str]:
    """Return the files of `meta/episodes` below the root, at least one."""
    folder = inside(info.root, EPISODES_V3)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.parquet"))
    if not files:
        fix = "convert it with lerobot's converter from v2.1 to v3.0" if (info.root / EPISODES_V21).is_file() else ""
        raise SourceError(f"{folder} holds no chunk-*/file-*.parquet", expected="the episodes of LeRobot v3.0", fix=fix)
    return [f"{EPISODES_V3}/{file}" for file in files]


def _row_v3(info: Info, raw: dict[str, Any], videos: Sequence[str], file: str) -> EpisodeRow:
    try:
        data = info.data_path.format(**_place(raw, "data"))
        spans = {}
        for video in videos:
            path = info.video_path.format(video_key=video, **_place(raw, f"videos/{video}"))
            stop = raw.get(f"videos/{video}/to_timestamp")
            start = _seconds(raw[f"videos/{video}/from_timestamp"])
            spans[video] = Span(path, start, None if stop is None else _seconds(stop))
        first, stop = (raw.get(key) for key in ROWS)
        rows = None if first is None or stop is None else (int(first), int(stop))
        return EpisodeRow(int(raw["episode_index"]), int(raw["length"]), _texts(raw.get("tasks")), data, spans, rows)
    except (TypeError, ValueError):
        where = f"{info.root / file}, episode {raw.get('episode_index')}"
        raise SourceError(f"{where} lacks a place, a length or a timestamp", expected="numbers") from None


def _seconds(value: Any) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def _place(raw: dict[str, Any], prefix: str) -> dict[str, int]:
    return {key: int(raw[f"{prefix}/{key}"]) for key in ("chunk_index", "file_index")}


def _episodes_v2(info: Info, videos: Sequence[str]) -> tuple[list[EpisodeRow], list[str]]:
    rows = []
    for number, raw in enumerate(read_jsonl(info, EPISODES_V21), 1):
        try:
            index, length = int(raw["episode_index"]), int(raw["length"])
        except (KeyError, TypeError, ValueError):
            where = f"{info.root / EPISODES_V21}, line {number}"
            raise SourceError(f"{where} lacks episode_index or length", expected="both, as counts") from None
        place = dict.fromkeys(CHUNK, index // info.chunk_size) | dict.fromkeys(EPISODE, index)
        spans = {
            video: Span(info.video_path.format(**dict.fromkeys(CAMERA, video), **place), 0.0, None) for video in videos
        }
        rows.append(EpisodeRow(index, length, _texts(raw.get("tasks")), info.data_path.format(**place), spans))
    return rows, [EPISODES_V21]


def _texts(tasks: Any) -> tuple[str | int, ...]:
    if isinstance(tasks, str | int):
        tasks = [tasks]
    listed = tasks if isinstance(tasks, list | tuple) else []
    return tuple(task if isinstance(task, int) else str(task) for task in listed)


def read_jsonl(info: Info, name: str) -> list[dict[str, Any]]:
    """Read one object a line. Raises `SourceError` naming the file, and the line that does not parse."""
    file = _existing(info.root, name, f"metadata of LeRobot {info.version}")
    with file.open("rb") as lines:
        return [parse_object(line, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _existing(root: Path, name: str, what: str) -> Path:
    file = inside(root, name)
    if not file.is_file():
        raise missing_file(root, name, what)
    return file
