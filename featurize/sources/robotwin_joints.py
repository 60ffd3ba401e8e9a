"""The numbers of RoboTwin's arms: joined into one vector, and the planner's segments that stand for them.

`_traj_data/episode{N}.pkl` is {"left_joint_path", "right_joint_path"}, each a list of segments, one a motion that was
planned: {"status": "Success" or "Fail", "position" [n, D], "velocity" [n, D]} in radians, at the simulator's rate and
not the camera's. Segments are also met as arrays [n, D] or [D] and as pairs (joints, gripper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.pickles import load_pickle
from vla.stores.errors import SourceError

Arms = Literal["left", "right", "fused"]
SIDES: dict[str, tuple[str, ...]] = {"left": ("left",), "right": ("right",), "fused": ("left", "right")}
MAX_JOINTS = 128
"""Arms have 6 or 7, hands some 20; more is a matrix of another kind."""

MAX_FRAMES = 1_000_000
"""More than half a day at 20 a second is taken for a damaged or hostile length."""

RESAMPLE = "--set source_options.resample=linear stretches each path over its frames"
_NO_GRIPPER = "--set source_options.include_gripper=false"


@dataclass(frozen=True)
class Arm:
    """One arm over n steps: `joints` float64 [n, D] in radians, `gripper` float64 [n, G] (1 open, 0 closed) or None."""

    joints: NDArray[np.float64]
    gripper: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.joints)


@dataclass(frozen=True)
class ArmPath:
    """What a path file says of one arm: its joined segments (None: no successful one), and how many failed."""

    arm: Arm | None
    segments: int
    failed: int


def join(arms: Mapping[str, Arm], which: Arms, gripper: bool | None, where: str) -> NDArray[np.float32]:
    """Return [T, A] float32: joints, then gripper, of the left arm, then of the right one.

    `gripper`: True wants it, False leaves it out, None takes it where it is.
    """
    parts = []
    for side in SIDES[which]:
        arm = arms[side]
        if gripper and arm.gripper is None:
            expected = "(joints, gripper) segments, or the gripper of an HDF5 file"
            raise SourceError(f"{where}: the {side} arm has no gripper", expected=expected, fix=_NO_GRIPPER)
        parts += [arm.joints] if arm.gripper is None or gripper is False else [arm.joints, arm.gripper]
    if len({len(part) for part in parts}) > 1:
        lengths = " and ".join(f"{side} {len(arms[side])}" for side in SIDES[which])
        raise SourceError(f"{where}: the arms have {lengths} steps", expected="one length", fix=f"{RESAMPLE}; {SKIP}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        return np.concatenate(parts, axis=1).astype(np.float32)


def names_of(arms: Mapping[str, Arm], which: Arms, gripper: bool | None) -> tuple[str, ...]:
    """Return the names of `join`'s columns: left_joint_0, …, left_gripper, right_joint_0, …"""
    names: list[str] = []
    for side in SIDES[which]:
        arm = arms[side]
        names += [f"{side}_joint_{joint}" for joint in range(arm.joints.shape[1])]
        fingers = 0 if arm.gripper is None or gripper is False else arm.gripper.shape[1]
        names += [f"{side}_gripper"] if fingers == 1 else [f"{side}_gripper_{finger}" for finger in range(fingers)]
    return tuple(names)


def resampled(arm: Arm, length: int) -> Arm:
    """Return an arm whose n steps are spread evenly over `length` frames, linear in between, ends on ends."""
    places = np.linspace(0, len(arm) - 1, length)

    def spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.interp(places, np.arange(len(arm)), column) for column in values.T], axis=1)

    return Arm(spread(arm.joints), None if arm.gripper is None else spread(arm.gripper))


def read_plan(path: Path) -> dict[str, ArmPath]:
    """Read a path file: {"left": …, "right": …}. Raises `SourceError` naming file, arm and segment."""
    content = load_pickle(path)
    keys = {side: f"{side}_joint_path" for side in SIDES["fused"]}
    if not isinstance(content, dict) or not any(key in content for key in keys.values()):
        found = f"the keys {sorted(map(str, content))[:6]}" if isinstance(content, dict) else type(content).__name__
        raise SourceError(f"{path} holds {found}", expected="left_joint_path and right_joint_path", fix=SKIP)
    return {side: _path_of(content[key], f"{path}, {key}") for side, key in keys.items() if key in content}


