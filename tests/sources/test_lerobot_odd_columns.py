"""LeRobot's columns that hold other than info.json says, or not all of it: what is read, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import SourceError

Write = Callable[..., Path]
NUMBER = {"dtype": "float32", "shape": [1], "names": None}
COUNT = {"dtype": "int64", "shape": [1], "names": None}


def adding(column: str, make: Callable[[int], Any]) -> Callable[[int, dict[str, Any]], None]:
    """Return an edit that adds a column; `make` gets the number of rows."""

    def edit(number: int, table: dict[str, Any]) -> None:
        table[column] = make(len(table["index"]))

    return edit


def without(column: str) -> Callable[[int, dict[str, Any]], None]:
    def edit(number: int, table: dict[str, Any]) -> None:
        del table[column]

    return edit


def declare(root: Path, **features: Any) -> Path:
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    info["features"] |= features
    file.write_text(json.dumps(info))
    return root


UNREADABLE: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "nothing": (NUMBER, pa.nulls),
    "integers with gaps": (COUNT, lambda n: pa.array([None, *range(n - 1)], pa.int64())),
    "lists of several lengths": (NUMBER, lambda n: pa.array([[1.0] * (1 + row % 3) for row in range(n)])),
    "wider lists than declared": ({**NUMBER, "shape": [3]}, lambda n: pa.array([[1.0] * 4] * n)),
    "fractions declared as integers": (COUNT, lambda n: pa.array([1.5] * n, pa.float32())),
    "counts above the declared integers": ({**COUNT, "dtype": "int8"}, lambda n: pa.array([300] * n)),
    "texts declared as numbers": (NUMBER, lambda n: pa.array(["a"] * n)),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_an_extra_column_that_cannot_be_read_is_left_out(
    what: str, version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    spec, make = UNREADABLE[what]
    root = declare(write_lerobot(tmp_path, version=version, tables=adding("extra", make)), extra=spec)
    index = LeRobotSource(root).index()
    assert "extra" not in index.steps
    assert len(index.episodes) == 3
    assert not index.skipped
    assert "extra" not in LeRobotSource(root).steps(1)
    if what != "texts declared as numbers":  # columns of text are never steps
        assert any("extra" in line for line in index.warnings)


def test_an_extra_column_that_a_file_lacks_is_left_out(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, tables=adding("extra", lambda n: pa.array([1.0] * n)))
    last = sorted(root.glob("data/*/*"))[-1]
    pq.write_table(pq.read_table(last).drop_columns("extra"), last)
    index = LeRobotSource(root).index()
    assert "extra" not in index.steps
    assert any("extra" in line for line in index.warnings)


def test_a_column_that_is_asked_for_has_to_be_read(tmp_path: Path, write_lerobot: Write) -> None:
    make = UNREADABLE["lists of several lengths"][1]
    root = write_lerobot(tmp_path, tables=adding("extra", make))
    with pytest.raises(SourceError, match="extra"):
        LeRobotSource(root, map={"extra": "extra"}).index()


def test_gaps_in_an_extra_column_of_fractions_are_nan(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, tables=adding("reward", lambda n: pa.array([None] + [0.5] * (n - 1), pa.float64())))
    np.testing.assert_array_equal(LeRobotSource(root).steps(0)["reward"], [np.nan] + [0.5] * 5)


def test_a_gap_in_the_actions_is_refused_by_its_row(tmp_path: Path, write_lerobot: Write) -> None:
    def spoil(number: int, table: dict[str, Any]) -> None:
        rows = table["action"].to_pylist()
        rows[2][1] = None
        table["action"] = pa.array(rows, pa.list_(pa.float32(), 3))

    with pytest.raises(SourceError, match="action, frame 2"):
        LeRobotSource(write_lerobot(tmp_path, tables=spoil)).index()


NESTED: dict[str, Any] = {
    "one list": ["a", "b"],
    "a list in a list": [["a", "b"]],
    "a list for each part": [["a"], ["b"]],
    "one group": {"motors": ["a", "b"]},
    "a group for each part": {"left": ["a"], "right": ["b"]},
    "groups in groups": {"arms": {"left": ["a"], "right": ["b"]}},
    "places": {"b": 1, "a": 0},
}


@pytest.mark.parametrize("how", NESTED)
def test_component_names_are_read_however_they_are_nested(how: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    spec = {"dtype": "float32", "shape": [2], "names": NESTED[how]}
    assert LeRobotSource(declare(root, **{"observation.state": spec})).index().steps["state"].names == ("a", "b")


def test_names_of_another_number_than_the_components_are_no_names(tmp_path: Path, write_lerobot: Write) -> None:
    spec = {"dtype": "float32", "shape": [2], "names": {"left": ["a"], "right": ["b", "c"]}}
    assert (
        LeRobotSource(declare(write_lerobot(tmp_path), **{"observation.state": spec})).index().steps["state"].names
        == ()
    )


def test_an_annotation_without_any_text_is_no_text(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, tables=adding("annotation.note", lambda n: pa.array([None] * n, pa.string())))
    assert LeRobotSource(root).index().episodes[0].texts == {}


def test_rows_without_a_text_have_no_instruction(tmp_path: Path, write_lerobot: Write) -> None:
    make = adding("annotation.note", lambda n: pa.array([None] + ["reach"] * (n - 1), pa.string()))
    root = write_lerobot(tmp_path, tables=make)
    assert LeRobotSource(root).index().episodes[0].texts == {"annotation.note": "reach"}
    with pytest.raises(SourceError, match=r"annotation\.note"):
        LeRobotSource(root, annotation="note").index()


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.string())])
def test_an_instruction_in_words_that_changes_is_kept_for_each_frame(
    kind: Any, version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    wrap = (lambda text: text) if kind == pa.string() else (lambda text: [text])
    words = adding("annotation.subtask", lambda n: pa.array([wrap("reach")] * 2 + [wrap("grasp")] * (n - 2), kind))
    source = LeRobotSource(write_lerobot(tmp_path, version=version, tables=words), annotation="subtask")
    episode = source.index().episodes[0]
    assert (episode.task, episode.texts["task_0"], episode.texts["task_1"]) == ("reach; grasp", "reach", "grasp")
    np.testing.assert_array_equal(source.steps(0)["task_index"], [0, 0, 1, 1, 1, 1])
    assert source.index().steps["task_index"].dtype == "int64"


def test_rows_without_timestamps_are_aligned_by_index(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Any
) -> None:
    root = write_lerobot(tmp_path, version=version, tables=without("timestamp"))
    with pytest.raises(SourceError, match=r"source_options\.align=index"):
        LeRobotSource(root).index()
    source = LeRobotSource(root, align="index")
    np.testing.assert_allclose(source.steps(1)["timestamp"], np.arange(9) / 10)
    assert [number_of(images[0])[:2] for images in source.frames(1, 0, 9)] == [(1, frame) for frame in range(9)]


def test_timestamps_that_repeat_name_the_option_that_reads_them(tmp_path: Path, write_lerobot: Write) -> None:
    def stop(number: int, table: dict[str, Any]) -> None:
        table["timestamp"] = pa.array([0.0] * len(table["index"]), pa.float32())

    root = write_lerobot(tmp_path, tables=stop)
    with pytest.raises(SourceError, match=r"source_options\.align=index"):
        LeRobotSource(root).index()
    assert len(LeRobotSource(root, align="index").index().episodes) == 3


def test_a_video_off_its_rate_names_the_option_that_reads_it(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any
) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(6,))
    video = next(root.glob("videos/*/*/*"))
    write_video(video, [picture(0, frame, 0) for frame in range(6)], times=[0, 1, 3, 4, 5, 7])
    source = LeRobotSource(root)
    with pytest.raises(SourceError, match=r"source_options\.align=index"):
        list(source.frames(0, 0, 6))
    assert len(list(LeRobotSource(root, align="index").frames(0, 0, 6))) == 6


def test_frame_numbers_may_begin_anywhere(version: str, tmp_path: Path, write_lerobot: Write, number_of: Any) -> None:
    def shift(number: int, table: dict[str, Any]) -> None:
        table["frame_index"] = pa.array(range(7, 7 + len(table["index"])), pa.int64())

    source = LeRobotSource(write_lerobot(tmp_path, version=version, tables=shift))
    np.testing.assert_array_equal(source.steps(1)["frame_index"], np.arange(9))
    assert number_of(next(iter(source.frames(1, 4, 5)))[0])[:2] == (1, 4)


def test_a_number_of_a_task_may_be_text_and_a_task_without_text_is_none(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1", declared=["task 0", "task 1"])
    lines = [{"task_index": "0", "task": "zero"}, {"task_index": 1, "task": "one"}, {"task_index": 2, "task": None}]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [episode.task for episode in LeRobotSource(root).index().episodes] == ["zero", "one", "zero"]
