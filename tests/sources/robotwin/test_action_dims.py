"""`vla action-dims`: tasks by the size of action and state, whatever form they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.action_dims import DimsConfig, group, measure, to_json
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]
Segment = Callable[..., dict[str, Any]]


def sizes(source: Path | str, **options: Any) -> dict[str, list[tuple[int, int, int]]]:
    """Return {task: [(action, state, episodes)]}."""
    skip_bad = options.pop("skip_bad", False)
    found: dict[str, list[tuple[int, int, int]]] = {}
    for dims in measure(DimsConfig(source=str(source), source_options=options, skip_bad=skip_bad)):
        assert len(dims.names) in (0, dims.action_dim)
        found.setdefault(dims.task, []).append((dims.action_dim, dims.state_dim, dims.episodes))
    return found


def test_one_hdf5_task(generation: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "stack", generation=generation)
    assert sizes(root) == {"stack": [(14, 14, 3)]}
    assert sizes(root, arms="left") == {"stack": [(7, 7, 3)]}
    assert sizes(root, arms="right", include_gripper=False) == {"stack": [(6, 6, 3)]}


def test_tasks_that_do_not_go_together_are_told_apart(tmp_path: Path, write_task: Write) -> None:
    write_task(tmp_path / "all/a/demo_clean")
    write_task(tmp_path / "all/b", generation="new", dims=(7, 7), lengths=(4,))
    write_task(tmp_path / "all/c", lengths=(4, 4))
    found = {"a/demo_clean": [(14, 14, 3)], "b": [(16, 16, 1)], "c": [(14, 14, 2)]}
    assert sizes(tmp_path / "all") == found
    tasks = measure(DimsConfig(source=str(tmp_path / "all")))
    assert {key: [dims.task for dims in members] for key, members in group(tasks).items()} == {
        (14, 14): ["a/demo_clean", "c"],
        (16, 16): ["b"],
    }


def _forms(segment: Segment) -> dict[str, tuple[Any, int]]:
    path = np.zeros((5, 6))
    return {
        "dicts": ([segment(path), segment(path, "Fail"), segment(path)], 6),
        "dicts with grippers": ([{"position": path, "gripper": 1.0}], 7),
        "arrays": ([path, path], 6),
        "seven joints": ([np.zeros((5, 7))], 7),
        "pairs": ([(path, 0.5)], 7),
        "pairs a step": ([(row, 0.5) for row in path], 7),
        "one array": (path, 6),
        "one step": ([path[0]], 6),
        "lists": (path.tolist(), 6),
    }


@pytest.mark.parametrize("form", ["dicts", "dicts with grippers", "arrays", "seven joints", "pairs", "pairs a step"])
@pytest.mark.parametrize("other", ["dicts", "pairs", "one array", "one step", "lists"])
def test_planner_segments_of_every_form_and_arm(
    form: str, other: str, tmp_path: Path, write_plans: Write, segment: Segment
) -> None:
    (left, columns), (right, others) = _forms(segment)[form], _forms(segment)[other]
    root = write_plans(tmp_path / "stack", [(left, right)])
    assert sizes(root) == {"stack": [(columns + others, 0, 1)]}
    assert sizes(root, arms="left") == {"stack": [(columns, 0, 1)]}
    assert sizes(root, arms="right") == {"stack": [(others, 0, 1)]}


def test_steps_are_not_segments(tmp_path: Path, write_plans: Write, segment: Segment) -> None:
    # The misreading that this replaces: as many "frames" as segments, and a segment's two keys for joints and gripper.
    plans = [([segment(np.zeros((40, 6)))] * n, [segment(np.zeros((30, 6)))] * 3) for n in (2, 7, 14)]
    assert sizes(write_plans(tmp_path / "stack", plans)) == {"stack": [(12, 0, 3)]}


def test_an_arm_that_rests_in_one_episode_counts_as_in_the_others(
    tmp_path: Path, write_plans: Write, segment: Segment
) -> None:
    path = [segment(np.zeros((4, 6)))]
    assert sizes(write_plans(tmp_path / "a", [(path, []), ([], path), (path, path)])) == {"a": [(12, 0, 3)]}
    only_right = write_plans(tmp_path / "b", [([], path), ([segment(np.zeros(0), "Fail")], path)])
    assert sizes(only_right) == {"b": [(6, 0, 2)]}
    with pytest.raises(SourceError, match="no path of the left arm has a successful step"):
        sizes(only_right, arms="left")
    assert sizes(tmp_path, arms="left", skip_bad=True) == {"a": [(6, 0, 3)]}


def test_episodes_of_a_task_that_differ_are_counted_apart(tmp_path: Path, write_plans: Write, segment: Segment) -> None:
    plans = [([segment(np.zeros((4, dim)))], [segment(np.zeros((4, dim)))]) for dim in (6, 7, 6)]
    assert sizes(write_plans(tmp_path / "a", plans)) == {"a": [(12, 0, 2), (14, 0, 1)]}


def test_paths_over_files_come_with_the_files_state(tmp_path: Path, write_task: Write, write_plans: Write) -> None:
    root = write_task(tmp_path / "a", lengths=(4,))
    write_plans(root, [([np.zeros((9, 6))], [np.zeros((7, 6))])])
    assert sizes(root, actions="planner") == {"a": [(12, 14, 1)]}
    assert sizes(root) == {"a": [(14, 14, 1)]}


def test_a_bad_episode_is_an_error_or_left_out(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        if number == 1:
            del file["joint_action/left_arm"]

    root = write_task(tmp_path / "a", edit=edit)
    with pytest.raises(SourceError, match=r"episode1\.hdf5 has no joint_action/left_arm"):
        sizes(root)
    assert sizes(root, skip_bad=True) == {"a": [(14, 14, 2)]}


def test_any_other_source_counts_its_instructions(tmp_path: Path, write_lerobot: Write) -> None:
    assert sizes("synthetic:episodes=4,action_dim=5,state_dim=3") == {
        "reach the blue blob": [(5, 3, 1)],
        "reach the green blob": [(5, 3, 1)],
        "reach the red blob": [(5, 3, 2)],
    }
    root = write_lerobot(tmp_path / "set")
    assert sizes(root) == {"task 0": [(3, 2, 2)], "task 1": [(3, 2, 1)]}


def test_a_folder_of_data_sets_of_any_kind(tmp_path: Path, write_lerobot: Write) -> None:
    for name in ("a", "b"):
        write_lerobot(tmp_path / name)
    assert set(sizes(tmp_path)) == {"a: task 0", "a: task 1", "b: task 0", "b: task 1"}
    with pytest.raises(UsageError, match="no option 'arms'"):
        sizes(tmp_path, arms="left")


def test_the_command_prints_groups(tmp_path: Path, write_task: Write) -> None:
    write_task(tmp_path / "all/a", lengths=(4,))
    write_task(tmp_path / "all/b", dims=(7, 7), lengths=(4,))
    done = CliRunner().invoke(app, ["action-dims", "--source", str(tmp_path / "all"), "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["tasks"] == 2
    assert [(g["action_dim"], g["state_dim"], [t["task"] for t in g["tasks"]]) for g in facts["groups"]] == [
        (14, 14, ["a"]),
        (16, 16, ["b"]),
    ]
    assert facts["groups"][0]["tasks"][0]["action_names"][6] == "left_gripper"
    option = "source_options.include_gripper=false"
    shown = CliRunner().invoke(app, ["action-dims", "--source", str(tmp_path / "all"), "--set", option])
    assert shown.exit_code == 0
    assert "12" in shown.stdout
    assert "left_joint_0" in shown.stdout
    assert to_json(measure(DimsConfig(source="synthetic:episodes=1")))["groups"][0]["action_dim"] == 4
