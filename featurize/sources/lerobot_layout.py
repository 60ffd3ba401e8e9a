"""Where LeRobot data sets keep things: versions 3.0 and 2.1 on disk, read into one form.

v3.0: many episodes a file; `meta/episodes/*/*.parquet` says which rows and which seconds of which video are whose.
v2.1: one parquet and one video per camera for each episode; `meta/episodes.jsonl` and `meta/tasks.jsonl`.
Format facts: https://huggingface.co/docs/lerobot (LeRobotDataset v2.1 and v3.0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from vla.stores.errors import SourceError

INFO = "meta/info.json"
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Clip:
    """An episode's part of a video file: it begins `start` seconds into `path` (relative to the root)."""

    path: str
    start: float


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode as the metadata describe it. `data` is its parquet file; `clips` the video of each video camera."""

    index: int
    length: int
    task: str
    data: str
    clips: dict[str, Clip]


@dataclass(frozen=True)
class Layout:
    """The metadata of a data set. `features` is info.json's: name -> {"dtype", "shape", "names", …}."""

    root: Path
    version: str
    fps: float
    features: dict[str, dict[str, Any]]
    episodes: tuple[EpisodeRecord, ...]
    files: tuple[str, ...]
    licence: str

    @property
    def cameras(self) -> tuple[str, ...]:
        """Columns that hold pictures, as video or as images."""
        return tuple(name for name, spec in self.features.items() if spec.get("dtype") in ("video", "image"))


def read_layout(root: Path) -> Layout:
    """Read a data set's metadata. Raises `SourceError` naming the file that is missing or does not fit."""
    info = _read_json(root / INFO)
    version = str(info.get("codebase_version", "none"))
    if version not in ("v3.0", "v2.1"):
        fix = "convert it with lerobot's own converter (v2.0 to v2.1, v2.1 to v3.0)"
        raise SourceError(f"{root / INFO}: codebase_version is {version}", expected="v3.0 or v2.1", fix=fix)
    for key in ("fps", "features", "data_path"):
        if key not in info:
            raise SourceError(f"{root / INFO} has no {key!r}", expected=f"LeRobot {version} metadata")
    features = {str(name): dict(spec) for name, spec in info["features"].items()}
    videos = tuple(name for name, spec in features.items() if spec.get("dtype") == "video")
    if videos and not info.get("video_path"):
        raise SourceError(
            f"{root / INFO} has video features and no 'video_path'", expected=f"LeRobot {version} metadata"
        )
    episodes, meta = (_episodes_v3 if version == "v3.0" else _episodes_v21)(root, info, videos)
    if not episodes:
        raise SourceError(f"{root} has no episodes", expected="at least one")
    licence = str(info.get("license", "unknown"))
    return Layout(root, version, float(info["fps"]), features, tuple(episodes), (INFO, *meta), licence)


def inside(root: Path, path: str) -> Path:
    """Return `root / path`. Raises `SourceError` where that leaves the data set (`..`, absolute, a link outwards)."""
    file = root / path
    if not file.resolve().is_relative_to(root.resolve()):
        raise SourceError(f"{path} leads out of {root}", expected="a path inside the data set")
    return file


def _episodes_v3(root: Path, info: dict[str, Any], videos: tuple[str, ...]) -> tuple[list[EpisodeRecord], list[str]]:
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise SourceError(f"{root / 'meta/episodes'} holds no chunk-*/file-*.parquet", expected="LeRobot v3.0 metadata")
    episodes = []
    for file in files:
        needed = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
        needed += [
            f"videos/{camera}/{key}" for camera in videos for key in ("chunk_index", "file_index", "from_timestamp")
        ]
        for row in read_columns(file, needed).to_pylist():
            clips = {
                camera: Clip(
                    _format(root, info["video_path"], video_key=camera, **_place(row, f"videos/{camera}")),
                    float(row[f"videos/{camera}/from_timestamp"]),
                )
                for camera in videos
            }
            data = _format(root, info["data_path"], **_place(row, "data"))
            task = str(row["tasks"][0]) if row["tasks"] else ""
            episodes.append(EpisodeRecord(int(row["episode_index"]), int(row["length"]), task, data, clips))
    return episodes, [file.relative_to(root).as_posix() for file in files]


def _episodes_v21(root: Path, info: dict[str, Any], videos: tuple[str, ...]) -> tuple[list[EpisodeRecord], list[str]]:
    chunk_size = int(info.get("chunks_size", 1000))
    episodes = []
    for row in _read_jsonl(root / "meta/episodes.jsonl"):
        try:
            index, length, tasks = int(row["episode_index"]), int(row["length"]), row.get("tasks") or [""]
        except (KeyError, TypeError, ValueError):
            raise SourceError(
                f"{root / 'meta/episodes.jsonl'}: {row}", expected="episode_index, length, tasks"
            ) from None
        place = {"episode_chunk": index // chunk_size, "episode_index": index}
        clips = {cam: Clip(_format(root, info["video_path"], video_key=cam, **place), 0.0) for cam in videos}
        data = _format(root, info["data_path"], **place)
        episodes.append(EpisodeRecord(index, length, str(tasks[0]), data, clips))
    return episodes, ["meta/episodes.jsonl"]


def _place(row: dict[str, Any], prefix: str) -> dict[str, int]:
    return {key: int(row[f"{prefix}/{key}"]) for key in ("chunk_index", "file_index")}


def _format(root: Path, template: str, **values: Any) -> str:
    try:
        path = str(template).format(**values)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise SourceError(f"{root / INFO}: path template {template!r}", expected=f"only {', '.join(values)}") from None
    inside(root, path)
    return path


def read_columns(file: Path, columns: list[str]) -> Any:
    """Read columns of a parquet file as a pyarrow table. Raises `SourceError` naming file and missing columns."""
    if not file.is_file():
        raise SourceError(f"{file} is missing", expected="the parquet file that the metadata name")
    try:
        reader = pq.ParquetFile(file)
        names = set(reader.schema_arrow.names)
        missing = [name for name in columns if name not in names]
        if missing:
            raise SourceError(
                f"{file} has no column {', '.join(missing)}", expected=f"one of {', '.join(sorted(names))}"
            )
        return reader.read(columns=columns)
    except (ArrowInvalid, OSError) as error:
        raise SourceError(f"{file} cannot be read: {error}", expected="a parquet file") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SourceError(
            f"{file} is missing", expected="a LeRobot data set", fix="the folder that holds meta/info.json"
        )
    if file.stat().st_size > MAX_JSON_BYTES:
        raise SourceError(f"{file} has {file.stat().st_size} bytes", expected="metadata")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise SourceError(f"{file} is not JSON", expected="LeRobot metadata") from None
    if not isinstance(value, dict) or not isinstance(value.get("features", {}), dict):
        raise SourceError(f"{file} holds no table of features", expected="LeRobot metadata")
    return value


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise SourceError(f"{file} is missing", expected="LeRobot v2.1 metadata")
    try:
        return [dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, TypeError, RecursionError):
        raise SourceError(f"{file} is not one JSON object a line", expected="LeRobot v2.1 metadata") from None
