"""Damaged RoboTwin files: each a clear error that names file and fix, each left out and counted under skip_bad."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.featurize.sources.registry import open_source
from vla.featurize.sources.robotwin import RoboTwinSource
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]
Edit = Callable[[h5py.File], None]


def put(path: str, value: Any) -> Edit:
    """Replace a data set; None removes it."""

    def edit(file: h5py.File) -> None:
        del file[path]
        if value is not None:
            file[path] = value

    return edit


def cut(path: str, rows: int = 1) -> Edit:
    def edit(file: h5py.File) -> None:
        put(path, file[path][:-rows])(file)

    return edit


def poison(path: str, value: float) -> Edit:
    def edit(file: h5py.File) -> None:
        file[path][2] = value

    return edit


def claimed(path: str, shape: tuple[int, ...]) -> Edit:
    """Make a data set that claims a shape and takes no space."""

    def edit(file: h5py.File) -> None:
        del file[path]
        file.create_dataset(path, shape, "f8", chunks=(1,) * len(shape))

    return edit


OLD: dict[str, tuple[Edit, str]] = {
    "arm too short": (cut("joint_action/left_arm"), "vector has shape"),
    "picture missing": (
        cut("observation/head_camera/rgb"),
        "state of the left arm has 6 frames, observation/head_camera/rgb 5",
    ),
    "depth too short": (cut("observation/head_camera/depth"), "head_camera/depth 5; expected one number"),
    "NaN": (poison("joint_action/right_arm", np.nan), "right_arm, frame 2 is NaN or infinite"),
    "infinite gripper": (poison("joint_action/right_gripper", np.inf), "right_gripper, frame 2 is NaN"),
    "no arm": (put("joint_action/left_arm", None), "has no joint_action/left_arm: joint_action holds left_gripper, "),
    "no joints": (put("joint_action", None), "holds endpose, observation, pointcloud; expected joint_action/"),
    "no camera": (put("observation/left_camera", None), "has no camera left_camera: it has head_camera"),
    "no cameras": (put("observation", None), "has no camera head_camera, left_camera: it has no camera"),
    "camera without pictures": (put("observation/left_camera/rgb", None), "has no camera left_camera"),
    "wrong vector": (poison("joint_action/vector", 99.0), "vector differs from the arms at frame 2"),
    "joints as text": (put("joint_action/left_arm", np.array([b"x"] * 6)), r"left_arm is \|S1 \(6,\)"),
    "joints of three axes": (put("joint_action/left_arm", np.zeros((6, 6, 2))), r"left_arm is float64 \(6, 6, 2\)"),
    "pictures as numbers": (put("observation/head_camera/rgb", np.zeros(6)), "expected byte strings"),
    "claims a million years": (claimed("joint_action/left_arm", (1 << 40, 6)), "left_arm is float64"),
    "claims many joints": (claimed("joint_action/left_arm", (6, 1 << 40)), "left_arm is float64"),
    "claims huge depth": (claimed("observation/head_camera/depth", (6, 1 << 20, 1 << 20)), "head_camera/depth is"),
    "more joints": (
        lambda file: [
            put("joint_action/left_arm", np.zeros((6, 7)))(file),
            put("joint_action/vector", None)(file),
        ],
        r"action has 15 numbers \(left_joint_0 to right_gripper\); expected 14 .* as in episode_0",
    ),
    "soft link": (
        lambda file: [put("joint_action/left_arm", None)(file), file.__setitem__("joint_action/left_arm", link())],
        "left_arm is a SoftLink",
    ),
    "external link": (
        lambda file: [
            put("joint_action/left_arm", None)(file),
            file.__setitem__("joint_action/left_arm", h5py.ExternalLink("/etc/passwd", "/")),
        ],
        "left_arm is a ExternalLink",
    ),
}


def link() -> h5py.SoftLink:
    return h5py.SoftLink("/joint_action/right_arm")


NEW: dict[str, tuple[Edit, str]] = {
    "action too short": (cut("action/left_arm_joint_states"), "action of the left arm 4; expected one number"),
    "picture missing": (cut("vision/cam_head/colors"), "vision/cam_head/colors 4"),
    "no arm": (put("state/left_arm_joint_states", None), "has no state/left_arm_joint_states: state holds left_ee"),
    "no states": (put("state", None), r"holds action, .*; expected joint_action/ \(RoboTwin\) or state/"),
    "no gripper": (put("action/left_ee_joint_states", None), "action has 13 numbers"),
    "NaN": (poison("action/right_arm_joint_states", np.nan), "action/right_arm_joint_states, frame 2 is NaN"),
    "another rate": (put("additional_info/frequency", 50), "has 50 frames a second; expected 20 as episode_0"),
    "no rate": (put("additional_info/frequency", 0), "frequency is 0; expected a rate above 0"),
    "no camera": (put("vision/cam_head", None), "has no camera cam_head: it has cam_left_wrist"),
}


@pytest.mark.parametrize(("generation", "name"), [*(("old", name) for name in OLD), *(("new", name) for name in NEW)])
def test_a_damaged_episode_is_refused_by_name_or_left_out(
    generation: str, name: str, tmp_path: Path, write_task: Write
) -> None:
    edit, message = (OLD if generation == "old" else NEW)[name]
    root = write_task(
        tmp_path / "task",
        generation=generation,
        lengths=(3, 6, 3),
        edit=lambda number, file: edit(file) if number == 1 else None,
    )
    file = "episode1" if generation == "old" else "episode_0000001"
    with pytest.raises(SourceError, match=rf"{file}\.hdf5.*{message}") as raised:
        RoboTwinSource(root).index()
    assert raised.value.fix
    assert "\n" not in str(raised.value)
    index = RoboTwinSource(root, skip_bad=True).index()
    assert list(index.skipped) == ["episode_1"]
    assert [episode.id for episode in index.episodes] == ["episode_0", "episode_2"]


def test_an_episode_without_frames_is_refused(generation: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation=generation, lengths=(4, 1 if generation == "new" else 0, 3))
    with pytest.raises(SourceError, match=r"1\.hdf5 has 0 frames; expected at least 1"):
        RoboTwinSource(root).index()
    assert list(RoboTwinSource(root, skip_bad=True).index().skipped) == ["episode_1"]


def test_one_frame_has_no_next_one(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", lengths=(1,))
    with pytest.raises(SourceError, match=r"episode0\.hdf5 has 1 frame; expected at least 2"):
        RoboTwinSource(root).index()
    assert RoboTwinSource(root, alignment="same").index().episodes[0].length == 1


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_a_file_that_is_no_hdf5_is_named(content: bytes | None, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task")
    file = root / "data/episode2.hdf5"
    file.write_bytes(file.read_bytes()[:3000] if content is None else content)
    with pytest.raises(SourceError, match=r"episode2\.hdf5 does not read: .*; expected a whole HDF5 file"):
        RoboTwinSource(root).index()
    assert list(RoboTwinSource(root, skip_bad=True).index().skipped) == ["episode_2"]


def test_if_every_episode_is_bad_the_first_reason_is_told(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", edit=lambda number, file: cut("joint_action/left_arm")(file))
    with pytest.raises(SourceError, match=r"every episode of .* is bad; the first: .*episode0\.hdf5"):
        RoboTwinSource(root, skip_bad=True).index()


@pytest.mark.parametrize("jpeg", [b"\xff\xd8\xff\xe0 torn", b"", b"GIF89a"])
def test_a_corrupt_picture_is_named_by_file_camera_and_frame(jpeg: bytes, tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        file["observation/left_camera/rgb"][1] = jpeg

    source = RoboTwinSource(write_task(tmp_path / "task", edit=edit))
    source.index()
    message = r"episode1\.hdf5:observation/left_camera/rgb, frame 1 cannot be decoded"
    with pytest.raises(SourceError, match=message):
        list(source.frames(1, 0, 5))
    assert len(list(source.frames(1, 2, 5))) == 3


@pytest.mark.parametrize(
    ("path", "value", "names", "message"),
    [
        ("intrinsic_cv", np.zeros((4, 3, 3)), ("intrinsics",), "intrinsic_cv, frame 0 is no pinhole matrix"),
        ("intrinsic_cv", np.zeros((4, 4)), ("intrinsics",), "intrinsic_cv, frame 0 is no pinhole matrix"),
        ("extrinsic_cv", np.ones((4, 3, 4)), ("pose",), "extrinsic_cv, frame 0 is no rigid motion"),
        ("extrinsic_cv", np.full((4, 3, 4), np.nan), ("pose",), "extrinsic_cv, frame 0 is no rigid motion"),
        ("depth", np.full((4, 64, 64), -1.0), ("depth",), "depth, frame 0 has shape .* expected .* from 0 on"),
        ("depth", np.full((4, 64, 64), 1e300), ("depth",), "depth, frame 0 has numbers above float32"),
        ("depth", np.zeros((4, 32, 32)), ("image", "depth"), r"frame 0: depth is \(32, 32\); expected \(64, 64\)"),
    ],
)
def test_what_a_camera_knows_is_checked(
    path: str, value: Any, names: tuple[str, ...], message: str, tmp_path: Path, write_task: Write
) -> None:
    def edit(number: int, file: h5py.File) -> None:
        put(f"observation/head_camera/{path}", value)(file)

    source = RoboTwinSource(write_task(tmp_path / "task", lengths=(4,), edit=edit), cameras=["head_camera"])
    with pytest.raises(SourceError, match=message):
        list(source.views(0, 0, 1, names))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"seen": [], "unseen": ["x"]}, "has no seen instructions"),
        ({"seen": [3]}, "has no seen instructions"),
        ({"seen": [" "]}, "has no seen instructions"),
        (7, "has no seen instructions"),
    ],
)
def test_instructions_that_are_none_are_refused(texts: Any, message: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", texts=lambda number: texts)
    with pytest.raises(SourceError, match=rf"episode0\.json {message}.*source_options\.task="):
        RoboTwinSource(root).index()


def test_an_episode_that_lacks_its_instructions_is_refused(generation: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation=generation)
    next(root.glob("instruction*/*1.json")).unlink()
    with pytest.raises(SourceError, match=r"task has no instructions/episode1\.json; expected the seen instructions"):
        RoboTwinSource(root).index()
    next(root.glob("instruction*/*0.json")).write_text("{")
    with pytest.raises(SourceError, match=r"0\.json does not parse"):
        RoboTwinSource(root).index()
    assert list(RoboTwinSource(root, skip_bad=True).index().skipped) == ["episode_0", "episode_1"]


@pytest.mark.parametrize("inner", ["[", "[1, 2]"])
def test_texts_inside_a_file_that_are_no_list_are_refused(inner: str, tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task", generation="new", texts=None, inner_texts=inner)
    with pytest.raises(SourceError, match=r"0000000\.hdf5:instructions (does not parse|is no list of texts)"):
        RoboTwinSource(root).index()


def test_texts_that_claim_a_gigabyte_are_refused(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        file.create_dataset("instructions", (1,), "S1000000000", chunks=(1,))

    root = write_task(tmp_path / "task", generation="new", texts=None, edit=edit)
    with pytest.raises(SourceError, match="instructions has 1 texts of 1000000000 bytes"):
        RoboTwinSource(root).index()


def test_pictures_with_a_gap_or_too_few_are_refused(tmp_path: Path, write_task: Write, write_images: Write) -> None:
    root = write_task(tmp_path / "task", lengths=(4, 4))
    images = write_images(root / "images", [4, 4])
    (images / "episode1/step_0001.png").unlink()
    with pytest.raises(SourceError, match=r"camera head_camera, episode_1: .*step_0002\.png comes at frame 1"):
        RoboTwinSource(root).index()
    (images / "episode1/step_0003.png").rename(images / "episode1/step_0001.png")
    with pytest.raises(SourceError, match=r"episode_1 has frames: head_camera 3, .*episode1\.hdf5 4"):
        RoboTwinSource(root).index()
    (images / "episode1/step_0001.png").rename(images / "episode1/last.png")
    with pytest.raises(SourceError, match="a name that ends in its frame's number"):
        RoboTwinSource(root).index()
    assert list(RoboTwinSource(root, skip_bad=True).index().skipped) == ["episode_1"]


def test_a_picture_of_a_folder_that_vanishes_is_named(tmp_path: Path, write_task: Write, write_images: Write) -> None:
    root = write_task(tmp_path / "task", lengths=(4,))
    images = write_images(root / "images", [4])
    source = RoboTwinSource(root)
    source.index()
    (images / "episode0/step_0001.png").write_bytes(b"torn")
    with pytest.raises(SourceError, match=r"step_0001\.png cannot be decoded"):
        list(source.frames(0, 0, 3))
    (images / "episode0/step_0001.png").unlink()
    for use in (lambda: list(source.frames(0, 0, 3)), source.digest):
        with pytest.raises(SourceError, match=r"cannot read .*step_0001\.png"):
            use()


def test_a_camera_that_is_not_there_is_named(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task")
    with pytest.raises(SourceError, match=r"has no camera rear: it has head_camera, left_camera; expected rear"):
        open_source(root, cameras=["rear"]).index()


def test_two_files_of_one_episode_are_refused(tmp_path: Path, write_task: Write) -> None:
    root = write_task(tmp_path / "task")
    (root / "data/episode_0000001.hdf5").write_bytes(b"")
    with pytest.raises(SourceError, match=r"are both episode 1; expected one of them"):
        RoboTwinSource(root).index()


def test_tasks_of_unequal_sizes_are_no_one_source(tmp_path: Path, write_task: Write) -> None:
    write_task(tmp_path / "all/a", dims=(6, 6))
    write_task(tmp_path / "all/b", dims=(7, 7))
    message = (
        r"b/data/episode0\.hdf5: action has 16 numbers .*expected 14 .* as in a/episode_0. Try: --set pad_.*`vla action"
    )
    with pytest.raises(SourceError, match=message):
        RoboTwinSource(tmp_path / "all").index()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": "both"}, "arms = 'both'"),
        ({"resample": "cubic"}, "resample = 'cubic'"),
        ({"fps": -1.0}, "fps = -1"),
        ({"instruction_index": -2}, "instruction_index = -2"),
        ({"channels": "gbr"}, "channels = 'gbr'"),
        ({"arm": "left"}, "no option 'arm', did you mean 'arms'"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    options: dict[str, Any], message: str, tmp_path: Path, write_task: Write
) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(write_task(tmp_path / "task"), **options)


def test_actions_that_are_not_there_are_named(tmp_path: Path, write_task: Write, write_plans: Write) -> None:
    root = write_task(tmp_path / "task", lengths=(4,))
    with pytest.raises(SourceError, match=r"has no _traj_data/episode0\.pkl; .*actions=joint"):
        RoboTwinSource(root, actions="planner").index()
    plans = write_plans(tmp_path / "plans", [(np.zeros((3, 6)), np.zeros((3, 6)))])
    with pytest.raises(SourceError, match=r"has no data/episode0\.hdf5; .*actions=planner"):
        RoboTwinSource(plans, actions="joint").index()


def test_a_folder_without_tasks_is_told_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no RoboTwin task; expected data/episode0\.hdf5 or _traj_data"):
        open_source(f"robotwin:{tmp_path}").index()