def require_arms(paths: Mapping[str, ArmPath], which: Arms, where: str) -> dict[str, Arm]:
    """Return the chosen arms. Raises `SourceError` for one that never moved: what it held is not in the file."""
    made = {}
    for side in SIDES[which]:
        path = paths.get(side, ArmPath(None, 0, 0))
        if path.arm is None:
            other = [name for name, told in paths.items() if told.arm is not None]
            raise SourceError(
                f"{where}: {side}_joint_path has no successful step ({path.segments} segments, {path.failed} failed)",
                expected=f"a segment of status Success of the {side} arm",
                fix=f"--set source_options.arms={other[0]}" if other and which == "fused" else SKIP,
            )
        made[side] = path.arm
    return made


def _path_of(value: Any, where: str) -> ArmPath:
    """Join the successful segments of one arm."""
    segments = value if isinstance(value, list) else [value]
    arms: list[Arm] = []
    failed = 0
    for place, segment in enumerate(segments):
        arm = _segment(segment, f"{where}, segment {place}")
        failed += arm is None
        if arm is None or not len(arm):
            continue
        if arms and _width(arm) != _width(arms[0]):
            expected = f"{_width(arms[0])[0]} joints and {_width(arms[0])[1]} of a gripper as before"
            raise SourceError(
                f"{where}, segment {place} has {_width(arm)[0]} joints and {_width(arm)[1]} of a gripper",
                expected=expected,
                fix=SKIP,
            )
        arms.append(arm)
    if not arms:
        return ArmPath(None, len(segments), failed)
    grippers = [arm.gripper for arm in arms if arm.gripper is not None]
    joined = Arm(np.concatenate([arm.joints for arm in arms]), np.concatenate(grippers) if grippers else None)
    if len(joined) > MAX_FRAMES:
        raise SourceError(f"{where} has {len(joined)} steps", expected=f"at most {MAX_FRAMES}", fix=SKIP)
    return ArmPath(joined, len(segments), failed)


def _width(arm: Arm) -> tuple[int, int]:
    return arm.joints.shape[1], 0 if arm.gripper is None else arm.gripper.shape[1]


def _segment(value: Any, where: str) -> Arm | None:
    """Return one segment in whichever form, or None for one that failed."""
    if isinstance(value, dict):
        status = value.get("status", "Success")
        if status == "Fail":
            return None
        if status != "Success" or "position" not in value:
            keys = ", ".join(sorted(map(str, value)))[:80]
            raise SourceError(
                f"{where} has status {status!r} and the keys {keys}",
                expected="status Success with a position, or Fail",
                fix=SKIP,
            )
        joints = _numbers(value["position"], where, 2)
        return Arm(joints, _fingers(value["gripper"], len(joints), where) if "gripper" in value else None)
    if _is_pair(value):
        joints = _numbers(value[0], where, 2)
        return Arm(joints, _fingers(value[1], len(joints), where))
    return Arm(_numbers(value, where, 2), None)


def _is_pair(value: Any) -> bool:
    """A tuple of two is (joints, gripper); so is a list of a vector and a number."""
    if isinstance(value, tuple) and len(value) == 2:
        return not all(_is_number(part) for part in value)
    return isinstance(value, list) and len(value) == 2 and _is_number(value[1]) and not _is_number(value[0])


def _fingers(value: Any, length: int, where: str) -> NDArray[np.float64]:
    """Return a gripper [n, 1]: one number holds for the whole segment."""
    numbers = _numbers(value, f"{where}, gripper", 0).reshape(-1, 1)
    if len(numbers) not in (1, length):
        found = f"{where} has {length} steps of joints and {len(numbers)} of the gripper"
        raise SourceError(found, expected="one length", fix=SKIP)
    return np.repeat(numbers, length, axis=0) if len(numbers) == 1 else numbers


def _numbers(value: Any, where: str, axes: int) -> NDArray[np.float64]:
    """Return finite numbers; with `axes` 2 as [n, D], a vector [D] being one step."""
    array = _array(value, where)
    if axes == 2:
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or not 1 <= array.shape[1] <= MAX_JOINTS:
            raise SourceError(f"{where} has shape {array.shape}", expected="[n, D] or [D] joint angles", fix=SKIP)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argwhere(bad)[0][0]) if array.ndim else 0
        raise SourceError(f"{where}, step {row} is NaN or infinite", expected="finite numbers", fix=SKIP)
    return array


def _array(value: Any, where: str) -> NDArray[np.float64]:
    if isinstance(value, (np.ndarray, int, float)) or _is_nested(value):
        try:
            array = np.asarray(value)
        except ValueError:  # rows of unequal lengths
            array = np.empty(0, object)
        if array.dtype.kind in "fiu":
            return array.astype(np.float64)
    kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
    raise SourceError(
        f"{where} is {kind}", expected="numbers, (joints, gripper) or a segment with a position", fix=SKIP
    )


def _is_nested(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)) and len(value) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
