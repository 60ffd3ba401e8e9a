"""Meta-World v3 (MIT licence): a Sawyer arm, 50 tasks and a scripted expert for each.

The simulator runs at 80 Hz; an action is repeated so that the policy acts at 20 Hz. Actions are float32 [4] in
[-1, 1]: hand displacement (dx, dy, dz; 1 cm per simulator step at 1) and gripper effort (-1 opens, 1 closes).
Observations, float32 [39] as Meta-World lays them out: hand xyz (m), gripper opening (0..1), two objects' position
and quaternion (14), the same 18 numbers one simulator step earlier, goal xyz. Only the first four are honest
proprioception; the rest is simulator truth.

What Meta-World 3.1 does in silence, and what is done about it, stands at each place below.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.rollout.envs.base import EnvSpec, LiveImages, Observation, StepResult
from vla.rollout.envs.metaworld_tasks import INSTRUCTIONS, instruction
from vla.rollout.envs.offscreen import choose_offscreen_library, make_renderer
from vla.stores.errors import MachineError, UsageError, missing_extra
from vla.stores.settings import nearest

SIMULATOR_HZ = 80
"""dt = 0.0125 s: 5 physics steps of 2.5 ms (`render_fps` of Meta-World's base class)."""

CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
"""Cameras whose pictures come out rotated by 180 degrees."""

STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper")
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
_OBJECTS = tuple(f"object{i}_{part}" for i in (1, 2) for part in ("x", "y", "z", "qx", "qy", "qz", "qw"))
PRIVILEGED_NAMES = (
    *STATE_NAMES,
    *_OBJECTS,
    *(f"previous_{name}" for name in (*STATE_NAMES, *_OBJECTS)),
    *("goal_x", "goal_y", "goal_z"),
)


class MetaWorldEnv:
    """One Meta-World task, seen through `cameras` as square pictures of `image_size` pixels.

    `fps` has to divide 80. `max_steps` is the time limit in control steps (left out: Meta-World's 500 simulator
    steps). With no cameras nothing is rendered and no OpenGL library is needed.
    """

    spec: EnvSpec
    robot_type = "sawyer"
    licence = "MIT"
    packages = ("metaworld", "mujoco")
    privileged_names = PRIVILEGED_NAMES

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = ("corner3", "topview"),
        image_size: int = 128,
        fps: float = 20.0,
        max_steps: int | None = None,
    ) -> None:
        _check_options(task, cameras, image_size, fps, max_steps)
        self._mujoco, env_classes, self._experts = _import_simulator(renders=bool(cameras))
        if task not in env_classes:
            raise UsageError(f"the installed Meta-World has no task {task!r}{nearest(task, env_classes)}")
        self._task = task
        self._repeat = round(SIMULATOR_HZ / fps)
        self._sim: Any = env_classes[task](width=image_size, height=image_size)
        # Trap: the goal is hidden by default, and the observation space was cached with goal bounds [0, 0] by the
        # constructor; step() clips to it, so that an expert which needs the goal would be sent to the origin.
        self._sim._partially_observable = False
        self._sim.__dict__.pop("sawyer_observation_space", None)
        # Trap: without these two, reset() repeats one frozen scene or draws from numpy's global generator.
        self._sim.seeded_rand_vec = True
        self._sim._freeze_rand_vec = False
        # Trap: step() refuses to run until a benchmark has set a task; here the scene comes from the seed instead.
        self._sim._set_task_called = True
        limit = max_steps if max_steps is not None else self._sim.max_path_length // self._repeat
        # Trap: step() raises at max_path_length (500); ours is the limit that counts.
        self._sim.max_path_length = limit * self._repeat
        self.spec = EnvSpec(
            name=f"metaworld:{task}",
            task=instruction(task),
            cameras=tuple(cameras),
            image_size=image_size,
            fps=fps,
            state_names=STATE_NAMES,
            action_names=ACTION_NAMES,
            max_steps=limit,
        )
        self._closed = False
        self._renderer = self._make_renderer() if cameras else None
        self._images = LiveImages((), self._render)
        self._steps_left = 0
        self._success = False
        self._expert: Any = None

    def reset(self, seed: int) -> Observation:
        """Start the episode that belongs to `seed`. Equal seeds give equal observations whatever ran before."""
        if self._closed:
            raise UsageError(f"{self.spec.name} is closed", expected="an open environment")
        self._images.expire()
        # Trap: reset(seed=...) ignores its seed; the scene is drawn from this generator.
        self._sim.np_random = np.random.default_rng(seed)
        self._sim.reset()
        # Trap: reset_model() moves bodies and goal markers in the model but does not recompute their poses, so the
        # first frame would show another goal, and some tasks (drawer, window) would report another object position.
        self._mujoco.mj_forward(self._sim.model, self._sim.data)
        current = self._sim._get_curr_obs_combined_no_goal()
        self._sim._prev_obs = current
        self._steps_left = self.spec.max_steps
        self._success = False
        self._expert = None
        return self._observe(self._sim._get_obs())

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Repeat `action`, float32 [4] clipped to [-1, 1], for 1 / fps seconds.

        Success counts from any simulator step and stays; `done` says that the time is over, never that the task has
        succeeded. Raises `UsageError` before the first `reset` and after `done`.
        """
        if self._steps_left <= 0:
            raise UsageError("step() outside an episode", expected="reset(seed) first")
        clipped = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if clipped.shape != (4,) or not np.isfinite(clipped).all():
            raise UsageError(f"action {action!r}", expected="4 finite numbers: dx, dy, dz, gripper")
        self._images.expire()
        for _ in range(self._repeat):
            raw, _, _, _, info = self._sim.step(clipped)
            self._success |= bool(info["success"])
        self._steps_left -= 1
        return StepResult(self._observe(raw), self._success, self._steps_left == 0)

    def expert_action(self, observation: Observation) -> NDArray[np.float32]:
        """Return the scripted expert's action, float32 [4] clipped to [-1, 1], from the privileged state."""
        if self._expert is None:
            if self._task not in self._experts:
                raise UsageError(f"Meta-World has no scripted expert for {self._task!r}")
            self._expert = self._experts[self._task]()
        with warnings.catch_warnings():
            # Every expert asks for more than the arm can do, on purpose; the simulator's warning says so each time.
            warnings.filterwarnings("ignore", message="Constant")
            action = np.asarray(self._expert.get_action(observation.privileged.astype(np.float64)), np.float32)
        return np.clip(action, -1.0, 1.0)

    def close(self) -> None:
        """Free the renderer and its OpenGL context."""
        self._closed = True
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observe(self, raw: NDArray[np.float64]) -> Observation:
        privileged = raw.astype(np.float32)
        self._images = LiveImages(self.spec.cameras, self._render)
        return Observation(self._images, privileged[: len(STATE_NAMES)].copy(), privileged)

    def _render(self, camera: str) -> Image:
        if self._renderer is None:
            raise UsageError(f"{self.spec.name} is closed", expected="an open environment")
        self._renderer.update_scene(self._sim.data, camera=camera)
        image: Image = self._renderer.render()
        # A pretrained backbone has never seen the world upside down.
        return np.ascontiguousarray(image[::-1, ::-1]) if camera in UPSIDE_DOWN else image

    def _make_renderer(self) -> Any:
        return make_renderer(self._mujoco, self._sim.model, self.spec.image_size)


