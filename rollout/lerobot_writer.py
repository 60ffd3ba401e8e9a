"""Write demonstrations as a LeRobot v3.0 data set (https://huggingface.co/docs/lerobot/lerobot-dataset-v3).

```
meta/info.json, meta/stats.json, meta/tasks.parquet
meta/episodes/chunk-000/file-000.parquet                one row an episode: where its frames are, its statistics
data/chunk-000/file-000.parquet                         one row a frame; many episodes a file
videos/observation.images.<camera>/chunk-000/file-000.mp4
```
Everything is written into a hidden folder beside the output and gets its name at the end, so a data set that is
there is whole. The same episodes give the same bytes with the same versions of PyAV and pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.rollout.lerobot_stats import LEVELS, Stats, column_stats, image_histogram, image_stats
from vla.rollout.video_writer import CODEC, PIXEL_FORMAT, VideoFile
from vla.stores.errors import DataError, UsageError
from vla.stores.filesystem import PARTIAL, digest_file, explaining, fsync_dir, fsync_tree
from vla.stores.owned import DATA_SET, remove_owned, require_owned

# The defaults of LeRobot's v3.0 format.
CHUNKS_SIZE = 1000
DATA_FILES_SIZE_IN_MB = 100
VIDEO_FILES_SIZE_IN_MB = 200

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

_BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class VectorFeature:
    """A float32 [D] column with one name a component. `privileged` marks what a real robot would not know."""

    names: tuple[str, ...]
    privileged: bool = False


@dataclass(frozen=True)
class Summary:
    """What was written: `sha256` is that of `find data meta videos -type f | LC_ALL=C sort | xargs sha256sum`."""

    episodes: int
    frames: int
    bytes: int
    sha256: str


@dataclass
class _Camera:
    """The state of one camera's files: the open one, its number, and the histogram of all frames so far."""

    file: VideoFile
    number: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, LEVELS), np.int64))


