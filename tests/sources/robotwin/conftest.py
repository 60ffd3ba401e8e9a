"""Writes RoboTwin tasks of both generations, as RoboTwin lays them out, with pictures that tell their frame."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

SIZE = 64
CAMERAS = {"old": ("head_camera", "left_camera"), "new": ("cam_head", "cam_left_wrist")}
TIMES_90 = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""Rotation of the world into the camera by a quarter turn about z."""

SHIFT = np.array([1.0, 2.0, 3.0])


def joints(side: str, episode: int, length: int, dim: int = 6) -> NDArray[np.float64]:
    """Joint angles that tell side, episode, frame and joint apart."""
    sign = 1.0 if side == "left" else -1.0
    return sign * (episode + np.arange(length)[:, None] / 100 + np.arange(dim) * 10)


def gripper(side: str, length: int) -> NDArray[np.float64]:
    return (np.arange(length) % 2) * (1.0 if side == "left" else 0.5)


@dataclass(frozen=True)
class Task:
    """`lengths` of the recorded frames; `joints` of the left and the right arm; `edit(episode, file)` spoils a file."""

    generation: str = "old"
    lengths: Sequence[int] = (4, 6, 5)
    dims: tuple[int, int] = (6, 6)
    cameras: Sequence[str] | None = None
    knows: bool = True
    texts: Callable[[int], Any] | None = lambda number: {"seen": [f"do {number}", f"make {number}"], "unseen": ["try"]}
    inner_texts: Any = None
    with_action: bool = True
    frequency: int | None = 20
    edit: Callable[[int, h5py.File], None] = lambda episode, file: None
    numbers: Sequence[int] | None = None


@pytest.fixture(scope="session")
def write_task(
    picture: Callable[[int, int, int], NDArray[np.uint8]], encoded: Callable[..., bytes]
) -> Callable[..., Path]:
    """`write_task(root, **what)`; see `Task`."""

    def shots(episode: int, length: int, camera: int) -> list[bytes]:
        # OpenCV takes the RGB frame for BGR: a JPEG decoder then gives red and blue exchanged.
        tinted = [tint(picture(episode, frame, camera))[..., ::-1] for frame in range(length)]
        return [encoded(np.ascontiguousarray(shot), "JPEG", quality=95) for shot in tinted]

    def write(root: Path, **what: Any) -> Path:
        task = Task(**what)
        (root / "data").mkdir(parents=True)
        for position, length in enumerate(task.lengths):
            number = task.numbers[position] if task.numbers else position
            name = f"episode{number}" if task.generation == "old" else f"episode_{number:07d}"
            with h5py.File(root / "data" / f"{name}.hdf5", "w") as file:
                (_old if task.generation == "old" else _new)(file, task, number, length, shots)
                task.edit(number, file)
            if task.texts is not None:
                folder = "instructions" if task.generation == "old" else "instruction"
                (root / folder).mkdir(exist_ok=True)
                (root / folder / f"{name}.json").write_text(json.dumps(task.texts(number)))
        return root

    return write


