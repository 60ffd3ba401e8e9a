"""Planner segments: joined, failed ones skipped, in every form; aligned to frames by equal lengths or by a rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.sources.registry import open_source
from vla.featurize.sources.robotwin import RoboTwinSource
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]
Joints = Callable[..., NDArray[np.float64]]
Segment = Callable[..., dict[str, Any]]


def action(root: Path, **options: Any) -> NDArray[np.generic]:
    return RoboTwinSource(root, **options).steps(0)["action"]


def test_segments_are_joined_in_order_and_failed_ones_skipped(
    tmp_path: Path, write_plans: Write, joints: Joints, segment: Segment
) -> None:
    path = joints("left", 0, 9)
    parts = [segment(path[:4]), segment(path[:0], "Fail"), segment(path[4:5]), segment(path[5:])]
    root = write_plans(tmp_path / "task", [(parts, [segment(joints("right", 0, 9))])])
    source = open_source(root)
    index = source.index()
    assert (index.kind, index.pictures, index.cameras) == ("robotwin-planner", False, ())
    assert index.episodes[0].length == 9
    assert set(source.steps(0)) == {"action", "timestamp", "frame_index"}
    np.testing.assert_array_equal(
        source.steps(0)["action"], np.concatenate([path, joints("right", 0, 9)], axis=1).astype(np.float32)
    )


def _forms() -> dict[str, tuple[Callable[[NDArray[np.float64]], Any], int]]:
    """Return {form: (a path [n, 6] in that form, how many columns it has)}."""
    return {
        "segment dicts": (lambda p: [{"status": "Success", "position": p[:2]}, {"position": p[2:]}], 6),
        "segment dicts with grippers": (lambda p: [{"position": p, "gripper": np.full(len(p), 0.5)}], 7),
        "arrays of segments": (lambda p: [p[:2], p[2:]], 6),
        "one array": (lambda p: p, 6),
        "float32": (lambda p: [p.astype(np.float32)], 6),
        "an array a step": (lambda p: list(p), 6),
        "lists of numbers": (lambda p: p.tolist(), 6),
        "one segment": (lambda p: {"status": "Success", "position": p}, 6),
        "pairs a step": (lambda p: [(row, 0.5) for row in p], 7),
        "pairs a segment, one gripper": (lambda p: [(p[:2], 0.5), (p[2:], 0.5)], 7),
        "pairs a segment, a gripper a step": (lambda p: [(p, np.full((len(p), 1), 0.5))], 7),
        "pairs as lists": (lambda p: [[row.tolist(), 0.5] for row in p], 7),
        "one pair": (lambda p: (p, np.full(len(p), 0.5)), 7),
    }


@pytest.mark.parametrize("form", _forms())
def test_a_path_has_many_forms_and_one_meaning(form: str, tmp_path: Path, write_plans: Write, joints: Joints) -> None:
    make, columns = _forms()[form]
    path = joints("left", 0, 5)
    root = write_plans(tmp_path / "task", [(make(path), make(path))])
    wanted = np.concatenate([path, np.full((5, columns - 6), 0.5)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(action(root, arms="left"), wanted)
    np.testing.assert_array_equal(action(root), np.concatenate([wanted, wanted], axis=1))
    np.testing.assert_array_equal(action(root, arms="right", include_gripper=False), wanted[:, :6])
    assert RoboTwinSource(root).dimensions()[0].action_dim == 2 * columns


def test_two_numbers_are_joints_and_no_pair(tmp_path: Path, write_plans: Write) -> None:
    root = write_plans(tmp_path / "task", [([(0.1, 0.2), (0.3, 0.4)], [])])
    np.testing.assert_allclose(action(root, arms="left"), [[0.1, 0.2], [0.3, 0.4]], rtol=1e-6)


def test_a_gripper_that_is_wanted_and_absent_is_no_constant(tmp_path: Path, write_plans: Write, joints: Joints) -> None:
    root = write_plans(tmp_path / "task", [([joints("left", 0, 5)], [])])
    with pytest.raises(SourceError, match=r"the left arm has no gripper; .*include_gripper=false"):
        RoboTwinSource(root, arms="left", include_gripper=True).index()


def test_an_arm_that_never_moved_is_not_made_up(
    tmp_path: Path, write_plans: Write, joints: Joints, segment: Segment
) -> None:
    failed = [segment(joints("left", 0, 0), "Fail")] * 2
    root = write_plans(tmp_path / "task", [(failed, [segment(joints("right", 0, 4))])])
    message = r"episode0\.pkl: left_joint_path has no successful step \(2 segments, 2 failed\); .*arms=right"
    with pytest.raises(SourceError, match=message):
        RoboTwinSource(root).index()
    np.testing.assert_array_equal(action(root, arms="right"), joints("right", 0, 4).astype(np.float32))
    with pytest.raises(SourceError, match="left_joint_path has no successful step"):
        RoboTwinSource(root, arms="left").index()


def test_arms_of_unequal_lengths_need_a_rule(
    tmp_path: Path, write_plans: Write, joints: Joints, segment: Segment
) -> None:
    root = write_plans(tmp_path / "task", [([segment(joints("left", 0, 5))], [segment(joints("right", 0, 9))])])
    with pytest.raises(SourceError, match=r"the arms have left 5 and right 9 steps; .*resample=linear"):
        RoboTwinSource(root).index()
    made = action(root, resample="linear")
    assert made.shape == (9, 12)
    np.testing.assert_array_equal(made[:, 6:], joints("right", 0, 9).astype(np.float32))
    np.testing.assert_allclose(made[::2, :6], joints("left", 0, 5), atol=1e-6)
    np.testing.assert_allclose(made[1, :6], joints("left", 0, 5)[:2].mean(axis=0), atol=1e-6)


def test_frames_that_a_path_does_not_fit_are_refused_without_a_rule(
    tmp_path: Path, write_plans: Write, write_images: Write, joints: Joints, segment: Segment
) -> None:
    root = write_plans(tmp_path / "task", [([segment(joints("left", 0, 13))], [])])
    write_images(root / "images", [5])
    message = r"episode0\.pkl: the path of the left arm has 13 steps; expected 5 as there are frames. .*resample=linear"
    with pytest.raises(SourceError, match=message):
        RoboTwinSource(root, arms="left").index()
    made = action(root, arms="left", resample="linear")
    np.testing.assert_allclose(made, joints("left", 0, 13)[::3], atol=1e-6)


def test_one_step_is_held_and_one_frame_is_the_first_step(
    tmp_path: Path, write_plans: Write, write_images: Write, joints: Joints
) -> None:
    root = write_plans(tmp_path / "task", [(joints("left", 0, 1), []), (joints("left", 1, 7), [])])
    write_images(root / "images", [3, 1])
    source = RoboTwinSource(root, arms="left", resample="linear")
    np.testing.assert_array_equal(source.steps(0)["action"], np.repeat(joints("left", 0, 1), 3, 0).astype(np.float32))
    np.testing.assert_array_equal(source.steps(1)["action"], joints("left", 1, 7)[:1].astype(np.float32))


@pytest.mark.parametrize("cameras", [("",), ("front", "wrist")])
def test_pictures_in_folders_are_frames(
    cameras: tuple[str, ...],
    tmp_path: Path,
    write_plans: Write,
    write_images: Write,
    joints: Joints,
    number_of: Callable[..., tuple[int, int, int]],
) -> None:
    root = write_plans(tmp_path / "task", [(joints("left", n, 4 + n), []) for n in range(2)])
    write_images(root / "images", [4, 5], cameras)
    source = RoboTwinSource(root, arms="left")
    assert source.index().cameras == (("head_camera",) if cameras == ("",) else cameras)
    assert source.index().extras == ()
    seen = [[number_of(view) for view in views] for views in source.frames(1, 1, 5)]
    assert seen == [[(1, frame, camera) for camera in range(len(cameras))] for frame in range(1, 5)]
    (view, *_), *_ = source.frames(0, 1, 2)
    assert view[..., 0].mean() > 1.5 * view[..., 2].mean()  # files are RGB: nothing is exchanged


def test_pictures_may_lie_elsewhere_by_task(
    tmp_path: Path, write_plans: Write, write_images: Write, joints: Joints
) -> None:
    for task in ("lift_pot", "stack"):
        write_plans(tmp_path / "raw" / task / "demo_randomized", [(joints("left", 0, 4), [])])
        write_images(tmp_path / f"rgb/{task}-demo_randomized-20_head_camera", [4])
    images = str(tmp_path / "rgb/{task}-{config}-20_head_camera")
    source = open_source(tmp_path / "raw", arms="left", images=images)
    assert [len(list(source.frames(n, 0, 4))) for n in range(2)] == [4, 4]
    assert [e.task for e in source.index().episodes] == ["lift pot", "stack"]
    with pytest.raises(UsageError, match=r"rgb/lift_pot is no folder; .*source_options\.images=DIR"):
        open_source(tmp_path / "raw", arms="left", images=str(tmp_path / "rgb/{task}")).index()


def test_paths_over_the_frames_of_a_file_come_with_its_state(
    tmp_path: Path, write_task: Write, write_plans: Write, joints: Joints, generation: str
) -> None:
    root = write_task(tmp_path / "task", generation=generation, lengths=(4,))
    write_plans(root, [([joints("left", 5, 10)], [joints("right", 5, 10)])])
    assert RoboTwinSource(root).index().kind != "robotwin-planner"  # joints, where they are there
    source = RoboTwinSource(root, actions="planner", resample="linear", include_gripper=False)
    frames = 4 if generation == "old" else 3
    assert source.index().episodes[0].length == frames
    np.testing.assert_array_equal(source.steps(0)["state"][:, :6], joints("left", 0, frames).astype(np.float32))
    np.testing.assert_allclose(source.steps(0)["action"][-1, :6], joints("left", 5, 10)[-1], rtol=1e-6)
    with pytest.raises(SourceError, match=f"has 10 steps; expected {frames} as there are frames"):
        RoboTwinSource(root, actions="planner").index()


def test_joints_may_come_with_pictures_from_folders(
    tmp_path: Path, write_task: Write, write_images: Write, number_of: Callable[..., tuple[int, int, int]]
) -> None:
    root = write_task(tmp_path / "task", lengths=(4,), knows=False)
    write_images(tmp_path / "rgb", [4], ("front",))
    source = RoboTwinSource(root, images=str(tmp_path / "rgb"))
    assert source.index().cameras == ("front",)
    assert [number_of(view) for (view,) in source.frames(0, 0, 3)] == [(0, frame, 0) for frame in range(3)]


def test_a_source_without_pictures_says_so(tmp_path: Path, write_plans: Write, joints: Joints) -> None:
    source = RoboTwinSource(write_plans(tmp_path / "task", [(joints("left", 0, 4), [])]), arms="left")
    with pytest.raises(SourceError, match=r"episode_0 in .* has no pictures. Try: --set source_options\.images=DIR"):
        source.frames(0, 0, 1)


BAD: dict[str, tuple[Any, str]] = {
    "NaN": ([np.zeros((3, 6)), np.array([[0.0] * 6, [np.nan] * 6])], "segment 1, step 1 is NaN or infinite"),
    "infinite gripper": ([(np.zeros((2, 6)), np.array([0.0, np.inf]))], "gripper, step 1 is NaN or infinite"),
    "dims differ": ([np.zeros((3, 6)), np.zeros((3, 7))], "segment 1 has 7 joints and 0 of a gripper; expected 6"),
    "gripper comes and goes": ([np.zeros((3, 6)), (np.zeros((3, 6)), 1.0)], "segment 1 has 6 joints and 1 of a gri"),
    "gripper length": ([(np.zeros((3, 6)), np.zeros(2))], "segment 0 has 3 steps of joints and 2 of the gripper"),
    "three axes": ([np.zeros((3, 6, 2))], r"segment 0 has shape \(3, 6, 2\)"),
    "no position": ([{"status": "Success"}], "segment 0 has status 'Success' and the keys status"),
    "unknown status": ([{"status": "Maybe", "position": np.zeros((1, 6))}], "segment 0 has status 'Maybe'"),
    "texts": ([np.array(["a"])], "segment 0 is <U1"),
    "ragged": ([[[1.0, 2.0], [3.0]]], "segment 0 is list"),
    "None": ([None], "segment 0 is NoneType"),
    "no joints": ([np.zeros((3, 0))], r"segment 0 has shape \(3, 0\)"),
    "no segments": ([], "no successful step"),
    "no steps": ([np.zeros((0, 6))], "no successful step"),
    "a number": (3.5, r"segment 0 has shape \(\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_path_is_refused_by_arm_and_segment(name: str, tmp_path: Path, write_plans: Write) -> None:
    value, message = BAD[name]
    root = write_plans(tmp_path / "task", [(np.zeros((2, 6)), np.zeros((2, 6))), (np.zeros((2, 6)), value)])
    with pytest.raises(SourceError, match=rf"episode1\.pkl.*right_joint_path.*{message}"):
        RoboTwinSource(root).index()
    source = RoboTwinSource(root, skip_bad=True)
    assert list(source.index().skipped) == ["episode_1"]
    assert [episode.id for episode in source.index().episodes] == ["episode_0"]


def test_a_file_of_other_keys_is_refused(tmp_path: Path, write_plans: Write) -> None:
    root = write_plans(tmp_path / "task", [([], [])])
    (root / "_traj_data/episode0.pkl").write_bytes(b"\x80\x04}\x8c\x01aK\x01s.")
    with pytest.raises(SourceError, match=r"episode0\.pkl holds the keys \['a'\]; expected left_joint_path"):
        RoboTwinSource(root).index()
    (root / "_traj_data/episode0.pkl").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(SourceError, match=r"episode0\.pkl asks for os\.system"):
        RoboTwinSource(root).index()
