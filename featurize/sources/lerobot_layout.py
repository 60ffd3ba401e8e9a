"""Which file, rows and seconds belong to which episode, in LeRobot v3.0 and v2.1, read into one form.

v3.0: many episodes a file; `meta/episodes/*/*.parquet` names each one's data file and its seconds of each video.
v2.1: one parquet file and one video per camera for each episode; `meta/episodes.jsonl` and `meta/tasks.jsonl`.
Format: LeRobot's `lerobot/datasets/utils.py` and its documentation of LeRobotDataset v3.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vla.featurize.sources.lerobot_info import INFO, Info, inside, missing_file, parse_object
from vla.featurize.sources.parquet import read_table, schema
from vla.stores.errors import SourceError

EPISODES_V3 = "meta/episodes"
EPISODES_V21 = "meta/episodes.jsonl"


@dataclass(frozen=True)
class Span:
    """An episode's part of a video: from `start` seconds into `path` (below the root) to `stop` (None: not said)."""

    path: str
    start: float
    stop: float | None


@dataclass(frozen=True)
class EpisodeRow:
    """One episode as the metadata describe it. `data` is its parquet file below the root; `videos` by column."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: str
    videos: Mapping[str, Span]

    @property
    def id(self) -> str:
        """The stable key: the data set's own number, whatever the position."""
        return f"episode_{self.index:06d}"


@dataclass(frozen=True)
class Layout:
    """All episodes in the order of their indices. `files` are the metadata files read; `tasks` {task_index: text}."""

    rows: tuple[EpisodeRow, ...]
    files: tuple[str, ...]
    tasks: Mapping[int, str]


def read_layout(info: Info, videos: Sequence[str]) -> Layout:
    """Read the episodes, with the spans of the video columns `videos`.

    Raises `SourceError` naming the file that is missing or does not conform, and on an index listed twice.
    """
    episodes, files = (_episodes_v3 if info.version == "v3.0" else _episodes_v21)(info, videos)
    if not episodes:
        raise SourceError(f"{info.root / files[0]} lists no episode", expected="at least one")
    rows = sorted(episodes, key=lambda row: row.index)
    for row, following in itertools.pairwise(rows):
        if row.index == following.index:
            raise SourceError(f"{info.root / files[0]} lists episode {row.index} twice", expected="one entry for each")
    tasks: dict[int, str] = {}
    if not all(row.tasks for row in rows):
        tasks, tasks_file = _tasks(info)
        files.append(tasks_file)
    return Layout(tuple(rows), (INFO, *files), tasks)


def _episodes_v3(info: Info, videos: Sequence[str]) -> tuple[list[EpisodeRow], list[str]]:
    folder = inside(info.root, EPISODES_V3)
    files = sorted(path.relative_to(info.root).as_posix() for path in folder.glob("*/*.parquet"))
    if not files:
        fix = "convert it with lerobot's converter from v2.1 to v3.0" if (info.root / EPISODES_V21).is_file() else ""
        raise SourceError(f"{folder} holds no chunk-*/file-*.parquet", expected="the episodes of LeRobot v3.0", fix=fix)
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    spans = [f"videos/{video}/{key}" for video in videos for key in ("chunk_index", "file_index", "from_timestamp")]
    ends = [f"videos/{video}/to_timestamp" for video in videos]
    rows = []
    for file in files:
        for raw in read_table(inside(info.root, file), [*needed, *spans], ["tasks", *ends]).to_pylist():
            rows.append(_row_v3(info, raw, videos, file))
    return rows, files


def _row_v3(info: Info, raw: dict[str, Any], videos: Sequence[str], file: str) -> EpisodeRow:
    try:
        data = info.data_path.format(**_place(raw, "data"))
        spans = {}
        for video in videos:
            path = info.video_path.format(video_key=video, **_place(raw, f"videos/{video}"))
            stop = raw.get(f"videos/{video}/to_timestamp")
            start = float(raw[f"videos/{video}/from_timestamp"])
            spans[video] = Span(path, start, None if stop is None else float(stop))
        return EpisodeRow(int(raw["episode_index"]), int(raw["length"]), _texts(raw.get("tasks")), data, spans)
    except (TypeError, ValueError):
        where = f"{info.root / file}, episode {raw.get('episode_index')}"
        raise SourceError(f"{where} lacks a place, a length or a timestamp", expected="numbers") from None


def _place(raw: dict[str, Any], prefix: str) -> dict[str, int]:
    return {key: int(raw[f"{prefix}/{key}"]) for key in ("chunk_index", "file_index")}


def _episodes_v21(info: Info, videos: Sequence[str]) -> tuple[list[EpisodeRow], list[str]]:
    rows = []
    for number, raw in enumerate(_read_jsonl(info, EPISODES_V21), 1):
        try:
            index, length = int(raw["episode_index"]), int(raw["length"])
        except (KeyError, TypeError, ValueError):
            where = f"{info.root / EPISODES_V21}, line {number}"
            raise SourceError(f"{where} lacks episode_index or length", expected="both, as counts") from None
        place = {"episode_chunk": index // info.chunk_size, "episode_index": index}
        spans = {video: Span(info.video_path.format(video_key=video, **place), 0.0, None) for video in videos}
        rows.append(EpisodeRow(index, length, _texts(raw.get("tasks")), info.data_path.format(**place), spans))
    return rows, [EPISODES_V21]


def _texts(tasks: Any) -> tuple[str, ...]:
    if isinstance(tasks, str):
        tasks = [tasks]
    return tuple(str(task) for task in tasks) if isinstance(tasks, list | tuple) else ()


def _tasks(info: Info) -> tuple[dict[int, str], str]:
    """Return {task_index: text} and the file it is from; in v3.0 the text is the pandas index, under any name."""
    if info.version == "v2.1":
        name = "meta/tasks.jsonl"
        table = _read_jsonl(info, name)
        pairs = [(raw.get("task_index"), raw.get("task")) for raw in table]
    else:
        name = "meta/tasks.parquet"
        file = _existing(info.root, name, "the texts of the tasks")
        text = next((field.name for field in schema(file) if pa.types.is_string(field.type)), "task")
        columns = read_table(file, ["task_index", text]).to_pydict()
        pairs = list(zip(columns["task_index"], columns[text], strict=True))
    tasks = {index: text for index, text in pairs if isinstance(index, int) and isinstance(text, str)}
    if len(tasks) != len(pairs):
        raise SourceError(f"{info.root / name} has a line without task_index or task", expected="both, once")
    return tasks, name


def _read_jsonl(info: Info, name: str) -> list[dict[str, Any]]:
    file = _existing(info.root, name, f"metadata of LeRobot {info.version}")
    with file.open("rb") as lines:
        return [parse_object(line, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _existing(root: Path, name: str, what: str) -> Path:
    file = inside(root, name)
    if not file.is_file():
        raise missing_file(root, name, what)
    return file