def _check_options(task: str, cameras: Sequence[str], image_size: int, fps: float, max_steps: int | None) -> None:
    if task not in INSTRUCTIONS:
        hint = nearest(task, INSTRUCTIONS)
        raise UsageError(f"unknown Meta-World task {task!r}{hint}", expected="a task such as push-v3")
    for camera in cameras:
        if camera not in CAMERAS:
            hint = nearest(camera, CAMERAS)
            raise UsageError(f"unknown camera {camera!r}{hint}", expected=f"one of {', '.join(CAMERAS)}")
    if len(set(cameras)) != len(cameras):
        raise UsageError(f"cameras {', '.join(cameras)} name one twice", expected="each camera once")
    if image_size < 1:
        raise UsageError(f"image size {image_size}", expected="at least 1 pixel")
    if fps <= 0 or SIMULATOR_HZ % fps:
        raise UsageError(f"{fps:g} control steps per second", expected=f"a divisor of {SIMULATOR_HZ}, such as 20")
    if max_steps is not None and max_steps < 1:
        raise UsageError(f"a time limit of {max_steps} steps", expected="at least 1")


def _import_simulator(*, renders: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Import MuJoCo and Meta-World late (0.8 s); return (mujoco, task to environment class, task to expert class)."""
    missing = [package for package in ("mujoco", "metaworld") if importlib.util.find_spec(package) is None]
    if missing:
        raise MachineError(f"the package {' and '.join(missing)} is not installed", fix=missing_extra("sim"))
    choose_offscreen_library(required=renders)
    mujoco = importlib.import_module("mujoco")
    tasks = importlib.import_module("metaworld.env_dict")
    experts = importlib.import_module("metaworld.policies")
    return mujoco, dict(tasks.ENV_CLS_MAP), dict(experts.ENV_POLICY_MAP)