def tint(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve the blue, so that exchanged channels show."""
    return (pixels * np.array([1.0, 1.0, 0.5])).astype(np.uint8)


def _old(file: h5py.File, task: Task, number: int, length: int, shots: Callable[..., list[bytes]]) -> None:
    arms = file.create_group("joint_action")
    parts = []
    for side, dim in zip(("left", "right"), task.dims, strict=True):
        arms[f"{side}_arm"], arms[f"{side}_gripper"] = joints(side, number, length, dim), gripper(side, length)
        parts += [arms[f"{side}_arm"][()], arms[f"{side}_gripper"][()][:, None]]
    arms["vector"] = np.concatenate(parts, axis=1)
    for place, name in enumerate(task.cameras or CAMERAS["old"]):
        camera = file.create_group(f"observation/{name}")
        jpegs = shots(number, length, place)
        camera.create_dataset("rgb", data=jpegs, dtype=f"S{max(map(len, jpegs), default=1)}")
        if task.knows:
            camera["depth"] = np.full((length, SIZE, SIZE), 1500.0) + np.arange(length)[:, None, None]
            camera["intrinsic_cv"] = np.tile([[50.0, 0, 32], [0, 50, 32], [0, 0, 1]], (length, 1, 1))
            camera["extrinsic_cv"] = np.tile(np.c_[TIMES_90, SHIFT], (length, 1, 1))
            camera["cam2world_gl"] = np.tile(opengl(), (length, 1, 1))
    file["endpose/left_endpose"] = np.zeros((length, 7))
    file["pointcloud"] = np.zeros((length, 0))


def opengl() -> NDArray[np.float64]:
    """Camera to world in OpenGL axes, of the same camera as [TIMES_90 | SHIFT]."""
    inward = np.eye(4)
    inward[:3, :3], inward[:3, 3] = TIMES_90, SHIFT
    return np.linalg.inv(inward) @ np.diag([1.0, -1, -1, 1])


def _new(file: h5py.File, task: Task, number: int, length: int, shots: Callable[..., list[bytes]]) -> None:
    text = h5py.string_dtype("utf-8")
    file.create_dataset("data_format_version", data="v1.0", dtype=text)
    kept = length - 1 if task.with_action else length
    for side, dim in zip(("left", "right"), task.dims, strict=True):
        for name, values in (("arm", joints(side, number, length, dim)), ("ee", gripper(side, length)[:, None])):
            file[f"state/{side}_{name}_joint_states"] = values[:kept].astype(np.float32)
            if task.with_action:
                file[f"action/{side}_{name}_joint_states"] = values[1:].astype(np.float32)
    for place, name in enumerate(task.cameras or CAMERAS["new"]):
        camera = file.create_group(f"vision/{name}")
        jpegs = shots(number, kept, place)
        camera.create_dataset("colors", data=jpegs, dtype=f"S{max(map(len, jpegs), default=1)}")
        camera["shape"] = np.array([SIZE, SIZE, 3], np.int32)
        if task.knows:
            camera["depths"] = np.full((kept, SIZE, SIZE, 1), 1500.0)
            camera["intrinsic_matrix"] = np.array([[50.0, 0, 32], [0, 50, 32], [0, 0, 1]])
            camera["extrinsics_matrix"] = np.tile(opengl(), (kept, 1, 1))
    if task.frequency is not None:
        file["additional_info/frequency"] = np.asarray(task.frequency, np.int32)
    if task.inner_texts is not None:
        file.create_dataset("instructions", data=task.inner_texts, dtype=text)


def segment(values: NDArray[np.float64], status: str = "Success") -> dict[str, Any]:
    """What the planner returns of one motion."""
    return (
        {"status": status, "position": values, "velocity": np.zeros_like(values)}
        if status == "Success"
        else {"status": status}
    )


@pytest.fixture(scope="session")
def write_plans() -> Callable[..., Path]:
    """`write_plans(root, [(left, right), ...])` writes `_traj_data/episode{N}.pkl`."""

    def write(root: Path, plans: Sequence[tuple[Any, Any]], protocol: int = 4) -> Path:
        (root / "_traj_data").mkdir(parents=True, exist_ok=True)
        for number, (left, right) in enumerate(plans):
            content = {"left_joint_path": left, "right_joint_path": right}
            (root / f"_traj_data/episode{number}.pkl").write_bytes(pickle.dumps(content, protocol))
        return root

    return write


@pytest.fixture(scope="session")
def write_images(
    picture: Callable[[int, int, int], NDArray[np.uint8]], encoded: Callable[..., bytes]
) -> Callable[..., Path]:
    """`write_images(folder, lengths, cameras=())` writes `episode{N}/[CAMERA/]step_0000.png`."""

    def write(folder: Path, lengths: Sequence[int], cameras: Sequence[str] = ("",)) -> Path:
        for episode, length in enumerate(lengths):
            for place, camera in enumerate(cameras):
                (folder / f"episode{episode}" / camera).mkdir(parents=True)
                for frame in range(length):
                    file = folder / f"episode{episode}" / camera / f"step_{frame:04d}.png"
                    file.write_bytes(encoded(tint(picture(episode, frame, place))))
        return folder

    return write


@pytest.fixture(scope="session", name="joints")
def _joints() -> Callable[..., NDArray[np.float64]]:
    """`joints(side, episode, length, dim=6)`."""
    return joints


@pytest.fixture(scope="session", name="gripper")
def _gripper() -> Callable[..., NDArray[np.float64]]:
    return gripper


@pytest.fixture(scope="session", name="segment")
def _segment() -> Callable[..., dict[str, Any]]:
    return segment


@pytest.fixture(params=["old", "new"])
def generation(request: pytest.FixtureRequest) -> str:
    """Both generations of HDF5 files."""
    return str(request.param)
