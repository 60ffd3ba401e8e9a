"""One episode of RoboTwin in HDF5, of both generations.

Older, `data/episode{N}.hdf5`, T frames:
    joint_action/{left_arm [T, D], left_gripper [T], right_arm, right_gripper, vector [T, A] = [L, Lg, R, Rg]}
    observation/CAMERA/{rgb S [T], depth [T, H, W] mm, intrinsic_cv [T, 3, 3], extrinsic_cv [T, 3, 4] world to camera,
                        cam2world_gl [T, 4, 4]}
Newer (XPolicyLab trajectory v1.0), `data/episode_{:07d}.hdf5`:
    state/ and action/ {left_arm_joint_states [T, D], left_ee_joint_states [T, G], right_…}, action one step later
    vision/CAMERA/{colors S [T], depths, intrinsic_matrix, extrinsics_matrix or extrinsic_matrix}
    additional_info/frequency, instructions (JSON text, or texts)

Both encode their RGB frames with OpenCV as if they were BGR: a JPEG decoder gives red and blue exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vla.featurize.hdf5 import find, names, need, opened, read_whole
from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.pictures import MAX_PIXELS
from vla.featurize.sources.robotwin_cameras import Camera, camera_of, form_of
from vla.featurize.sources.robotwin_joints import MAX_FRAMES, MAX_JOINTS, Arm
from vla.featurize.sources.robotwin_layout import MAX_JSON_BYTES
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError

MAX_NUMBERS = 1 << 25
"""256 MiB of one arm: compressed, a file of some kilobytes may claim as much."""


@dataclass(frozen=True)
class Demo:
    """What an HDF5 file says without its pixels. `action` is None where actions are the next states.

    `length` T counts the frames of every camera and the steps of `state` and `action`.
    """

    path: Path
    newer: bool
    length: int
    state: Mapping[str, Arm]
    action: Mapping[str, Arm] | None
    cameras: Mapping[str, Camera]
    fps: float | None
    texts: tuple[str, ...]


def read_demo(path: Path, sides: Sequence[str]) -> Demo:
    """Read and check an episode's numbers: `sides` of ("left", "right"). Raises `SourceError` naming file and field."""
    with opened(path) as file:
        if find(file, "joint_action") is not None:
            state = {side: _arm(file, f"joint_action/{side}_arm", f"joint_action/{side}_gripper") for side in sides}
            _compare_vector(file, state)
            action, root, newer = None, "observation", False
        elif find(file, "state") is not None:
            state, newer, root = _arms(file, "state", sides), True, "vision"
            action = _arms(file, "action", sides) if names(file, "action") else None
        else:
            found = f"{path} holds {', '.join(sorted(file))[:120] or 'nothing'}"
            raise SourceError(found, expected="joint_action/ (RoboTwin) or state/ (XPolicyLab)", fix=SKIP)
        cameras = {name: camera for name in names(file, root) if (camera := camera_of(file, f"{root}/{name}", newer))}
        demo = Demo(path, newer, 0, state, action, cameras, _fps(file), _texts(file))
        return _one_length(file, demo)


def _arms(file: h5py.File, group: str, sides: Sequence[str]) -> dict[str, Arm]:
    return {side: _arm(file, f"{group}/{side}_arm_joint_states", f"{group}/{side}_ee_joint_states") for side in sides}


def _arm(file: h5py.File, joints: str, gripper: str) -> Arm:
    fingers = _matrix(file, gripper) if find(file, gripper) is not None else None
    return Arm(_matrix(file, joints), fingers)


def _matrix(file: h5py.File, path: str) -> NDArray[np.float64]:
    """Return finite numbers [T, D]; [T] counts as [T, 1]."""
    data, where = need(file, path), f"{file.filename}:{path}"
    wide = data.ndim == 2 and not 1 <= data.shape[1] <= MAX_JOINTS
    if (
        data.dtype.kind not in "fiub"
        or data.ndim not in (1, 2)
        or wide
        or data.shape[0] > MAX_FRAMES
        or data.size > MAX_NUMBERS
    ):
        raise SourceError(f"{where} is {data.dtype} {data.shape}", expected="numbers [T, D]", fix=SKIP)
    width = data.shape[1] if data.ndim == 2 else 1
    values: NDArray[np.float64] = read_whole(data).astype(np.float64).reshape(len(data), width)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise SourceError(f"{where}, frame {int(bad.argmax())} is NaN or infinite", expected="finite numbers", fix=SKIP)
    return values


