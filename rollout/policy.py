"""Live backbone and trained head as one policy: pictures in, actions out.

The same `preprocess` and `encode` that made the store run here, and the head's observation is assembled as a window
of the store is, so that a policy sees live exactly what its head was trained on (tests/rollout/test_policy.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import Backbone
from vla.featurize.image import Image
from vla.featurize.rebuild import BackboneSettings, rebuild_backbone, require_known
from vla.featurize.views import live_view
from vla.heads.batch import Batch
from vla.heads.checkpoint import HeadSettings, StoreRecord, TrainedHead, load_head
from vla.rollout.envs.base import EnvSpec, Observation
from vla.rollout.state_check import FarState, StateCheck
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings
from vla.training.storage import round_trip_dtype
from vla.training.torch_device import choose_device

LIVE_STATES = ("state", "privileged")
"""Step columns that an `Observation` has."""

log = logging.getLogger(__name__)

CAMERA_PREFIX = "observation.images."
"""LeRobot's column prefix: its camera `observation.images.top` is the environment's `top`."""


class PolicySettings(Settings):
    """`far_state`: see `Policy`."""

    far_state: FarState = "warn"


class RolloutSettings(HeadSettings):
    """What `vla rollout --set` gives: `model` of the head, `backbones` and `policy` as `Policy` describes them."""

    backbones: BackboneSettings = {}
    policy: PolicySettings = PolicySettings()


@dataclass
class Latency:
    """Seconds of each decision: the frozen backbones, the head, and both together."""

    backbone: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the 50th and 95th percentile of a decision and the medians of its parts, in milliseconds."""
        if not self.head:
            return {}
        total = np.add(self.backbone, self.head) * 1e3
        return {
            "p50_ms": float(np.percentile(total, 50)),
            "p95_ms": float(np.percentile(total, 95)),
            "backbone_p50_ms": float(np.median(self.backbone) * 1e3),
            "head_p50_ms": float(np.median(self.head) * 1e3),
            "decisions": float(len(total)),
        }


