"""Small LeRobot data sets of both versions whose every picture says which episode, frame and camera it is.

Written from the format's description alone, and independent of `rollout/lerobot_writer.py`: a mistake that the reader
and the shipped writer share would show here.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reports errors only; read when it is opened

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image as Pillow

Picture = NDArray[np.uint8]

BLOCK = 16
"""Pixels: a macroblock of H.264, so that each flat block costs a few bits and survives any quantizer."""

HEIGHT, WIDTH = 3 * BLOCK, 4 * BLOCK
"""Not square: a reader that swaps the two fails."""

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264-gop2": ("libx264", {"g": "2", "bf": "0", "crf": "24", "preset": "ultrafast"}),
    "h264-long-gop": (
        "libx264",
        {"g": "600", "bf": "3", "b_strategy": "0", "sc_threshold": "0", "crf": "24", "preset": "veryfast"},
    ),
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "10"}),
}

DATA = {
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
}
VIDEO = {
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}


def has_encoder(codec: str) -> bool:
    """Tell whether this PyAV encodes one of `CODECS`."""
    try:
        av.codec.Codec(CODECS[codec][0], "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def draw(episode: int, frame: int, camera: int = 0) -> Picture:
    """Return 12 blocks of the 8 corners of the RGB cube: 6 octal digits, then their complements as a check."""
    digits = [episode // 8, episode % 8, frame // 64, frame // 8 % 8, frame % 8, camera]
    grid = np.array([*digits, *(7 - digit for digit in digits)]).reshape(3, 4, 1)
    corners = (grid >> np.arange(3) & 1).astype(np.uint8) * 255
    return corners.repeat(BLOCK, 0).repeat(BLOCK, 1)


def read(picture: Picture) -> tuple[int, int, int]:
    """Return (episode, frame, camera) of a drawn picture; the check fails where two pictures got mixed."""
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture.dtype == np.uint8
    means = picture.astype(float).reshape(3, BLOCK, 4, BLOCK, 3).mean(axis=(1, 3)).reshape(12, 3)
    digits = ((means > 127.5) << np.arange(3)).sum(axis=1).tolist()
    assert [7 - digit for digit in digits[:6]] == digits[6:], f"no picture of ours: {digits}"
    return digits[0] * 8 + digits[1], digits[2] * 64 + digits[3] * 8 + digits[4], digits[5]


def png(picture: Picture) -> bytes:
    """Encode without loss."""
    out = io.BytesIO()
    Pillow.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def encode_video(file: Path, pictures: Iterable[Picture], *, codec: str = "h264-gop2", fps: int = 10) -> None:
    """Write an MP4 with one picture every 1/fps s."""
    name, options = CODECS[codec]
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream(name, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def action_of(episode: int, length: int) -> NDArray[np.float32]:
    """Return the actions of an episode, [T, 3]."""
    frames = np.arange(length)
    return np.stack([frames, np.full(length, episode), frames * 0.25 - episode], 1).astype(np.float32)


def state_of(episode: int, length: int) -> NDArray[np.float32]:
    """Return the states of an episode, [T, 2]."""
    return -action_of(episode, length)[:, :2]


def make(
    root: Path,
    *,
    version: str = "v3.0",
    lengths: Sequence[int] = (5, 7, 4),
    cameras: Sequence[str] = ("front", "wrist"),
    stored: str = "video",
    codec: str = "h264-gop2",
    fps: int = 10,
    per_file: int = 100,
    names: tuple[str, str] = ("action", "observation.state"),
    truth: str = "",
) -> Path:
    """Write a data set and return `root`.

    Columns of cameras are `observation.images.<camera>`, `stored` as `video` or as `image` inside parquet. `per_file`
    episodes share a file (v3.0). `names` are those of action and state; `truth` adds a column of simulator truth.
    """
    columns = [f"observation.images.{camera}" for camera in cameras]
    groups = _grouped(len(lengths), per_file if version == "v3.0" else 1)
    for number, members in enumerate(groups):
        place = _place(version, number)
        tables = [_rows(e, lengths, fps, names, truth, columns if stored == "image" else []) for e in members]
        file = root / DATA[version].format(**place)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), file)
        for view, column in enumerate(columns if stored == "video" else []):
            shown = (draw(episode, frame, view) for episode in members for frame in range(lengths[episode]))
            encode_video(root / VIDEO[version].format(video_key=column, **place), shown, codec=codec, fps=fps)
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = _info(version, lengths, fps, names, truth, dict.fromkeys(columns, stored))
    (root / "meta/info.json").write_text(json.dumps(info))
    if version == "v3.0":
        _write_meta_v3(root, groups, lengths, fps, columns if stored == "video" else [])
    else:
        _write_meta_v21(root, lengths)
    return root


def edit_info(root: Path, **values: Any) -> None:
    """Change keys of `meta/info.json`."""
    file = root / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_rows(file: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Rewrite one column of a parquet file; its type stays."""
    table = pq.read_table(file, partitioning=None)
    at = table.column_names.index(column)
    values = pa.array(change(table.column(column).to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(at, table.schema.field(column), values), file)


def _grouped(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _place(version: str, number: int) -> dict[str, int]:
    if version == "v3.0":
        return {"chunk_index": 0, "file_index": number}
    return {"episode_chunk": number // 1000, "episode_index": number}


def _rows(
    episode: int, lengths: Sequence[int], fps: int, names: tuple[str, str], truth: str, pictures: Sequence[str]
) -> Any:
    length = lengths[episode]
    first = sum(lengths[:episode])
    vectors = {names[0]: action_of(episode, length), names[1]: state_of(episode, length)}
    if truth:
        vectors[truth] = 100 + action_of(episode, length)
    columns = {name: pa.array(v.tolist(), pa.list_(pa.float32(), v.shape[1])) for name, v in vectors.items()}
    columns["timestamp"] = pa.array(np.arange(length) / fps, pa.float32())
    columns["frame_index"] = pa.array(range(length), pa.int64())
    columns["episode_index"] = pa.array([episode] * length, pa.int64())
    columns["index"] = pa.array(range(first, first + length), pa.int64())
    columns["task_index"] = pa.array([episode % 2] * length, pa.int64())
    for view, name in enumerate(pictures):
        cells = [{"bytes": png(draw(episode, t, view)), "path": f"{name}-{t:06d}.png"} for t in range(length)]
        columns[name] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def _info(
    version: str, lengths: Sequence[int], fps: int, names: tuple[str, str], truth: str, pictures: dict[str, str]
) -> dict[str, Any]:
    features: dict[str, Any] = {
        names[0]: {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        names[1]: {"dtype": "float32", "shape": [2], "names": None},
    }
    if truth:
        features[truth] = {"dtype": "float32", "shape": [3], "names": None}
    for name, kind in pictures.items():
        features[name] = {"dtype": kind, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": version,
        "robot_type": "drawn",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": DATA[version],
        "video_path": VIDEO[version],
        "features": features,
    }


def _write_meta_v3(
    root: Path, groups: Sequence[Sequence[int]], lengths: Sequence[int], fps: int, videos: Sequence[str]
) -> None:
    rows = []
    for number, members in enumerate(groups):
        begin = 0
        for episode in members:
            row: dict[str, Any] = {
                "episode_index": episode,
                "tasks": [f"task {episode % 2}"],
                "length": lengths[episode],
                "data/chunk_index": 0,
                "data/file_index": number,
            }
            for video in videos:
                row |= {f"videos/{video}/chunk_index": 0, f"videos/{video}/file_index": number}
                row[f"videos/{video}/from_timestamp"] = begin / fps
                row[f"videos/{video}/to_timestamp"] = (begin + lengths[episode]) / fps
            begin += lengths[episode]
            rows.append(row)
    folder = root / "meta/episodes/chunk-000"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "file-000.parquet")
    tasks = {"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")


def _write_meta_v21(root: Path, lengths: Sequence[int]) -> None:
    episodes = [
        {"episode_index": episode, "tasks": [f"task {episode % 2}"], "length": length}
        for episode, length in enumerate(lengths)
    ]
    tasks = [{"task_index": index, "task": f"task {index}"} for index in range(2)]
    for name, lines in (("episodes", episodes), ("tasks", tasks)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
