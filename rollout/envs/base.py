"""What a robot or a simulator is to a policy: reset, observe, act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image


@dataclass(frozen=True)
class EnvSpec:
    """Static facts of an environment. `cameras` are the names that its observations carry, in order."""

    name: str
    task: str
    cameras: tuple[str, ...]
    image_size: int
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    max_steps: int


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one control step.

    `images` maps camera to a picture; `state` is honest proprioception, float32 [S]; `privileged` is simulator truth,
    float32 [P], which only experts and declared ceilings may read.
    """

    images: dict[str, Image]
    state: NDArray[np.float32]
    privileged: NDArray[np.float32]


@dataclass(frozen=True)
class StepResult:
    """The outcome of one control step: the next observation, whether the task has succeeded so far, time over."""

    observation: Observation
    success: bool
    done: bool


class Env(Protocol):
    """One environment. Deterministic in the seed given to `reset` and the actions that follow."""

    spec: EnvSpec

    def reset(self, seed: int) -> Observation:
        """Start an episode whose initial state is a function of `seed` alone."""
        ...

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Apply `action`, float32 [A] in [-1, 1], for one control period (1 / fps seconds)."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...
