"""Writes small LeRobot data sets, v3.0, v2.1 and v2.0, whose every picture carries its own episode and frame number.

The fixtures of conftest.py import this module on first use: most tests need no encoder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

os.environ.setdefault("SVT_LOG", "1")  # errors only; read by the encoder when it is loaded

import av
import pyarrow as pa
import pyarrow.parquet as pq

SIZE = 64
BITS = 16
H264: dict[str, str] = {"g": "2", "crf": "20", "preset": "ultrafast"}
LONG_GOP = {"g": "250", "bf": "3", "b_strategy": "0", "sc_threshold": "0", "crf": "20", "preset": "veryfast"}
DATA_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V21 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V21 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def picture(episode: int, frame: int, camera: int) -> NDArray[np.uint8]:
    """Draw 16 black or white squares: 6 bits of episode, 8 of frame, 2 of camera. No codec blurs those away."""
    code = episode | frame << 6 | camera << 14
    bits = (code >> np.arange(BITS)) & 1
    side = SIZE // 4
    squares = (bits.reshape(4, 4) * 255).astype(np.uint8).repeat(side, 0).repeat(side, 1)
    return np.repeat(squares[:, :, None], 3, axis=2)


def number_of(image: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Read (episode, frame, camera) back from a picture."""
    side = image.shape[0] // 4
    means = image.astype(float).reshape(4, side, 4, side, 3).mean(axis=(1, 3, 4)).ravel()
    code = int(((means > 128).astype(int) << np.arange(BITS)).sum())
    return code & 63, code >> 6 & 255, code >> 14


def encoded(pixels: NDArray[np.uint8] | Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture to bytes."""
    out = io.BytesIO()
    made = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels)
    made.save(out, kind, **options)
    return out.getvalue()


def write_video(
    path: Path,
    pictures: Sequence[NDArray[np.uint8]],
    *,
    fps: float = 10,
    codec: str = "libx264",
    options: Mapping[str, str] = H264,
    times: Sequence[int] | None = None,
    rotate: int = 0,
    pix_fmt: str = "yuv420p",
) -> None:
    """Encode pictures; `times` are their timestamps in frames (None: 0, 1, …)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=dict(options))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotate:
            stream.set_display_rotation(rotate)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times is not None else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@dataclass
class Plan:
    """What to write. `tables` lets a test change an episode's rows before they are written."""

    version: str = "v3.0"
    lengths: Sequence[int] = (6, 9, 7)
    indices: Sequence[int] | None = None
    fps: float = 10
    cameras: Mapping[str, str] = field(default_factory=lambda: {"observation.images.front": "video"})
    codec: str = "libx264"
    options: Mapping[str, str] = field(default_factory=lambda: H264)
    per_file: int = 2
    one_row_group: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, tuple[dict[str, Any], Callable[[int, int], Any]]] = field(default_factory=dict)
    tables: Callable[[int, dict[str, Any]], None] = lambda episode, table: None
    tasks: Sequence[Sequence[str]] | None = None
    declared: Sequence[str] | None = None
    task_index: Callable[[int, int], int] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    image_bytes: Callable[[NDArray[np.uint8]], bytes] = encoded
    meta_lengths: Mapping[int, int] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        return list(self.indices) if self.indices is not None else list(range(len(self.lengths)))

    @property
    def texts(self) -> list[str]:
        """The texts of meta/tasks: those that the episodes list."""
        if self.declared is not None:
            return list(self.declared)
        listed = [text for number in self.numbers for text in _tasks_of(self, number)]
        return list(dict.fromkeys(listed)) or ["first task", "second task"]

    def task_of(self, number: int, frame: int) -> int:
        """The task_index of a frame: of the first text that its episode lists."""
        if self.task_index is not None:
            return self.task_index(number, frame)
        listed = _tasks_of(self, number)
        return self.texts.index(listed[0]) if listed else number % 2


def action_of(episode: int, frame: int) -> list[float]:
    return [episode + frame / 100, -frame / 7, 0.5]


def write_lerobot(root: Path, **what: Any) -> Path:
    """Write a data set; see `Plan`."""
    plan = Plan(**what)
    files = _placed(plan)
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(_info(plan) | dict(plan.info)))
    index = 0
    for path, members in files.items():
        tables = []
        for number, length in members:
            table = _table(plan, number, length, index)
            index += length
            plan.tables(number, table)
            tables.append(pa.table(table))
        _write_parquet(root / path, tables, plan.one_row_group)
    for camera, (column, kind) in enumerate(plan.cameras.items()):
        for path, members in files.items() if kind == "video" else ():
            shots = [picture(number, frame, camera) for number, length in members for frame in range(length)]
            if shots:
                video = _video_path(plan, path, column)
                write_video(root / video, shots, fps=plan.fps, codec=plan.codec, options=plan.options)
    (_meta_v3 if plan.version == "v3.0" else _meta_v21)(root, plan, files)
    return root


