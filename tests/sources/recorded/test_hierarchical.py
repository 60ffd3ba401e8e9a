"""Runs of subtasks (layout A) and of stages (layout B), their texts, and the older data.txt."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.sources.data_txt import read_data_txt
from vla.featurize.sources.hierarchical import HierarchicalSource
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.stage_texts import StageTexts
from vla.stores.errors import SourceError

Write = Callable[..., None]
RUNS_A = ("set table/pick cup/run_2", "set table/pick cup/run_10", "set table/place/run_1", "wipe/pick cup/run_1")
RUNS_B = ("stage1/run_1", "stage2/run_1", "stage10/run_1")
LENGTHS = (4, 6, 5, 3)
TEXTS = {
    "high_level_task": "make the room nice",
    "tasks": {"set table": {"text": "set the table for two", "subtasks": {"place": {"text": "put it down gently"}}}},
    "task_instructions": [
        {"stage": 1, "high_level_task": "clear the table", "subtask": "pick the cup", "text": "grasp the red cup"},
        {"stage": 2, "subtask": "place the cup"},
        {"stage": 10, "subtask": "wave"},
    ],
}


def actions_of(run: int) -> np.ndarray[Any, Any]:
    frames = np.arange(LENGTHS[run])
    return np.stack([frames + 10 * run, frames / 3], axis=1).astype(np.float32)


def write_runs(root: Path, runs: tuple[str, ...], write_pictures: Write) -> Path:
    for number, run in enumerate(runs):
        for camera, view in enumerate(("left_frame", "top")):
            write_pictures(root / run / view, number, LENGTHS[number], camera, "frame_{}.jpg")
        np.save(root / run / "actions.npy", actions_of(number))
        np.save(root / run / "qpos.npy", actions_of(number) * 2)
    return root


@pytest.fixture
def layout_a(tmp_path: Path, write_pictures: Write) -> Path:
    return write_runs(tmp_path / "a", RUNS_A, write_pictures)


@pytest.fixture
def layout_b(tmp_path: Path, write_pictures: Write) -> Path:
    return write_runs(tmp_path / "b", RUNS_B, write_pictures)


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., str]:
    """`texts(**change)` writes an instruction_json; a value None removes the key."""

    def write(**change: Any) -> str:
        file = tmp_path / "instruction.json"
        values = {**TEXTS, **change}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return str(file)

    return write


def test_runs_of_subtasks_are_read_in_natural_order_with_their_own_frames(
    layout_a: Path, number_of: Callable[..., Any]
) -> None:
    source = open_source(layout_a, fps=50)
    assert isinstance(source, HierarchicalSource)
    index = source.index()
    assert [(e.id, e.length) for e in index.episodes] == list(zip(RUNS_A, LENGTHS, strict=True))
    assert (index.cameras, index.fps) == (("left_frame", "top"), 50.0)
    for run in range(len(RUNS_A)):
        np.testing.assert_array_equal(source.steps(run)["action"], actions_of(run))
        np.testing.assert_array_equal(source.steps(run)["state"], actions_of(run) * 2)
        seen = [[number_of(image) for image in views] for views in source.frames(run, 0, LENGTHS[run])]
        assert seen == [[(run, f, 0), (run, f, 1)] for f in range(LENGTHS[run])]


def test_texts_of_subtasks_come_from_the_file_and_else_from_the_folders(
    layout_a: Path, texts: Callable[..., str]
) -> None:
    said = [(e.task, *e.texts.values()) for e in HierarchicalSource(layout_a, fps=50).index().episodes]
    assert said[0] == ("pick cup", "set table", "pick cup", "pick cup")
    index = HierarchicalSource(layout_a, fps=50, instruction_json=texts()).index()
    assert list(index.episodes[0].texts) == ["high_level_task", "subtask", "text"]
    said = [(e.task, *e.texts.values()) for e in index.episodes]
    assert said[0] == said[1] == ("pick cup", "set the table for two", "pick cup", "pick cup")
    assert said[2][:3] == ("put it down gently", "set the table for two", "put it down gently")
    assert said[3][:3] == ("pick cup", "wipe", "pick cup")


def test_texts_of_stages_are_the_entrys_own_then_the_global_task(layout_b: Path, texts: Callable[..., str]) -> None:
    index = open_source(layout_b, fps=50, instruction_json=texts()).index()
    assert [episode.id for episode in index.episodes] == list(RUNS_B)
    said = [(e.task, *e.texts.values()) for e in index.episodes]
    assert said == [
        ("pick the cup", "clear the table", "pick the cup", "grasp the red cup"),
        ("place the cup", "make the room nice", "place the cup", "place the cup"),
        ("wave", "make the room nice", "wave", "wave"),
    ]


def test_a_stage_without_texts_is_refused_never_made_up(layout_b: Path, texts: Callable[..., str]) -> None:
    with pytest.raises(
        SourceError, match=r"stage1 has no instruction_json that says.*source_options\.instruction_json"
    ):
        HierarchicalSource(layout_b, fps=50).index()
    with pytest.raises(SourceError, match=r"instruction\.json: stage 2 has no high_level_task"):
        HierarchicalSource(layout_b, fps=50, instruction_json=texts(high_level_task=None)).index()
    entries = TEXTS["task_instructions"][:1]  # type: ignore[index]
    source = HierarchicalSource(layout_b, fps=50, instruction_json=texts(task_instructions=entries), skip_bad=True)
    assert list(source.index().skipped) == ["stage2/run_1", "stage10/run_1"]
    entries = [{"stage": 1, "text": "x"}]
    with pytest.raises(SourceError, match=r"stage 1 has no subtask"):
        HierarchicalSource(layout_b, fps=50, instruction_json=texts(task_instructions=entries)).index()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", r"json is a list; expected an object"),
        ('{"task_instructions": {}}', "task_instructions is a dict"),
        ('{"task_instructions": [{"subtask": "x"}]}', r"task_instructions\[0\]\.stage is None"),
        ('{"task_instructions": [{"stage": 0}]}', r"stage is 0; expected a count from 1"),
        ('{"task_instructions": [{"stage": true}]}', r"stage is True"),
        (
            '{"task_instructions": [{"stage": 1}, {"stage": 1}]}',
            r"\[1\]\.stage is 1; expected a count from 1, each once",
        ),
        ('{"task_instructions": [{"stage": 1, "subtask": " "}]}', r"\[0\]\.subtask is ' '; expected a text"),
        ('{"high_level_task": 3}', r"high_level_task is '3'"),
        ('{"tasks": []}', "tasks is a list"),
        ('{"tasks": {"a": {"subtasks": {"b": "x"}}}}', r"tasks\.a\.b is a str; expected an object"),
    ],
)
def test_a_bad_instruction_file_is_refused_naming_the_field(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "instruction.json"
    file.write_text(content)
    with pytest.raises(SourceError, match=says) as refused:
        StageTexts.read(file)
    assert str(file) in str(refused.value)


def test_a_missing_instruction_file_is_refused(layout_a: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*absent\.json: No such file"):
        HierarchicalSource(layout_a, fps=50, instruction_json=str(tmp_path / "absent.json")).index()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short qpos": (lambda f: np.save(f / "qpos.npy", np.ones((5, 2))), r"actions\.npy has 6, qpos\.npy has 5, left_f"),
    "lost frame": (lambda f: (f / "top/frame_3.jpg").unlink(), r"top has 5; expected one frame"),
    "lost camera": (lambda f: shutil.rmtree(f / "top"), r"has cameras left_frame; expected left_frame, top"),
    "corrupt jpg": (lambda f: (f / "top/frame_0.jpg").write_bytes(b"\xff\xd8\xff"), r"frame_0\.jpg.*cannot be decoded"),
    "nan": (lambda f: np.save(f / "actions.npy", np.full((6, 2), np.nan)), r"actions\.npy, frame 0 is NaN"),
    "objects": (
        lambda f: np.save(f / "qpos.npy", np.array([[{}]] * 6, object), allow_pickle=True),
        r"qpos\.npy holds values of dtype object",
    ),
    "no actions": (lambda f: (f / "actions.npy").unlink(), r"actions\.npy is missing; expected it, or the older"),
    "no run": (lambda f: f.rename(f.parent / "take_10"), r"take_10 is no run; expected run_<id>"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_run_is_refused_naming_the_file_and_skip_bad_leaves_it_alone_out(what: str, layout_a: Path) -> None:
    damage, pattern = BAD[what]
    damage(layout_a / RUNS_A[1])
    with pytest.raises(SourceError) as refused:
        HierarchicalSource(layout_a, fps=50).index()
    assert re.search(pattern, str(refused.value)), refused.value
    index = HierarchicalSource(layout_a, fps=50, skip_bad=True).index()
    assert not {RUNS_A[0], *RUNS_A[2:]} - {episode.id for episode in index.episodes}
    assert RUNS_A[1] not in {episode.id for episode in index.episodes}
    assert str(refused.value) in index.skipped.values()


def test_a_task_without_runs_is_no_silent_gap(layout_a: Path) -> None:
    (layout_a / "empty task").mkdir()
    with pytest.raises(SourceError, match=r"empty task is no run"):
        HierarchicalSource(layout_a, fps=50).index()


def test_both_layouts_in_one_folder_are_refused(layout_a: Path) -> None:
    (layout_a / "set table/pick cup").rename(layout_a / "stage1")
    with pytest.raises(SourceError, match=r"holds stage1/run… and set table/.*not both"):
        HierarchicalSource(layout_a, fps=50).index()


def test_the_texts_are_part_of_what_a_store_is_bound_to(layout_b: Path, texts: Callable[..., str]) -> None:
    before = HierarchicalSource(layout_b, fps=50, instruction_json=texts()).index().mapping
    after = HierarchicalSource(layout_b, fps=50, instruction_json=texts(high_level_task="other")).index().mapping
    assert before != after
    assert HierarchicalSource(layout_b, fps=50, instruction_json=texts()).index().mapping == before


def lines_of(run: int, first: int = 0) -> str:
    rows = enumerate(actions_of(run).tolist(), first)
    return "".join(
        f"Frame_{n}: time: {n / 50:.2f} action:[{a}, {b}] lrstate:[{2 * a} {2 * b}] done: 0\n" for n, (a, b) in rows
    )


@pytest.mark.parametrize("first", [0, 1])
def test_older_runs_are_read_from_data_txt_as_from_npy(layout_a: Path, first: int) -> None:
    wanted = HierarchicalSource(layout_a, fps=50)
    digest = wanted.digest()
    expected = [wanted.steps(run) for run in range(4)]
    for number, run in enumerate(RUNS_A):
        (layout_a / run / "actions.npy").unlink()
        (layout_a / run / "qpos.npy").unlink()
        (layout_a / run / "data.txt").write_text(lines_of(number, first))
    source = open_source(layout_a, fps=50)
    for run in range(4):
        for name, values in source.steps(run).items():
            np.testing.assert_allclose(values, expected[run][name], rtol=1e-6)
    assert source.digest() != digest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no frames"),
        ("Frame_0: state:[1]\n", r"line 1: no action:\[…\]"),
        ("Frame_0: reaction:[1]\n", r"line 1: no action:\[…\]"),
        ("Frame_0: action:[1]\nFrame_2: action:[1]\n", "line 2: Frame_2; expected Frame_1"),
        ("Frame_0: action:[1, x]\n", r"line 1, action: \[1, x\]; expected numbers"),
        ("Frame_0: action:[1]\nFrame_1: action:[1, 2]\n", "lists of 1 and 2 numbers"),
        ("Frame_0: action:[]\n", "lists of 0 numbers"),
        ("Frame_0: action:[1] lrstate:[1]\nFrame_1: action:[1]\n", r"line 2: no state:\[…\]"),
        ("Frame_0: action:[1]\nFrame_1: action:[1] lrstate:[1]\n", r"line 2: no state:\[…\]"),
        ("Frame_0: action:[nan]\n", "action, frame 0 is NaN"),
        ("hello\n", r"line 1: 'hello'; expected Frame_n"),
    ],
)
def test_a_bad_data_txt_is_refused_naming_the_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text(text)
    with pytest.raises(SourceError, match=says) as refused:
        read_data_txt(file)
    assert str(file) in str(refused.value)


def test_data_txt_without_states_has_none(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("Frame_0: action: [1.5e0, -2]\n\nFrame_1: action: [ 3 , 4 ]\n")
    read = read_data_txt(file)
    assert list(read) == ["action"]
    np.testing.assert_array_equal(read["action"], np.float32([[1.5, -2], [3, 4]]))
