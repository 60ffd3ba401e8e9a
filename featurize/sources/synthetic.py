"""Seeded demonstrations made up in memory, for tests: a coloured blob whose place is what the action should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, SourceIndex, StepSpec
from vla.stores.errors import SourceError
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings


class SyntheticSettings(Settings):
    """What is made up. `length` is the range of frames an episode, both ends included."""

    episodes: int = Field(6, ge=1, le=1_000_000)
    length: tuple[int, int] = (8, 20)
    cameras: int = Field(2, ge=1, le=16)
    image_size: int = Field(32, ge=8, le=4096)
    action_dim: int = Field(4, ge=2, le=64)
    state_dim: int = Field(4, ge=1, le=64)
    fps: float = Field(20.0, gt=0)
    seed: int = Field(0, ge=0)


class SyntheticSource:
    """A blob wanders; the action's first two numbers are its place in [-1, 1], the others 0; the state is noise."""

    def __init__(
        self, settings: SyntheticSettings, *, map: Mapping[str, str] | None = None, skip_bad: bool = False
    ) -> None:
        if map:
            raise SourceError("the synthetic source has nothing to map", expected="no --map")
        del skip_bad  # nothing here is ever bad
        self.settings = settings
        generator = np.random.default_rng(settings.seed)
        low, high = settings.length
        self._lengths = generator.integers(low, high + 1, settings.episodes)

    def index(self) -> SourceIndex:
        """See `Source.index`."""
        s = self.settings
        return SourceIndex(
            kind="synthetic",
            root="synthetic",
            fps=s.fps,
            cameras=tuple(f"camera{view}" for view in range(s.cameras)),
            episodes=tuple(Episode(f"episode_{i:06d}", int(n), "follow the blob") for i, n in enumerate(self._lengths)),
            steps={
                "action": StepSpec((s.action_dim,), "float32", "action"),
                "state": StepSpec((s.state_dim,), "float32", "state"),
            },
            licence="CC0-1.0",
        )

    def digest(self) -> str:
        """SHA-256 of the settings: they are all that the data depend on."""
        return digest(self.settings.model_dump(mode="json"))

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        s = self.settings
        place = self._place(episode)
        action = np.zeros((len(place), s.action_dim), np.float32)
        action[:, :2] = place
        state = np.random.default_rng([s.seed, episode, 1]).normal(size=(len(place), s.state_dim))
        return {"action": action, "state": state.astype(np.float32)}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`."""
        size = self.settings.image_size
        axis = np.linspace(-1, 1, size)
        for x, y in self._place(episode)[start:stop]:
            blob = np.exp(-((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / 0.05)
            views = []
            for view in range(self.settings.cameras):
                image = np.full((size, size, 3), 20 * view, np.float64)
                image[:, :, view % 3] += 200 * blob
                views.append(image.clip(0, 255).astype(np.uint8))
            yield tuple(views)

    def _place(self, episode: int) -> NDArray[np.float64]:
        """Return the blob's path [T, 2] in [-0.9, 0.9]."""
        generator = np.random.default_rng([self.settings.seed, episode])
        steps = generator.normal(0, 0.15, (int(self._lengths[episode]), 2)).cumsum(axis=0)
        start = generator.uniform(-0.6, 0.6, 2)
        place: NDArray[np.float64] = (start + steps).clip(-0.9, 0.9)
        return place