class LeRobotWriter:
    """Writes one data set; use it as a context manager, which deletes what was not published.

    `vectors` names the columns beside the bookkeeping ones; every episode then brings each of them, and one list of
    uint8 [image_size, image_size, 3] pictures for each of `cameras`. `info` is added to `meta/info.json`.

    Raises `UsageError` where `out` exists: with `overwrite` it has to be a LeRobot data set or an empty folder.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        vectors: Mapping[str, VectorFeature],
        cameras: Sequence[str],
        image_size: int,
        fps: float,
        robot_type: str,
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        data_files_size_in_mb: float = DATA_FILES_SIZE_IN_MB,
        video_files_size_in_mb: float = VIDEO_FILES_SIZE_IN_MB,
    ) -> None:
        out = Path(out)
        if image_size % 2:
            raise UsageError(f"image size {image_size}", expected="an even number: H.264 halves the colour planes")
        refuse_existing(out, overwrite=overwrite)
        out = self._out = out.resolve()  # behind a link, the data set is replaced where the link leads
        self._vectors, self._image_size, self._robot_type = dict(vectors), image_size, robot_type
        self._fps = Fraction(fps).limit_denominator(1001)
        self._info = dict(info or {})
        self._limits = {"data": data_files_size_in_mb, "video": video_files_size_in_mb}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in (*vectors, *_BOOKKEEPING)}
        self._frames = 0
        self._data_number = 0
        self._pending: list[pa.Table] = []
        self.folder = out.with_name(f".{out.name}.{os.getpid()}{PARTIAL}")
        """Where the files are until they are published; more files may be put there."""
        with explaining(self.folder):
            out.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "meta").mkdir(parents=True)
        self._cameras = {camera: _Camera(self._open_video(camera, 0)) for camera in cameras}

    def add_episode(
        self, vectors: Mapping[str, NDArray[np.float32]], images: Mapping[str, Sequence[Image]], task: str
    ) -> None:
        """Append one episode: float32 [T, D] for every vector feature, T pictures for every camera."""
        length = self._check(vectors, images)
        with explaining(self.folder):
            self._add(vectors, images, task, length)

    def _add(
        self,
        vectors: Mapping[str, NDArray[np.float32]],
        images: Mapping[str, Sequence[Image]],
        task: str,
        length: int,
    ) -> None:
        number = len(self._episodes)
        columns: dict[str, NDArray[np.generic]] = {name: vectors[name] for name in self._vectors}
        frame = np.arange(length)
        columns["timestamp"] = (frame / float(self._fps)).astype(np.float32)
        columns["frame_index"] = frame
        columns["episode_index"] = np.full(length, number)
        columns["index"] = self._frames + frame
        columns["task_index"] = np.full(length, self._tasks.setdefault(task, len(self._tasks)))
        self._episodes.append(
            {"episode_index": number, "tasks": [task], "length": length}
            | self._add_rows(columns)
            | {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
            | self._add_frames(images, length)
            | _flat_stats({name: column_stats(column) for name, column in columns.items()})
        )
        for name, column in columns.items():
            self._columns[name].append(column)
        self._frames += length

    def seal(self) -> Summary:
        """Finish every file. Raises `DataError` where no episode was added."""
        if not self._episodes:
            raise DataError("no episode was recorded", expected="at least one")
        with explaining(self.folder):
            return self._seal()

    def _seal(self) -> Summary:
        for camera in self._cameras.values():
            camera.file.close()
        self._flush_rows()
        stats = {name: column_stats(np.concatenate(parts)) for name, parts in self._columns.items()}
        for name, camera in self._cameras.items():
            stats[video_key(name)] = image_stats(camera.histogram, self._frames)
        self._write_json("meta/stats.json", stats)
        tasks = pd.DataFrame({"task_index": list(self._tasks.values())}, index=list(self._tasks))
        tasks.to_parquet(self.folder / "meta/tasks.parquet")
        self._write_episodes()
        self._write_json("meta/info.json", self._describe())
        return summarise(self.folder, len(self._episodes), self._frames)

    def publish(self) -> None:
        """Give the folder its name, durably; an overwritten data set is deleted only then."""
        old = self._out.with_name(f".{self._out.name}.{os.getpid()}.old{PARTIAL}")
        with explaining(self._out):
            fsync_tree(self.folder)
            if self._out.exists():
                require_owned(self._out, DATA_SET)  # once more: recording took hours
                self._out.rename(old)
            self.folder.rename(self._out)
            fsync_dir(self._out.parent)
            remove_owned(old, DATA_SET)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.folder.exists():
            return
        try:
            for camera in self._cameras.values():
                camera.file.close()
        except OSError:
            pass  # the disk that made recording fail may make closing fail; the files are deleted next
        finally:
            shutil.rmtree(self.folder)

    def _check(self, vectors: Mapping[str, NDArray[np.float32]], images: Mapping[str, Sequence[Image]]) -> int:
        """Return the episode's length. Raises `DataError` naming the first column or camera that does not fit."""
        if set(vectors) != set(self._vectors) or set(images) != set(self._cameras):
            raise DataError(
                f"an episode with {', '.join([*vectors, *images])}",
                expected=", ".join([*self._vectors, *self._cameras]),
            )
        length = len(next(iter(vectors.values())))
        for name, feature in self._vectors.items():
            found, expected = vectors[name].shape, (length, len(feature.names))
            if found != expected or length == 0:
                raise DataError(f"{name} is {list(found)}", expected=f"{list(expected)}, at least one frame")
            if not np.isfinite(vectors[name]).all():
                raise DataError(f"{name} holds NaN or infinite values", expected="finite numbers")
        shape = (self._image_size, self._image_size, 3)
        for camera, pictures in images.items():
            wrong = [picture.shape for picture in pictures if picture.shape != shape or picture.dtype != np.uint8]
            if len(pictures) != length or wrong:
                raise DataError(f"camera {camera} has {len(pictures)} frames", expected=f"{length}, uint8 {shape}")
        return length

    def _add_rows(self, columns: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
        arrays = {}
        for name, column in columns.items():
            if name in self._vectors:
                flat = pa.array(np.ascontiguousarray(column, np.float32).ravel())
                arrays[name] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
            else:
                arrays[name] = pa.array(column)
        table = pa.table(arrays)
        pending = sum(part.nbytes for part in self._pending)
        if self._pending and pending + table.nbytes > self._limits["data"] * 2**20:
            self._flush_rows()
            self._data_number += 1
        self._pending.append(table)
        chunk, file = divmod(self._data_number, CHUNKS_SIZE)
        return {"data/chunk_index": chunk, "data/file_index": file}

    def _flush_rows(self) -> None:
        path = self.folder / _place(DATA_PATH, self._data_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(self._pending).combine_chunks(), path)
        self._pending = []

    def _add_frames(self, images: Mapping[str, Sequence[Image]], length: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, camera in self._cameras.items():
            if camera.file.frames and camera.file.estimated_bytes(length) > self._limits["video"] * 2**20:
                camera.file.close()
                camera.number += 1
                camera.file = self._open_video(name, camera.number)
            first = camera.file.frames
            camera.file.append(images[name])
            histogram = image_histogram(list(images[name]))
            camera.histogram += histogram
            key = f"videos/{video_key(name)}"
            row[f"{key}/chunk_index"], row[f"{key}/file_index"] = divmod(camera.number, CHUNKS_SIZE)
            row[f"{key}/from_timestamp"] = float(first / self._fps)
            row[f"{key}/to_timestamp"] = float((first + length) / self._fps)
            row |= _flat_stats({video_key(name): image_stats(histogram, length)})
        return row

    def _open_video(self, camera: str, number: int) -> VideoFile:
        path = self.folder / _place(VIDEO_PATH, number, video_key=video_key(camera))
        return VideoFile(path, fps=self._fps, height=self._image_size, width=self._image_size)

    def _write_episodes(self) -> None:
        size = pa.Table.from_pylist(self._episodes).nbytes / len(self._episodes)
        rows = max(int(self._limits["data"] * 2**20 / size), 1)
        for number, start in enumerate(range(0, len(self._episodes), rows)):
            chunk, file = divmod(number, CHUNKS_SIZE)
            place = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            path = self.folder / _place(EPISODES_PATH, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row | place for row in self._episodes[start : start + rows]]), path)

    def _describe(self) -> dict[str, Any]:
        size, fps = self._image_size, float(self._fps)
        video = {
            "video.height": size,
            "video.width": size,
            "video.codec": CODEC,
            "video.pix_fmt": PIXEL_FORMAT,
            "video.is_depth_map": False,
            "video.fps": int(fps) if fps.is_integer() else fps,
            "video.channels": 3,
            "has_audio": False,
        }
        features: dict[str, Any] = {}
        for name, vector in self._vectors.items():
            features[name] = {"dtype": "float32", "shape": [len(vector.names)], "names": list(vector.names)}
            if vector.privileged:
                features[name]["privileged"] = True
        for camera in self._cameras:
            features[video_key(camera)] = {
                "dtype": "video",
                "shape": [size, size, 3],
                "names": ["height", "width", "channels"],
                "info": video,
            }
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _BOOKKEEPING.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": self._limits["data"],
            "video_files_size_in_mb": self._limits["video"],
            "fps": video["video.fps"],
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        } | self._info

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` where `out` is taken. `overwrite` replaces LeRobot data sets that hold nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "meta" / "info.json").is_file():
        raise UsageError(f"{out} exists and is no LeRobot data set", expected="a new folder", fix="another --out")
    if not overwrite:
        raise UsageError(f"{out} exists: refuse to replace it", expected="a new folder", fix="--overwrite")
    require_owned(out, DATA_SET)


def video_key(camera: str) -> str:
    """Return the feature name of a camera, as LeRobot spells it."""
    return f"observation.images.{camera}"


def summarise(folder: Path, episodes: int, frames: int) -> Summary:
    """Measure the data, meta and videos of a data set; see `Summary` for the digest."""
    found = [path for part in ("data", "meta", "videos") for path in (folder / part).rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    listing = "".join(f"{digest_file(files[name])}  {name}\n" for name in sorted(files))
    size = sum(path.stat().st_size for path in found)
    return Summary(episodes, frames, size, hashlib.sha256(listing.encode()).hexdigest())


def _place(pattern: str, number: int, **keys: str) -> str:
    chunk, file = divmod(number, CHUNKS_SIZE)
    return pattern.format(chunk_index=chunk, file_index=file, **keys)


def _flat_stats(stats: Mapping[str, Stats]) -> dict[str, Any]:
    return {f"stats/{name}/{key}": value for name, values in stats.items() for key, value in values.items()}