def _compare_vector(file: h5py.File, arms: Mapping[str, Arm]) -> None:
    """Raise `SourceError` where `vector`, that others read, is not [left arm, gripper, right arm, gripper]."""
    if len(arms) != 2 or find(file, "joint_action/vector") is None:
        return
    parts = [part for arm in arms.values() for part in (arm.joints, arm.gripper) if part is not None]
    vector = _matrix(file, "joint_action/vector")
    wanted = (len(parts[0]), sum(part.shape[1] for part in parts))
    if vector.shape != wanted or any(len(part) != len(vector) for part in parts):
        lengths = " + ".join(str(part.shape) for part in parts)
        raise SourceError(f"{file.filename}:joint_action/vector has shape {vector.shape}", expected=lengths, fix=SKIP)
    off = np.abs(vector - np.concatenate(parts, axis=1)).max(axis=1, initial=0) > 1e-4
    if off.any():
        raise SourceError(
            f"{file.filename}:joint_action/vector differs from the arms at frame {int(off.argmax())}",
            expected="[left_arm, left_gripper, right_arm, right_gripper]",
            fix=SKIP,
        )


def _one_length(file: h5py.File, demo: Demo) -> Demo:
    """Check that arms, grippers, cameras and what cameras know besides have one number of frames, at least one."""
    lengths = {}
    for group, arms in (("state", demo.state), ("action", demo.action or {})):
        for side, arm in arms.items():
            lengths[f"{group} of the {side} arm"] = len(arm)
            lengths |= {f"{group} of the {side} gripper": len(arm.gripper)} if arm.gripper is not None else {}
    for camera in demo.cameras.values():
        form_of(need(file, camera.pictures))
        lengths[camera.pictures] = len(need(file, camera.pictures))
        for extra, path in camera.extras.items():
            data = need(file, path)
            if data.dtype.kind not in "fiu" or data.ndim < 2 or math.prod(data.shape[1:]) > MAX_PIXELS:
                raise SourceError(f"{demo.path}:{path} is {data.dtype} {data.shape}", expected="numbers", fix=SKIP)
            lengths |= {path: len(data)} if data.ndim > 2 or extra == "depth" else {}
    if len(set(lengths.values())) > 1:
        first, count = next(iter(lengths.items()))
        other, wrong = next((name, n) for name, n in lengths.items() if n != count)
        raise SourceError(f"{demo.path}: {first} has {count} frames, {other} {wrong}", expected="one number", fix=SKIP)
    length = next(iter(lengths.values()))
    if not length:
        raise SourceError(f"{demo.path} has 0 frames", expected="at least 1", fix=SKIP)
    return Demo(**{**demo.__dict__, "length": length})


def _fps(file: h5py.File) -> float | None:
    data = find(file, "additional_info/frequency")
    if data is None:
        return None
    value = data[()] if isinstance(data, h5py.Dataset) and data.size == 1 and data.dtype.kind in "fiu" else np.nan
    rate = float(np.asarray(value).reshape(-1)[0])
    if not (np.isfinite(rate) and rate > 0):
        where = f"{file.filename}:additional_info/frequency"
        raise SourceError(f"{where} is {value}", expected="a rate above 0", fix=SKIP)
    return rate


def _texts(file: h5py.File) -> tuple[str, ...]:
    """Return the instructions of a newer file; none where it has none, or only empty ones."""
    for key in ("instructions", "instruction"):
        data = find(file, key)
        if not isinstance(data, h5py.Dataset) or h5py.check_string_dtype(data.dtype) is None:
            continue
        if data.size * data.dtype.itemsize > MAX_JSON_BYTES:
            found = f"{file.filename}:{key} has {data.size} texts of {data.dtype.itemsize} bytes"
            raise SourceError(found, expected=f"at most {MAX_JSON_BYTES} bytes", fix=SKIP)
        texts = [_decoded(item, f"{file.filename}:{key}") for item in np.asarray(data[()]).reshape(-1)]
        if data.ndim == 0 and texts[0].lstrip().startswith("["):
            texts = _listed(texts[0], f"{file.filename}:{key}")
        if kept := tuple(text for text in texts if text.strip()):
            return kept
    return ()


def _decoded(item: Any, where: str) -> str:
    try:
        return item.decode("utf-8") if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError:
        raise SourceError(f"{where} is no UTF-8", expected="a text", fix=SKIP) from None


def _listed(text: str, where: str) -> list[str]:
    try:
        listed = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{where} does not parse: {error}", expected="a JSON list of texts", fix=SKIP) from None
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise SourceError(f"{where} is no list of texts", expected="a JSON list of texts", fix=SKIP)
    return listed
