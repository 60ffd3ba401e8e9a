"""Replay recorded simulator states to pictures: human demonstrations become a LeRobot v3.0 data set.

Nothing is simulated: each state is set, its poses are computed, its cameras are drawn. So the pictures show what the
demonstrator's robot did, whatever the version of MuJoCo. The state is what a robot knows of itself: joint angles,
gripper, and the pose of its hand; all of MuJoCo's positions and velocities are kept as privileged.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.rollout.envs.offscreen import choose_offscreen_library, make_renderer
from vla.rollout.lerobot_writer import LeRobotWriter, Summary, VectorFeature
from vla.rollout.robosuite_demos import Demonstration, DemonstrationFile, find_demonstrations
from vla.stores.errors import MachineError, SourceError, UsageError, missing_extra
from vla.stores.settings import nearest

IMAGE_SIZE = 128
ARM = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
"""robosuite's OSC_POSE controller: displacement, rotation vector, gripper (1 closes), as fractions of its limits."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayReport:
    """What `record_replay` wrote; `demonstrations` are the names in the file, in order."""

    out: str
    environment: str
    episodes: int
    frames: int
    bytes: int
    sha256: str
    seconds: float
    demonstrations: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


class Scene:
    """A recorded model, shown in one recorded state after the other."""

    def __init__(self, demonstration: Demonstration, where: str, image_size: int) -> None:
        self._mujoco = _import_mujoco()
        try:
            self.model = self._mujoco.MjModel.from_xml_string(demonstration.xml)
        except ValueError as error:
            what = " ".join(str(error).split())[:160]
            raise SourceError(f"{where}: MuJoCo does not load the model: {what}", expected="MJCF") from None
        self._data, model = self._mujoco.MjData(self.model), self.model
        if demonstration.states.shape[1] != 1 + model.nq + model.nv:
            found = f"states of {demonstration.states.shape[1]} numbers"
            raise SourceError(f"{where} has {found}", expected=f"{1 + model.nq + model.nv}, as its model has")
        names = [self._name("JOINT", joint) for joint in range(model.njnt)]
        kinds = (int(self._mujoco.mjtJoint.mjJNT_SLIDE), int(self._mujoco.mjtJoint.mjJNT_HINGE))
        single = [joint for joint in range(model.njnt) if model.jnt_type[joint] in kinds]
        self._own = [joint for joint in single if names[joint].startswith(("robot", "gripper"))]
        self._hands = [k for k in range(8) if self._id("SITE", f"gripper{k}_grip_site") >= 0]
        if not self._own or not self._hands:
            raise SourceError(
                f"{where}: the model has no robot", expected="robosuite's robot0_… and gripper0_grip_site"
            )
        poses = [f"robot{k}_eef_{part}" for k in self._hands for part in ("x", "y", "z", "qx", "qy", "qz", "qw")]
        self.state_names = (*(names[joint] for joint in self._own), *poses)
        self.privileged_names = (*(f"qpos_{i}" for i in range(model.nq)), *(f"qvel_{i}" for i in range(model.nv)))
        self.cameras = tuple(self._name("CAMERA", camera) for camera in range(model.ncam))
        self._image_size = image_size
        self._renderer: Any = None
        self._look = self._mujoco.MjvOption()
        # As robosuite draws for its policies: no collision shapes, and no marks that show where the hand points.
        self._look.geomgroup[0] = 0
        self._look.sitegroup[:] = 0

    def show(self, state: NDArray[np.float64]) -> None:
        """Set a state [1 + nq + nv]."""
        nq = self.model.nq
        self._data.time, self._data.qpos[:], self._data.qvel[:] = state[0], state[1 : 1 + nq], state[1 + nq :]
        self._mujoco.mj_forward(self.model, self._data)

    def proprioception(self) -> NDArray[np.float32]:
        """Return what `state_names` say: angles in rad, openings and positions in m, quaternions xyzw; float32 [S]."""
        joints = [self._data.qpos[self.model.jnt_qposadr[joint]] for joint in self._own]
        poses = []
        for k in self._hands:
            site = self._id("SITE", f"gripper{k}_grip_site")
            quaternion = np.zeros(4)
            self._mujoco.mju_mat2Quat(quaternion, self._data.site_xmat[site])
            # q and -q are one rotation: the one with qw >= 0 is taken, so that equal poses have equal numbers.
            quaternion *= 1.0 if quaternion[0] >= 0 else -1.0
            poses += [*self._data.site_xpos[site], *quaternion[[1, 2, 3, 0]]]
        return np.array([*joints, *poses], np.float32)

    def picture(self, camera: str) -> Image:
        """Draw what a camera sees, uint8 [image_size, image_size, 3], upright."""
        if self._renderer is None:
            self._renderer = make_renderer(self._mujoco, self.model, self._image_size)
        self._renderer.update_scene(self._data, camera=camera, scene_option=self._look)
        image: Image = self._renderer.render().copy()
        return image

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()

    def _name(self, kind: str, number: int) -> str:
        return str(self._mujoco.mj_id2name(self.model, getattr(self._mujoco.mjtObj, f"mjOBJ_{kind}"), number))

    def _id(self, kind: str, name: str) -> int:
        return int(self._mujoco.mj_name2id(self.model, getattr(self._mujoco.mjtObj, f"mjOBJ_{kind}"), name))


