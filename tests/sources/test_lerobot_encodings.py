"""LeRobot's columns in every encoding that Arrow has for them: one logical type, one value."""

from __future__ import annotations

import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.featurize.sources.lerobot import LeRobotSource

Write = Callable[..., Path]
Edit = Callable[..., None]


def told(source: LeRobotSource) -> list[str]:
    return [episode.task for episode in source.index().episodes]


def recast(column: str, kind: Any) -> Callable[[int, dict[str, Any]], None]:
    """Return an edit that writes a column's values in another type."""

    def edit(number: int, table: dict[str, Any]) -> None:
        table[column] = pa.array(table[column].to_pylist(), kind)

    return edit


VECTORS = {
    "large_list": pa.large_list(pa.float64()),
    "list_view": pa.list_view(pa.float32()),
    "large_list_view": pa.large_list_view(pa.float64()),
    "fixed_size_list of halves": pa.list_(pa.float16(), 2),
    "list of int8": pa.list_(pa.int8()),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_are_read_from_every_kind_of_list(kind: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, tables=recast("observation.state", VECTORS[kind]))
    np.testing.assert_array_equal(LeRobotSource(root).steps(1)["state"], [[1, frame] for frame in range(9)])


def test_vectors_nested_in_lists_are_read(tmp_path: Path, write_lerobot: Write) -> None:
    def nest(number: int, table: dict[str, Any]) -> None:
        table["observation.state"] = pa.array([[row] for row in table["observation.state"].to_pylist()])

    root = write_lerobot(tmp_path, tables=nest)
    np.testing.assert_array_equal(LeRobotSource(root).steps(1)["state"], [[1, frame] for frame in range(9)])


CLOCKS = {
    "float64": (pa.float64(), lambda second: second),
    "timestamp us": (pa.timestamp("us"), lambda second: round(second * 1e6)),
    "timestamp ns": (pa.timestamp("ns", tz="UTC"), lambda second: round(second * 1e9)),
    "duration ms": (pa.duration("ms"), lambda second: round(second * 1e3)),
    "time64 us": (pa.time64("us"), lambda second: round(second * 1e6)),
    "time32 ms": (pa.time32("ms"), lambda second: round(second * 1e3)),
    "decimal": (pa.decimal128(10, 3), lambda second: decimal.Decimal(f"{second:.3f}")),
}


@pytest.mark.parametrize("kind", CLOCKS)
def test_timestamps_are_seconds_however_they_are_stored(kind: str, tmp_path: Path, write_lerobot: Write) -> None:
    stored, ticks = CLOCKS[kind]

    def retime(number: int, table: dict[str, Any]) -> None:
        table["timestamp"] = pa.array([ticks(row / 10) for row in range(len(table["timestamp"]))], stored)

    root = write_lerobot(tmp_path, tables=retime)
    np.testing.assert_allclose(LeRobotSource(root).steps(1)["timestamp"], np.arange(9) / 10, atol=1e-9)


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint16(), pa.uint64(), pa.float64(), pa.dictionary(pa.int8(), pa.int64())]
)
def test_integers_may_have_any_width(kind: Any, tmp_path: Path, write_lerobot: Write) -> None:
    def recast_all(number: int, table: dict[str, Any]) -> None:
        for column in ("episode_index", "frame_index", "task_index", "index"):
            recast(column, kind)(number, table)

    source = LeRobotSource(write_lerobot(tmp_path, tasks=[[], [], []], tables=recast_all))
    assert told(source) == ["first task", "second task", "first task"]
    assert source.steps(1)["frame_index"].tolist() == list(range(9))


@pytest.mark.parametrize("kind", [pa.bool_(), pa.uint8(), pa.int64()])
def test_flags_may_be_booleans_or_integers(kind: Any, tmp_path: Path, write_lerobot: Write) -> None:
    flag = {"next.done": ({"dtype": "bool", "shape": [1], "names": None}, lambda episode, frame: frame == 5)}

    def cast(number: int, table: dict[str, Any]) -> None:
        table["next.done"] = table["next.done"].cast(kind)

    source = LeRobotSource(write_lerobot(tmp_path, extra=flag, tables=cast))
    np.testing.assert_array_equal(source.steps(0)["next.done"], [False] * 5 + [True])


@pytest.mark.parametrize("dtype", ["float", "double", "timestamp[us]"])
def test_types_that_info_json_writes_in_other_words_are_read(
    dtype: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["timestamp"]["dtype"] = features["action"]["dtype"] = dtype
    edit_info(root, features=features)
    assert LeRobotSource(root).steps(1)["action"].shape == (9, 3)


TEXTS = {
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large strings": pa.dictionary(pa.int8(), pa.large_string()),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["__index_level_0__", "task"])
def test_tasks_are_read_from_every_encoding_of_text(kind: str, name: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, tasks=[[], [], []])
    table = {"task_index": pa.array([0, 1], pa.int32()), name: pa.array(["open", "close"]).cast(TEXTS[kind])}
    pq.write_table(pa.table(table), root / "meta/tasks.parquet")
    assert told(LeRobotSource(root)) == ["open", "close", "open"]


def test_an_index_that_pandas_keeps_as_metadata_alone_is_read(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    note = {"index_columns": [{"kind": "range", "name": "task_index", "start": 0, "stop": 2, "step": 1}]}
    table = pa.table({"task": ["task 0", "task 1"]}).replace_schema_metadata({"pandas": json.dumps(note)})
    pq.write_table(table, root / "meta/tasks.parquet")
    assert told(LeRobotSource(root)) == ["task 0", "task 1", "task 0"]
    for file in (root / "data").rglob("*.parquet"):
        rows = pq.read_table(file)
        first, last = rows["index"][0].as_py(), rows["index"][-1].as_py()
        note["index_columns"] = [{"kind": "range", "name": "index", "start": first, "stop": last + 1, "step": 1}]
        kept = rows.drop_columns(["index"]).replace_schema_metadata({"pandas": json.dumps(note)})
        pq.write_table(kept, file, row_group_size=4)
    assert LeRobotSource(root).index().warnings == ()
