"""Closed loop: a policy in a simulator, on scenes that no demonstration showed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.rollout.envs.base import Env, EnvSpec, Observation
from vla.rollout.envs.registry import evaluation_seed
from vla.rollout.policy import Latency
from vla.rollout.success import SuccessRate
from vla.rollout.video_writer import VideoFile
from vla.stores.errors import UsageError
from vla.stores.filesystem import explaining, refuse_file


class Actor(Protocol):
    """What can be rolled out: a `Policy`, or an expert."""

    latency: Latency

    def check(self, spec: EnvSpec) -> None:
        """Compare with the environment before the first episode."""
        ...

    def reset(self, *, seed: int, task: str) -> None:
        """Start an episode."""
        ...

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Return the action for this control step."""
        ...


@dataclass
class RolloutReport:
    """What the episodes showed. `steps` are control steps until success, or until time was over."""

    environment: str
    success: SuccessRate
    successes: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    latency: dict[str, float] = field(default_factory=dict)
    video: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        low, high = self.success.interval
        rates = {"successes": self.success.successes, "episodes": self.success.episodes}
        rest = {key: value for key, value in self.__dict__.items() if key not in ("success", "successes")}
        return {**rest, **rates, "rate": self.success.rate, "low": low, "high": high, "succeeded": self.successes}


def roll_out(
    env: Env,
    actor: Actor,
    episodes: int,
    *,
    seed: int = 0,
    video: Path | str | None = None,
    video_episodes: int = 3,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RolloutReport:
    """Play `episodes` evaluation scenes of run seed `seed` and count successes.

    An episode ends with success or when the environment's time is over. `video`: an .mp4 of the first
    `video_episodes` episodes, cameras side by side; one that exists is replaced with `overwrite` alone. Raises
    `UsageError` before the first episode where policy and environment do not fit, where there is nothing to film, for
    another name of a video, and for no episode at all.
    """
    video = None if video is None else Path(video)
    if episodes < 1:
        raise UsageError(f"{episodes} episodes", expected="at least 1")
    actor.check(env.spec)
    if video is not None:
        _require_video(video, env.spec, overwrite=overwrite)
    report = RolloutReport(env.spec.name, SuccessRate(0, 0))
    frames: list[Image] = []
    for number in range(episodes):
        scene = evaluation_seed(seed, number)
        actor.reset(seed=scene, task=env.spec.task)
        observation, success, done, steps = env.reset(scene), False, False, 0
        filming = video is not None and number < video_episodes
        while not (success or done):
            if filming:
                frames.append(_side_by_side(observation))
            result = env.step(actor.act(observation))
            observation, success, done = result.observation, result.success, result.done
            steps += 1
        if filming:
            frames.append(_side_by_side(observation))
        report.successes.append(success)
        report.steps.append(steps)
        report.seeds.append(scene)
        progress(number + 1, episodes)
    report.success = SuccessRate(sum(report.successes), episodes)
    report.latency = actor.latency.summary()
    if video is not None and frames:
        _write_video(video, frames, env.spec.fps)
        report.video = str(video)
    return report


def _require_video(video: Path, spec: EnvSpec, *, overwrite: bool) -> None:
    """See to it that what is filmed can be written: after the last episode its refusal would cost the report."""
    if video.suffix != ".mp4":
        raise UsageError(f"--video {video}", expected="a file .mp4")
    if not spec.cameras:
        found = f"{spec.name} has no camera to film with: the head looks at no pictures"
        raise UsageError(found, expected="a head that reads features", fix="no --video")
    refuse_file(video, overwrite=overwrite)
    with explaining(video):
        video.parent.mkdir(parents=True, exist_ok=True)


def _side_by_side(observation: Observation) -> Image:
    return np.concatenate([observation.images[camera] for camera in observation.images], axis=1)


def _write_video(path: Path, frames: list[Image], fps: float) -> None:
    height, width = frames[0].shape[:2]
    # Half-resolution colour, because browsers play nothing else.
    file = VideoFile(path, fps=Fraction(fps), height=height, width=width, pixel_format="yuv420p")
    try:
        file.append(frames)
    finally:
        file.close()