def record_replay(
    task: str,
    out: Path | str,
    *,
    episodes: int | None = None,
    cameras: Sequence[str] | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReplayReport:
    """Draw the demonstrations of `task` ("lift", "handover", or a file) into the LeRobot data set `out`.

    `episodes`: the first so many (None: all). `cameras` (None: agentview and one in each hand). `image_size` in
    pixels (None: 128). `progress(done, total)` counts frames. Raises `UsageError` for a wrong name and where `out`
    exists, `MachineError` where a package or library is missing, `SourceError` where the record does not hold.
    """
    out = Path(out)
    for what, count in (("episodes", episodes), ("pixels", image_size)):
        if count is not None and count < 1:
            raise UsageError(f"{count} {what}", expected="at least 1")
    found = find_demonstrations(task)
    names = tuple(found.lengths)[:episodes]
    size, began = IMAGE_SIZE if image_size is None else image_size, time.monotonic()
    first = Scene(found.read(names[0]), f"{found.path}:data/{names[0]}", size)
    try:
        chosen = _choose_cameras(first, cameras)
        width = found.read(names[0]).actions.shape[1]
        with _writer(found, first, width, chosen, size, out, overwrite) as writer:
            _draw(found, names, chosen, size, writer, progress)
            facts = {"demonstrations": list(names), "file": found.path.name, "versions": _versions()}
            facts |= {"environment": found.environment, "license": found.licence}
            (writer.folder / "meta" / "recording.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            summary = writer.seal()
            (writer.folder / "README.md").write_text(_card(found, chosen, size, summary), encoding="utf-8")
            writer.publish()
    finally:
        first.close()
    counted = (summary.episodes, summary.frames, summary.bytes, summary.sha256, time.monotonic() - began)
    return ReplayReport(str(out), f"robosuite:{found.environment}", *counted, names)


def _draw(
    found: DemonstrationFile,
    names: Sequence[str],
    cameras: Sequence[str],
    size: int,
    writer: LeRobotWriter,
    progress: Progress | None,
) -> None:
    total, done = sum(found.lengths[name] for name in names), 0
    for name in names:
        demonstration = found.read(name)
        scene = Scene(demonstration, f"{found.path}:data/{name}", size)
        try:
            seen: dict[str, list[Image]] = {camera: [] for camera in cameras}
            states = []
            for state in demonstration.states:
                scene.show(state)
                states.append(scene.proprioception())
                for camera, pictures in seen.items():
                    pictures.append(scene.picture(camera))
                done += 1
                if progress is not None:
                    progress(done, total)
        finally:
            scene.close()
        vectors = {
            "action": demonstration.actions,
            "observation.state": np.stack(states),
            "observation.environment_state": demonstration.states[:, 1:].astype(np.float32),
        }
        writer.add_episode(vectors, seen, found.task)


def _writer(
    found: DemonstrationFile, scene: Scene, width: int, cameras: Sequence[str], size: int, out: Path, overwrite: bool
) -> LeRobotWriter:
    arms = [f"robot{k}_{part}" for k in range(width // len(ARM)) for part in ARM]
    names = arms if width % len(ARM) == 0 else [f"action_{i}" for i in range(width)]
    return LeRobotWriter(
        out,
        vectors={
            "action": VectorFeature(tuple(names)),
            "observation.state": VectorFeature(scene.state_names),
            "observation.environment_state": VectorFeature(scene.privileged_names, privileged=True),
        },
        cameras=cameras,
        image_size=size,
        fps=found.fps,
        robot_type="robosuite",
        info={"license": found.licence},
        overwrite=overwrite,
    )


def _choose_cameras(scene: Scene, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if wanted is None:
        return tuple(name for name in scene.cameras if name == "agentview" or name.endswith("_eye_in_hand"))
    for camera in wanted:
        if camera not in scene.cameras:
            hint = nearest(camera, scene.cameras)
            raise UsageError(f"unknown camera {camera!r}{hint}", expected=f"one of {', '.join(scene.cameras)}")
    return tuple(dict.fromkeys(wanted))


def _import_mujoco() -> Any:
    if importlib.util.find_spec("mujoco") is None:
        raise MachineError("the package mujoco is not installed", fix=missing_extra("sim"))
    choose_offscreen_library(required=True)
    return importlib.import_module("mujoco")


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("mujoco", "av", "pyarrow")}


def _card(found: DemonstrationFile, cameras: Sequence[str], size: int, summary: Summary) -> str:
    return f"""---
license: {found.licence.lower()}
task_categories: [robotics]
tags: [LeRobot]
---
# {summary.episodes} human demonstrations of robosuite's {found.environment}: "{found.task}"

A LeRobot v3.0 data set, drawn by `vla record robosuite` from the recorded simulator states.

- {summary.episodes} episodes, {summary.frames} frames at {found.fps:g} Hz, {summary.bytes / 2**20:.1f} MiB.
- Cameras: {", ".join(cameras)}; {size} px, H.264, upright.
- `action` is what the demonstrator commanded, as recorded: fractions of the controller's limits, not clipped.
- `observation.state`: joint angles (rad), gripper (m), each hand's position (m) and quaternion xyzw with qw >= 0.
- `observation.environment_state`: MuJoCo's qpos and qvel, marked `"privileged": true`: never an input of an honest
  policy.
- SHA-256 of `find data meta videos -type f | LC_ALL=C sort | xargs sha256sum`: {summary.sha256}
- Licence of the data: {found.licence}.
"""
