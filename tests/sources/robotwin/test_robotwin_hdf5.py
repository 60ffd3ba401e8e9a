"""RoboTwin's HDF5 files: both generations, actions and states, pictures, what cameras know besides, instructions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.sources.base import ViewSource
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.robotwin import RoboTwinSource
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]
Joints = Callable[..., NDArray[np.float64]]


def test_a_task_of_either_generation_is_recognised(generation: str, tmp_path: Path, write_task: Write) -> None:
    source = open_source(write_task(tmp_path / "beat_block", generation=generation))
    assert isinstance(source, RoboTwinSource)
    assert isinstance(source, ViewSource)
    index = source.index()
    assert index.kind == {"old": "robotwin-hdf5", "new": "robotwin-xpolicylab"}[generation]
    assert [(e.id, e.length, e.task) for e in index.episodes] == [
        ("episode_0", 3, "do 0"),
        ("episode_1", 5, "do 1"),
        ("episode_2", 4, "do 2"),
    ]
    assert index.fps == {"old": 15.0, "new": 20.0}[generation]
    assert index.extras == ("depth", "intrinsics", "pose")


def test_the_action_is_the_next_frames_joints(
    generation: str, tmp_path: Path, write_task: Write, joints: Joints, gripper: Joints
) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", generation=generation))
    names = source.index().steps["action"].names
    assert names[:7] == (*(f"left_joint_{n}" for n in range(6)), "left_gripper")
    assert names[7:] == (*(f"right_joint_{n}" for n in range(6)), "right_gripper")
    whole = np.concatenate(
        [p for s in ("left", "right") for p in (joints(s, 1, 6), gripper(s, 6)[:, None])], axis=1
    ).astype(np.float32)
    steps = source.steps(1)
    np.testing.assert_array_equal(steps["action"], whole[1:])
    np.testing.assert_array_equal(steps["state"], whole[:-1])
    np.testing.assert_allclose(steps["timestamp"], np.arange(5) / source.index().fps)
    assert steps["frame_index"].tolist() == [0, 1, 2, 3, 4]
    assert {name: values.dtype.name for name, values in steps.items()} == {
        name: spec.dtype for name, spec in source.index().steps.items()
    }


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"arms": "left"}, [*range(7)]),
        ({"arms": "right"}, [*range(7, 14)]),
        ({"arms": "fused", "include_gripper": False}, [*range(6), *range(7, 13)]),
        ({"arms": "right", "include_gripper": False}, [*range(7, 13)]),
        ({"include_gripper": True}, [*range(14)]),
    ],
)
def test_arms_and_grippers_are_chosen(
    generation: str, options: dict[str, Any], columns: list[int], tmp_path: Path, write_task: Write
) -> None:
    root = write_task(tmp_path / "task", generation=generation)
    whole, part = RoboTwinSource(root), open_source(root, **options)
    for name in ("action", "state"):
        np.testing.assert_array_equal(part.steps(2)[name], whole.steps(2)[name][:, columns])
        chosen = tuple(whole.index().steps[name].names[column] for column in columns)
        assert part.index().steps[name].names == chosen
    assert part.digest() == whole.digest()
    assert part.index().mapping != whole.index().mapping


def test_arms_of_unequal_sizes_are_joined(generation: str, tmp_path: Path, write_task: Write) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", generation=generation, dims=(7, 6)))
    assert source.index().steps["action"].shape == (15,)
    assert source.index().steps["action"].names[6:9] == ("left_joint_6", "left_gripper", "right_joint_0")


def test_same_keeps_the_last_frame_and_gives_no_state(tmp_path: Path, write_task: Write, joints: Joints) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task"), alignment="same", arms="left", include_gripper=False)
    assert source.index().episodes[0].length == 4
    assert "state" not in source.index().steps
    np.testing.assert_array_equal(source.steps(0)["action"], joints("left", 0, 4).astype(np.float32))


def test_a_newer_file_without_actions_is_shifted(tmp_path: Path, write_task: Write, joints: Joints) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", generation="new", with_action=False), arms="left")
    assert source.index().episodes[0].length == 3
    np.testing.assert_array_equal(source.steps(0)["action"][:, :6], joints("left", 0, 4)[1:].astype(np.float32))


def test_frames_are_those_of_their_steps_in_rgb(
    generation: str, tmp_path: Path, write_task: Write, number_of: Callable[..., tuple[int, int, int]]
) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", generation=generation))
    assert (
        source.index().cameras
        == {
            "old": ("head_camera", "left_camera"),
            "new": ("cam_head", "cam_left_wrist"),
        }[generation]
    )
    for episode, length in enumerate((3, 5, 4)):
        seen = [[number_of(view) for view in views] for views in source.frames(episode, 0, length)]
        assert seen == [[(episode, frame, 0), (episode, frame, 1)] for frame in range(length)]
    (view, _), *_ = source.frames(1, 3, 4)
    assert number_of(view) == (1, 3, 0)
    assert view[..., 0].mean() > 1.5 * view[..., 2].mean()  # the tint: half the blue
    assert list(source.frames(1, 2, 2)) == []


def test_channels_may_be_those_that_the_decoder_gives(tmp_path: Path, write_task: Write) -> None:
    (view, _), *_ = RoboTwinSource(write_task(tmp_path / "task"), channels="rgb").frames(0, 1, 2)
    assert view[..., 2].mean() > 1.5 * view[..., 0].mean()


def test_cameras_are_chosen_in_order(
    tmp_path: Path, write_task: Write, number_of: Callable[..., tuple[int, int, int]]
) -> None:
    source = open_source(write_task(tmp_path / "task"), cameras=["left_camera", "head_camera"])
    assert source.index().cameras == ("left_camera", "head_camera")
    assert [number_of(view)[2] for view in next(iter(source.frames(0, 0, 1)))] == [1, 0]


@pytest.mark.parametrize("form", ["vlen", "raw"])
def test_pictures_may_be_vectors_of_bytes_or_raw(
    form: str, tmp_path: Path, write_task: Write, number_of: Callable[..., tuple[int, int, int]], picture: Any
) -> None:
    def edit(number: int, file: h5py.File) -> None:
        place = "observation/left_camera/rgb"
        jpegs = [bytes(item) for item in file[place][()]]
        del file[place]
        if form == "raw":
            file[place] = np.stack([picture(number, frame, 1) for frame in range(len(jpegs))])
            return
        data = file.create_dataset(place, (len(jpegs),), h5py.vlen_dtype(np.uint8))
        for frame, jpeg in enumerate(jpegs):
            data[frame] = np.frombuffer(jpeg, np.uint8)

    source = RoboTwinSource(write_task(tmp_path / "task", edit=edit), cameras=["left_camera"])
    assert [number_of(view) for (view,) in source.frames(2, 0, 4)] == [(2, frame, 1) for frame in range(4)]


def test_depth_is_in_metres_and_poses_are_opencv_camera_to_world(
    generation: str, tmp_path: Path, write_task: Write, number_of: Callable[..., tuple[int, int, int]]
) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", generation=generation))
    first, second = source.views(1, 1, 3, ("image", "depth", "intrinsics", "pose"))
    assert [number_of(view["image"]) for view in first] == [(1, 1, 0), (1, 1, 1)]
    for view in (*first, *second):
        assert {name: (values.shape, values.dtype.name) for name, values in view.items()} == {
            "image": ((64, 64, 3), "uint8"),
            "depth": ((64, 64), "float32"),
            "intrinsics": ((3, 3), "float32"),
            "pose": ((4, 4), "float32"),
        }
        # A point of the world at the camera's own place is at its origin; its axes are those of extrinsic_cv's rows.
        inward = np.array([[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
        np.testing.assert_allclose(view["pose"] @ inward, np.eye(4), atol=1e-6)
        assert view["intrinsics"].tolist() == [[50, 0, 32], [0, 50, 32], [0, 0, 1]]
    millimetres = 1502.0 if generation == "old" else 1500.0
    np.testing.assert_allclose(second[0]["depth"], millimetres / 1000)
    assert all("image" not in view for view in next(iter(source.views(0, 0, 1, ("pose",)))))


def test_older_files_with_opengl_matrices_alone_give_the_same_pose(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        for camera in file["observation"].values():
            del camera["extrinsic_cv"]

    cv, gl = (RoboTwinSource(write_task(tmp_path / name, **what)) for name, what in (("a", {}), ("b", {"edit": edit})))
    a, b = (next(iter(source.views(0, 0, 1, ("pose",))))[0]["pose"] for source in (cv, gl))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_units_and_conventions_may_be_said(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation="new")
    source = RoboTwinSource(root, depth_unit="m", extrinsics="world2cam_cv")
    view = next(iter(source.views(0, 0, 1, ("depth", "pose"))))[0]
    assert view["depth"][0, 0] == 1500
    usual = next(iter(RoboTwinSource(root).views(0, 0, 1, ("pose",))))[0]["pose"]
    np.testing.assert_allclose(np.linalg.inv(view["pose"]) @ np.diag([1, -1, -1, 1]), usual, atol=1e-5)


def test_depth_that_is_not_finite_is_unknown(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        file["observation/head_camera/depth"][:, 0, :2] = [np.nan, np.inf]

    source = RoboTwinSource(write_task(tmp_path / "task", edit=edit))
    depth = next(iter(source.views(0, 0, 1, ("depth",))))[0]["depth"]
    assert depth[0, :3].tolist() == [0, 0, 1.5]


def test_extras_are_those_of_every_episode_and_camera(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        if number == 1:
            del file["observation/left_camera/depth"]

    root = write_task(tmp_path / "task", edit=edit)
    assert RoboTwinSource(root).index().extras == ("intrinsics", "pose")
    assert RoboTwinSource(root, cameras=["head_camera"]).index().extras == ("depth", "intrinsics", "pose")
    assert RoboTwinSource(write_task(tmp_path / "bare", knows=False)).index().extras == ()
    with pytest.raises(UsageError, match="has no depth of every frame; expected of image, intrinsics, pose"):
        RoboTwinSource(root).views(0, 0, 1, ("depth",))


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({}, ["do 0", "do 1", "do 2"]),
        ({"instruction_index": 1}, ["make 0", "make 1", "make 2"]),
        ({"instruction_index": -1}, ["do 0", "make 1", "do 2"]),
        ({"instruction": "unseen"}, ["try", "try", "try"]),
        ({"task": "stack"}, ["stack", "stack", "stack"]),
    ],
)
def test_the_instruction_is_chosen_by_a_rule(
    options: dict[str, Any], tasks: list[str], tmp_path: Path, write_task: Write, generation: str
) -> None:
    source = open_source(write_task(tmp_path / "task", generation=generation), **options)
    assert [episode.task for episode in source.index().episodes] == tasks


@pytest.mark.parametrize("texts", [["a", "b"], {"instructions": ["a"]}, "a", {"seen": "a"}])
def test_instructions_are_met_in_several_forms(texts: Any, tmp_path: Path, write_task: Write) -> None:
    source = RoboTwinSource(write_task(tmp_path / "task", texts=lambda number: texts))
    assert {episode.task for episode in source.index().episodes} == {"a"}


@pytest.mark.parametrize("inner", [json.dumps(["in the file", "b"]), ["in the file", "b"], "in the file"])
def test_a_newer_files_own_instruction_is_used(inner: Any, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation="new", texts=None, inner_texts=inner)
    assert {episode.task for episode in RoboTwinSource(root).index().episodes} == {"in the file"}


@pytest.mark.parametrize("path", ["stack_blocks", "stack_blocks/demo_clean", "stack_blocks/aloha_agilex"])
def test_without_instructions_the_folders_name_is_the_task(path: str, tmp_path: Path, write_task: Write) -> None:
    source = RoboTwinSource(write_task(tmp_path / path, texts=None))
    assert {episode.task for episode in source.index().episodes} == {"stack blocks"}


def test_episodes_are_ordered_by_number(generation: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation=generation, numbers=[10, 9, 2])
    assert [e.id for e in RoboTwinSource(root).index().episodes] == ["episode_2", "episode_9", "episode_10"]


def test_a_folder_of_tasks_is_one_source(tmp_path: Path, write_task: Write) -> None:
    write_task(tmp_path / "all/stack/demo_clean", lengths=(4,), texts=None)
    write_task(tmp_path / "all/stack/demo_randomized", lengths=(5,), texts=None)
    write_task(tmp_path / "all/lift_pot", lengths=(3,), texts=None)
    source = open_source(tmp_path / "all")
    assert isinstance(source, RoboTwinSource)
    assert [(e.id, e.length, e.task) for e in source.index().episodes] == [
        ("lift_pot/episode_0", 2, "lift pot"),
        ("stack/demo_clean/episode_0", 3, "stack"),
        ("stack/demo_randomized/episode_0", 4, "stack"),
    ]


def test_the_digest_follows_contents_not_places(tmp_path: Path, write_task: Write) -> None:
    first = write_task(tmp_path / "a", texts=None)
    digest = RoboTwinSource(first).digest()
    moved = first.rename(tmp_path / "b")
    assert RoboTwinSource(moved).digest() == digest
    with h5py.File(moved / "data/episode1.hdf5", "r+") as file:
        file["joint_action/left_gripper"][0] = 0.25
        file["joint_action/vector"][0, 6] = 0.25
    assert RoboTwinSource(moved).digest() != digest


def test_every_choice_that_changes_a_value_is_in_the_fingerprint(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task")
    choices: list[dict[str, Any]] = [
        {},
        {"arms": "left"},
        {"include_gripper": False},
        {"alignment": "same"},
        {"channels": "rgb"},
        {"depth_unit": "m"},
        {"extrinsics": "world2cam_cv"},
        {"fps": 30.0},
        {"task": "x"},
        {"instruction": "unseen"},
        {"instruction_index": 1},
    ]
    mappings = [tuple(RoboTwinSource(root, **choice).index().mapping.items()) for choice in choices]
    assert len(set(mappings)) == len(choices)


def test_frames_beyond_an_episode_are_refused(tmp_path: Path, write_task: Write) -> None:
    with pytest.raises(SourceError, match=r"frames 0 to 4 of episode_0 .*; expected 0 to 3"):
        RoboTwinSource(write_task(tmp_path / "task")).frames(0, 0, 4)
