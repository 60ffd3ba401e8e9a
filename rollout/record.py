"""Record demonstrations of a simulator's scripted expert as a LeRobot v3.0 data set.

The executed action is the expert's plus Gaussian noise; the label is the expert's own, clean action for what was
seen. So the data show how to come back from small mistakes, which a head trained on them will make
(Laskey et al. 2017, DART, https://arxiv.org/abs/1703.09327).

Attempt i of run seed s plays environment seed s * 1,000,000 + i; evaluation uses the upper half of each million
(`rollout/envs/registry.py`), so no demonstrated scene is ever evaluated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.rollout.envs.base import Env, Observation
from vla.rollout.envs.registry import demonstration_seed, make_env
from vla.rollout.lerobot_writer import LeRobotWriter, VectorFeature
from vla.rollout.recording_card import NOISE, STEPS_AFTER_SUCCESS, Recording
from vla.stores.errors import DataError, UsageError

ATTEMPTS_PER_EPISODE = 10
"""The weakest scripted expert with noise (handle-pull-side) succeeded in 1 of 6 attempts; below 1 in 10 give up."""

_NOISE_STREAM = 1
"""Second word of the noise generator's seed, so that it is not the generator that draws the scene."""

Progress = Callable[[int, int], None]


@runtime_checkable
class ExpertEnv(Env, Protocol):
    """An environment that can demonstrate its task.

    `privileged_names` label `Observation.privileged`; `packages` are the distributions whose versions the record
    keeps; `licence` covers what the pictures show.
    """

    robot_type: str
    licence: str
    packages: tuple[str, ...]
    privileged_names: tuple[str, ...]

    def expert_action(self, observation: Observation) -> NDArray[np.float32]:
        """Return the expert's action for `observation`, float32 [A] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class RecordReport:
    """What `record` wrote. `seeds` made the kept episodes, in order; `failed_seeds` were dropped."""

    out: str
    environment: str
    episodes: int
    frames: int
    bytes: int
    sha256: str
    seconds: float
    seeds: tuple[int, ...]
    failed_seeds: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


@dataclass
class _Demonstration:
    """The frames of one attempt: what was seen, and what the expert would do there."""

    observations: list[Observation]
    actions: list[NDArray[np.float32]]
    success: bool

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        return {
            "action": np.stack(self.actions),
            "observation.state": np.stack([seen.state for seen in self.observations]),
            "observation.environment_state": np.stack([seen.privileged for seen in self.observations]),
        }

    def images(self, cameras: Sequence[str]) -> dict[str, list[Image]]:
        return {camera: [seen.images[camera] for seen in self.observations] for camera in cameras}


def record(
    env_name: str,
    episodes: int,
    out: Path | str,
    *,
    seed: int = 0,
    noise: float = NOISE,
    cameras: Sequence[str] | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecordReport:
    """Record `episodes` successful demonstrations of `env_name` (`metaworld:push-v3`) into the folder `out`.

    `noise` is the standard deviation, in units of the action's [-1, 1], of what is added to the executed action.
    Attempts that fail are dropped, counted, and replaced by the next seed. Equal arguments give equal files.
    `progress(done, total)` is called after every kept episode.

    Raises `UsageError` for a wrong name or value and where `out` exists, `MachineError` where the simulator is not
    installed, `DataError` where the expert succeeds in less than one attempt of ten.
    """
    out = Path(out)
    if episodes < 1:
        raise UsageError(f"{episodes} episodes", expected="at least 1")
    if not 0 <= noise <= 1:
        raise UsageError(f"noise {noise:g}", expected="0 to 1, a fraction of the action's range")
    if seed < 0:
        raise UsageError(f"seed {seed}", expected="0 or more")
    options = {"cameras": cameras, "image_size": image_size}
    env = make_env(env_name, **{name: value for name, value in options.items() if value is not None})
    began = time.monotonic()
    try:
        if not isinstance(env, ExpertEnv):
            raise UsageError(f"{env_name} has no scripted expert", expected="a simulator that can demonstrate its task")
        chosen = tuple(cameras) if cameras is not None else None
        recording = Recording(env.spec, env.licence, env.packages, out, seed, noise, chosen, image_size)
        with _writer(env, out, overwrite) as writer:
            kept, failed = _demonstrate(env, writer, episodes, seed, noise, progress)
            provenance = json.dumps(recording.provenance(kept, failed), indent=1)
            (writer.folder / "meta" / "recording.json").write_text(provenance + "\n", encoding="utf-8")
            summary = writer.seal()
            card = recording.card(summary, len(failed))
            (writer.folder / "README.md").write_text(card, encoding="utf-8")
            writer.publish()
    finally:
        env.close()
    return RecordReport(
        str(out),
        env.spec.name,
        summary.episodes,
        summary.frames,
        summary.bytes,
        summary.sha256,
        time.monotonic() - began,
        tuple(kept),
        tuple(failed),
    )


def _writer(env: ExpertEnv, out: Path, overwrite: bool) -> LeRobotWriter:
    spec = env.spec
    return LeRobotWriter(
        out,
        vectors={
            "action": VectorFeature(spec.action_names),
            "observation.state": VectorFeature(spec.state_names),
            "observation.environment_state": VectorFeature(env.privileged_names, privileged=True),
        },
        cameras=spec.cameras,
        image_size=spec.image_size,
        fps=spec.fps,
        robot_type=env.robot_type,
        info={"license": env.licence},
        overwrite=overwrite,
    )


def _demonstrate(
    env: ExpertEnv, writer: LeRobotWriter, episodes: int, seed: int, noise: float, progress: Progress | None
) -> tuple[list[int], list[int]]:
    """Play seeds until `episodes` attempts succeeded; return the seeds that did and those that did not."""
    kept: list[int] = []
    failed: list[int] = []
    while len(kept) < episodes:
        attempts = len(kept) + len(failed)
        if attempts >= ATTEMPTS_PER_EPISODE * episodes:
            raise DataError(
                f"the expert of {env.spec.name} succeeded in {len(kept)} of {attempts} attempts",
                expected=f"{episodes} successes",
                fix="--noise 0",
            )
        env_seed = demonstration_seed(seed, attempts)
        demonstration = _attempt(env, env_seed, noise)
        if not demonstration.success:
            failed.append(env_seed)
            continue
        writer.add_episode(demonstration.vectors(), demonstration.images(env.spec.cameras), env.spec.task)
        kept.append(env_seed)
        if progress is not None:
            progress(len(kept), episodes)
    return kept, failed


def _attempt(env: ExpertEnv, env_seed: int, noise: float) -> _Demonstration:
    """Play one episode until `STEPS_AFTER_SUCCESS` steps after success, or until its time is over."""
    generator = np.random.default_rng((env_seed, _NOISE_STREAM))
    demonstration = _Demonstration([], [], success=False)
    observation = env.reset(env_seed)
    steps_left = STEPS_AFTER_SUCCESS
    while steps_left > 0:
        label = env.expert_action(observation)
        demonstration.observations.append(replace(observation, images=dict(observation.images)))
        demonstration.actions.append(label)
        if demonstration.success:
            steps_left -= 1
        executed = np.clip(label + noise * generator.standard_normal(label.shape), -1.0, 1.0).astype(np.float32)
        result = env.step(executed)
        observation, demonstration.success = result.observation, result.success
        if result.done:
            break
    return demonstration
