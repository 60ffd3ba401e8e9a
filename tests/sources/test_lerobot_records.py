"""Records of a LeRobot data set that contradict each other: counts, ranges, indices, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import SourceError

Write = Callable[..., Path]
Edit = Callable[..., None]

FRONT = "observation.images.front"


def rewrite(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)


def episodes_of(root: Path) -> Path:
    return next(root.glob("meta/episodes/*/*.parquet"))


def test_total_frames_is_compared_with_the_episodes(
    version: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path, version=version)
    edit_info(root, total_frames=23)
    with pytest.raises(SourceError, match="total_frames = 23"):
        LeRobotSource(root).index()
    index = LeRobotSource(root, skip_bad=True).index()
    assert (len(index.episodes), len(index.warnings)) == (3, 1)


@pytest.mark.parametrize(
    ("starts", "stops"), [((0, 5, 15), (6, 14, 22)), ((0, 7, 16), (6, 16, 23)), ((0, 6, 15), (6, 14, 22))]
)
def test_ranges_of_episodes_that_overlap_or_leave_gaps_are_refused(
    starts: tuple[int, ...], stops: tuple[int, ...], tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path)

    def place(rows: list[dict[str, Any]]) -> None:
        for row, start, stop in zip(rows, starts, stops, strict=True):
            row |= {"dataset_from_index": start, "dataset_to_index": stop}

    rewrite(episodes_of(root), place)
    with pytest.raises(SourceError, match=r"episode_00000[12]"):
        LeRobotSource(root).index()
    assert len(LeRobotSource(root, skip_bad=True).index().episodes) == 3


def test_the_index_column_runs_through_all_episodes(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    def restart(number: int, table: dict[str, Any]) -> None:
        table["index"] = pa.array(range(len(table["index"])), pa.int64())

    root = write_lerobot(tmp_path, version=version, tables=restart)
    with pytest.raises(SourceError, match="column index"):
        LeRobotSource(root).index()
    index = LeRobotSource(root, skip_bad=True).index()
    assert len(index.episodes) == 3
    assert index.warnings


def test_an_index_column_with_a_hole_inside_an_episode_is_refused(tmp_path: Path, write_lerobot: Write) -> None:
    def hole(number: int, table: dict[str, Any]) -> None:
        table["index"] = pa.array([10 * number + row + (row > 2) for row in range(len(table["index"]))], pa.int64())

    root = write_lerobot(tmp_path, tables=hole)
    with pytest.raises(SourceError, match=r"episode_000000.*row 3 has index"):
        LeRobotSource(root).index()


@pytest.mark.parametrize("kind", ["parquet", "mp4"])
def test_files_that_no_episode_names_are_reported(
    kind: str, version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, version=version)
    folder = root / ("data" if kind == "parquet" else "videos")
    file = sorted(folder.rglob(f"*.{kind}"))[-1]
    stray = file.with_name(f"{file.stem[:-1]}9.{kind}")
    stray.write_bytes(file.read_bytes())
    with pytest.raises(SourceError, match=str(stray)):
        LeRobotSource(root).index()


def test_rows_of_an_episode_that_is_not_listed_are_reported(tmp_path: Path, write_lerobot: Write) -> None:
    info = {"total_episodes": 2, "total_frames": 15}
    root = write_lerobot(tmp_path, per_file=3, info=info, cameras={FRONT: "image"})
    rewrite(episodes_of(root), list.pop)
    with pytest.raises(SourceError, match="episode 2"):
        LeRobotSource(root).index()
