"""What a robot or a simulator is to a policy: reset, observe, act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.stores.errors import UsageError


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


class LiveImages(Mapping[str, Image]):
    """Pictures of the present moment, each drawn when it is first looked at.

    Drawing costs ten times a simulator step, and a policy that executes a chunk of actions looks at few frames. A
    picture not looked at before the environment moves on is gone: asking for it then raises `UsageError`.
    """

    def __init__(self, cameras: tuple[str, ...], draw: Callable[[str], Image]) -> None:
        self._cameras, self._draw = cameras, draw
        self._drawn: dict[str, Image] = {}
        self._past = False

    def __getitem__(self, camera: str) -> Image:
        if camera not in self._cameras:
            raise KeyError(camera)
        if camera not in self._drawn:
            if self._past:
                raise UsageError(f"the picture of {camera} is past", expected="a look before the next step")
            self._drawn[camera] = self._draw(camera)
        return self._drawn[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cameras)

    def __len__(self) -> int:
        return len(self._cameras)

    def expire(self) -> None:
        """The environment moves on: only pictures already drawn remain."""
        self._past = True


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one control step.

    `images` maps camera to a picture, drawn when first looked at (`LiveImages`); `state` is honest proprioception,
    float32 [S]; `privileged` is simulator truth, float32 [P], which only experts and declared ceilings may read.
    """

    images: Mapping[str, Image]
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