class Policy:
    """Acts in an environment: decides on a chunk of actions, executes `n_action` of them, decides again.

    A head that plans (`HeadModel.plan_interval`) is asked for another plan after that many environment steps, with the
    next decision. Not thread-safe. Call `reset` at the start of every episode. Raises `UsageError` for a head whose
    label is a chunk that rows hold as a whole, such as waypoints: none of its steps is an action.

    `backbones` {name: {option: value}}: checkouts and weights of the backbones, which a checkpoint records and never
    chooses, such as {"da3": {"weights": "weights/da3"}}; nothing for backbones with their own default weights.
    `far_state`: whether a state far outside the training's is logged, once a column, or refused.
    """

    def __init__(
        self,
        head: TrainedHead,
        *,
        device: str = "auto",
        n_action: int | None = None,
        backbones: Mapping[str, Mapping[str, Any]] | None = None,
        far_state: FarState = "warn",
    ) -> None:
        if head.artefact.io.chunk is not None:
            raise UsageError(
                f"the head plans {head.artefact.data.target!r}, which no simulator here executes",
                expected="a head that predicts one action a step",
                fix="--set data.target=action; or drive a base by vla.heads.waypoints.waypoint_velocities",
            )
        self.head = head
        self.latency = Latency()
        self._states_seen = StateCheck(head, far_state)
        self._device = choose_device(device)
        self._model = head.model.to(self._device).eval()
        self._io = head.artefact.io
        if not self._model.acts:
            raise UsageError(f"{head.folder} makes no actions", expected="a head with an action branch")
        unseen = [name for name in head.artefact.state if name not in LIVE_STATES]
        if unseen and self._model.columns:
            raise UsageError(
                f"{head.folder} reads the step column {', '.join(unseen)}, which no robot or simulator tells",
                expected=f"a state of {' and '.join(LIVE_STATES)}",
                fix="a head trained with --set 'data.state=[\"state\"]'",
            )
        self._backbones: list[tuple[Backbone, StoreRecord]] = []
        self._reads = self._model.reads
        self._masks = {name: f"{name}_mask" for name in self._reads if self._io.features[name].masked}
        self._wanted = {*self._reads, *self._masks.values()}
        live = [store for store in head.artefact.stores if set(store.features) & self._wanted]
        require_known(backbones or {}, [(store.recipe, store.features) for store in live])
        for store in live:
            identity = store.fingerprint["backbone"]
            backbone = rebuild_backbone(store.recipe, identity, backbones, features=tuple(store.features))
            backbone.to(self._device)
            self._backbones.append((backbone, store))
        # Frames whose pictures a decision reads: its observations, and what their features look back on.
        self._reach = head.config.n_obs + max((backbone.spec().context for backbone, _ in self._backbones), default=0)
        self._n_action = head.config.n_action if n_action is None else n_action
        if not 1 <= self._n_action <= head.config.n_action_max:
            raise UsageError(f"{self._n_action} actions a decision", expected=f"1 to {head.config.n_action_max}")
        self.reset(seed=0, task=self._first_task())

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        *,
        device: str = "auto",
        n_action: int | None = None,
        settings: Mapping[str, Any] | None = None,
        backbones: Mapping[str, Mapping[str, Any]] | None = None,
        far_state: FarState = "warn",
    ) -> Policy:
        """Return the policy of a run of `vla train-head`, or of one of its checkpoints.

        `settings`: see `load_head`; the others: see the class.
        """
        head = load_head(run, settings=settings)
        return cls(head, device=device, n_action=n_action, backbones=backbones, far_state=far_state)

    def env_options(self) -> dict[str, Any]:
        """Return what an environment has to be made with: the cameras that the backbones look through, and the size of
        their pictures and the steps a second of the demonstrations, where the checkpoint knows them."""
        cameras = [camera.removeprefix(CAMERA_PREFIX) for _, store in self._backbones for camera in store.cameras]
        options: dict[str, Any] = {"cameras": tuple(dict.fromkeys(cameras))}
        sides = {side for size in self._sizes().values() for side in size}
        if len(sides) == 1:  # an environment draws squares of one size: `check` names others
            options["image_size"] = sides.pop()
        if self._fps is not None:
            options["fps"] = self._fps
        return options

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Return (height, width) of the demonstrations' pictures, by the environment's names of the cameras."""
        known = (store.picture_sizes for _, store in self._backbones)
        return {camera.removeprefix(CAMERA_PREFIX): size for sizes in known for camera, size in sizes.items()}

    @property
    def _fps(self) -> float | None:
        return self.head.artefact.stores[0].fps  # all of one source, but for a text store, the last

    def check(self, spec: EnvSpec) -> None:
        """Compare with an environment.

        Raises `UsageError` naming cameras, sizes of pictures, steps a second, actions or tasks that do not fit.
        Checkpoints and stores made before sizes were kept are not compared by them: a warning is logged.
        """
        for _, store in self._backbones:
            missing = [camera for camera in store.cameras if camera.removeprefix(CAMERA_PREFIX) not in spec.cameras]
            if missing:
                raise UsageError(
                    f"{spec.name} has no camera {', '.join(missing)}", expected=f"{', '.join(spec.cameras)}"
                )
        sizes = self._sizes()
        for camera, (height, width) in sizes.items():
            if (height, width) != (spec.image_size, spec.image_size):
                raise UsageError(
                    f"{spec.name} draws pictures of {spec.image_size} x {spec.image_size}",
                    expected=f"{width} x {height}, as {camera} in the demonstrations",
                )
        if self._backbones and not sizes:
            log.warning("how large the demonstrations' pictures were is not known: %s px are drawn", spec.image_size)
        if self._fps is not None and not math.isclose(self._fps, spec.fps, rel_tol=1e-6):
            found = f"{spec.name} takes {spec.fps:g} steps a second"
            raise UsageError(found, expected=f"{self._fps:g}, as in the demonstrations")
        wanted = self._io.action_dim if self._dims is None else int(self._dims_of(spec.task).sum())
        if len(spec.action_names) != wanted:
            raise UsageError(f"{spec.name} takes {len(spec.action_names)} actions", expected=f"{wanted}")

    def reset(self, *, seed: int, task: str) -> None:
        """Forget the episode. `seed` is that of the sampler's noise; `task` the instruction.

        Raises `UsageError` for an instruction that the head was not trained on.
        """
        self._task = self._number(task)
        self._dims = self._dims_of(task) if self._io.task_dims else None
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._history: deque[dict[str, Any]] = deque(maxlen=self._reach)
        self._planned: deque[NDArray[np.float32]] = deque()
        self._plan: torch.Tensor | None = None
        self._plan_age = 0

    def _first_task(self) -> str:
        """Return the first instruction that the head can act on: of a group of tasks, not every one is."""
        dims, tasks = self._io.task_dims, self._model.instructions
        can = [text for text, has in zip(tasks, dims, strict=False) if has and text in self.head.instructions]
        return next(iter(can or self.head.instructions), "")

    def _number(self, task: str) -> int:
        tasks, trained = self._model.instructions, self.head.instructions
        if task in trained:
            return tasks.index(task)
        if any(trained):
            raise UsageError(f"the head was not trained on {task!r}", expected=f"one of {'; '.join(trained)}")
        return 0  # demonstrations without instructions: whatever is told, it does what it knows

    def _dims_of(self, task: str) -> NDArray[np.bool_]:
        """Return which action dimensions a task has, bool [A]. Raises `UsageError` where training does not tell."""
        dims = self._io.task_dims[self._number(task)]
        if not dims:
            known = "; ".join(text for text, has in zip(self._io.tasks, self._io.task_dims, strict=True) if has)
            raise UsageError(
                f"the head was not trained on {task!r} with one set of actions", expected=f"one of {known}"
            )
        return np.array(dims)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Return the action for this control step, float32 [A], in the data's units; A is what the task really has.

        Raises `DataError` where a decision would read a picture that is missing, or of another size or type than the
        demonstrations', naming the camera; a state that is not finite or, with `far_state` "refuse", far outside the
        training's, naming the column; and where the actions are not finite.
        """
        self._history.append(self._remember(observation))
        if not self._planned:
            self._planned.extend(self._decide())
        self._plan_age += 1
        return self._planned.popleft()

    def _remember(self, observation: Observation) -> dict[str, Any]:
        # Pictures are looked at only where a decision will read them: rendering costs more than the simulator's step.
        needed = len(self._planned) < self._reach
        frame = self._pictures(observation.images) if needed and self._backbones else None
        state = {"state": observation.state, "privileged": observation.privileged}
        return {"images": frame, **state, "inputs": {}, "features": None}

    def _pictures(self, images: Mapping[str, Image]) -> dict[str, Image]:
        """Return the pictures that the backbones read, by camera; other cameras are not even drawn."""
        cameras = {camera.removeprefix(CAMERA_PREFIX) for _, store in self._backbones for camera in store.cameras}
        if missing := sorted(cameras - set(images)):
            raise DataError(
                f"the observation has the cameras {', '.join(sorted(images)) or 'none'}, and no {', '.join(missing)}",
                expected=", ".join(sorted(cameras)),
            )
        sizes, pictures = self._sizes(), {camera: images[camera] for camera in sorted(cameras)}
        for camera, picture in pictures.items():
            shape, dtype = np.shape(picture), getattr(picture, "dtype", type(picture).__name__)
            height, width = sizes.get(camera, shape[:2] if len(shape) == 3 else (0, 0))
            if shape != (height, width, 3) or dtype != np.uint8:
                wanted = f"{width} x {height} pixels" if camera in sizes else "[H, W, 3]"
                raise DataError(
                    f"the picture of {camera} is {list(shape)} {dtype}",
                    expected=f"{wanted} of RGB uint8, as in the demonstrations",
                )
        return pictures

    def _decide(self) -> list[NDArray[np.float32]]:
        began = time.perf_counter()
        frames = list(self._history)
        for last in range(max(len(frames) - self.head.config.n_obs, 0), len(frames)):
            if frames[last]["features"] is None:
                frames[last]["features"] = self._encode(frames[: last + 1])
        frames = frames[-self.head.config.n_obs :]
        padding = self.head.config.n_obs - len(frames)
        frames = [frames[0]] * padding + frames  # as a window of the store repeats an episode's first frame
        encoded = time.perf_counter()
        state = self._states(frames) if self._model.columns else None

        def window(name: str, count: int) -> torch.Tensor:
            return torch.stack([frame["features"][name] for frame in frames[-count:]])[None]

        batch = Batch(
            features={name: window(name, count) for name, count in self._reads.items()},
            state=None if state is None else torch.from_numpy(state)[None],
            task=torch.tensor([self._task]),
            obs_valid=torch.tensor([[False] * padding + [True] * (len(frames) - padding)]),
            action_dims=None if self._dims is None else torch.from_numpy(self._dims)[None],
            feature_valid={name: window(mask, self._reads[name]).bool() for name, mask in self._masks.items()},
        ).to(self._device)
        interval = self._model.plan_interval
        if interval is not None and (self._plan is None or self._plan_age >= interval):
            self._plan, self._plan_age = self._model.plan(batch), 0
        batch = replace(batch, plan=self._plan)
        chunk = self._model.act(batch, generator=self._generator)[0, : self._n_action].cpu().numpy()
        chunk = chunk if self._dims is None else chunk[:, self._dims]
        if not np.isfinite(chunk).all():
            raise DataError(f"{self.head.folder} made actions that are not finite", expected="finite numbers")
        self.latency.backbone.append(encoded - began)
        self.latency.head.append(time.perf_counter() - encoded)
        return list(chunk.astype(np.float32))

    def _states(self, frames: list[dict[str, Any]]) -> NDArray[np.float32]:
        """Return the states of some frames, float32 [n_obs, S]. Raises what `StateCheck.check` raises."""
        names = self.head.artefact.state
        states = np.stack([np.concatenate([frame[name] for name in names]) for frame in frames]).astype(np.float32)
        if states.shape[1] == self._io.state_dim:  # another width is refused by the head itself
            self._states_seen.check(states)
        return states

    def _encode(self, frames: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the features of the last of some remembered frames, `{name: [V, *shape]}`."""
        features: dict[str, torch.Tensor] = {}
        for number, (backbone, store) in enumerate(self._backbones):
            infos, scales, spec = store.features, store.scales, backbone.spec()
            past = frames[-(spec.context + 1) :]
            for frame in past:
                if number not in frame["inputs"]:
                    frame["inputs"][number] = self._input(backbone, store.cameras, frame["images"])
            window = [past[0]] * (spec.context + 1 - len(past)) + past  # as the store repeats an episode's first frame
            inputs = torch.stack([frame["inputs"][number] for frame in window])
            for name, values in backbone.encode(inputs[None] if spec.context else inputs).items():
                if name in self._wanted:
                    features[name] = round_trip_dtype(values[0], infos[name].dtype, scales.get(name))
        return features

    def _input(self, backbone: Backbone, cameras: tuple[str, ...], images: dict[str, Any]) -> torch.Tensor:
        task = self._model.instructions[self._task]
        pictures = [images[camera.removeprefix(CAMERA_PREFIX)] for camera in cameras]
        return torch.stack([backbone.preprocess(live_view(backbone.spec(), picture, task)) for picture in pictures])