def _placed(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    files: dict[str, list[tuple[int, int]]] = {}
    for position, (number, length) in enumerate(zip(plan.numbers, plan.lengths, strict=True)):
        if plan.version == "v3.0":
            path = DATA_V3.format(chunk_index=0, file_index=position // plan.per_file)
        else:
            path = DATA_V21.format(episode_chunk=number // 1000, episode_index=number)
        files.setdefault(path, []).append((number, length))
    return files


def _video_path(plan: Plan, data: str, column: str) -> str:
    if plan.version == "v3.0":
        return VIDEO_V3.format(video_key=column, chunk_index=0, file_index=int(data[-11:-8]))
    number = int(data[-14:-8])
    return VIDEO_V21.format(video_key=column, episode_chunk=number // 1000, episode_index=number)


def _info(plan: Plan) -> dict[str, Any]:
    def named(name: str) -> str:
        return plan.names.get(name, name)

    vector = {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    features: dict[str, Any] = {
        named("action"): vector,
        named("observation.state"): {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}},
    }
    for column, kind in plan.cameras.items():
        names = ["height", "width", "channels"]
        features[column] = {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": names}
    features |= {name: feature for name, (feature, _) in plan.extra.items()}
    for name, dtype in {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}.items():
        features[named(name)] = {"dtype": dtype, "shape": [1], "names": None}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("index", "task_index")}
    return {
        "codebase_version": plan.version,
        "robot_type": "test",
        "total_episodes": len(plan.lengths),
        "chunks_size": 1000,
        "fps": plan.fps,
        "total_frames": sum(plan.lengths),
        "data_path": DATA_V3 if plan.version == "v3.0" else DATA_V21,
        "video_path": VIDEO_V3 if plan.version == "v3.0" else VIDEO_V21,
        "features": features,
    }


def _table(plan: Plan, number: int, length: int, index: int) -> dict[str, Any]:
    def named(name: str) -> str:
        return plan.names.get(name, name)

    frames = range(length)
    table: dict[str, Any] = {
        named("action"): pa.array([action_of(number, f) for f in frames], pa.list_(pa.float32(), 3)),
        named("observation.state"): pa.array([[number, f] for f in frames], pa.list_(pa.float32())),
        named("timestamp"): pa.array([f / plan.fps for f in frames], pa.float32()),
        named("frame_index"): pa.array(frames, pa.int64()),
        named("episode_index"): pa.array([number] * length, pa.int64()),
        "index": pa.array(range(index, index + length), pa.int64()),
        "task_index": pa.array([plan.task_of(number, f) for f in frames], pa.int64()),
    }
    for camera, (column, kind) in enumerate(plan.cameras.items()):
        if kind == "image":
            cells = [{"bytes": plan.image_bytes(picture(number, f, camera)), "path": f"{f}.png"} for f in frames]
            table[column] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for name, (_, values) in plan.extra.items():
        table[name] = pa.array([values(number, f) for f in frames])
    return table


def _write_parquet(path: Path, tables: list[Any], one_row_group: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in [pa.concat_tables(tables)] if one_row_group else tables:
            writer.write_table(table)


def _tasks_of(plan: Plan, number: int) -> list[str]:
    if plan.tasks is None:
        return [f"task {number % 2}"]
    return list(plan.tasks[plan.numbers.index(number)])


def _meta_v3(root: Path, plan: Plan, files: dict[str, list[tuple[int, int]]]) -> None:
    rows = []
    for path, members in files.items():
        before = 0
        for number, length in members:
            place = {"chunk_index": 0, "file_index": int(path[-11:-8])}
            row: dict[str, Any] = {"episode_index": number, "tasks": _tasks_of(plan, number)}
            row |= {"length": plan.meta_lengths.get(number, length)} | {f"data/{k}": v for k, v in place.items()}
            for column, kind in plan.cameras.items():
                if kind == "video":
                    row |= {f"videos/{column}/{key}": value for key, value in place.items()}
                    row[f"videos/{column}/from_timestamp"] = before / plan.fps
                    row[f"videos/{column}/to_timestamp"] = (before + row["length"]) / plan.fps
            before += length
            rows.append(row)
    folder = root / "meta/episodes/chunk-000"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "file-000.parquet")
    tasks = pa.table({"task_index": range(len(plan.texts)), "__index_level_0__": plan.texts})
    pq.write_table(tasks, root / "meta/tasks.parquet")


def _meta_v21(root: Path, plan: Plan, files: dict[str, list[tuple[int, int]]]) -> None:
    lines = [
        {"episode_index": number, "tasks": _tasks_of(plan, number), "length": plan.meta_lengths.get(number, length)}
        for members in files.values()
        for number, length in members
    ]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [json.dumps({"task_index": index, "task": text}) + "\n" for index, text in enumerate(plan.texts)]
    (root / "meta/tasks.jsonl").write_text("".join(tasks))
