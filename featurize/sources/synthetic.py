"""Seeded demonstrations made up in memory, for tests: coloured blobs whose places are what the action should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, ExtrasRecord, SourceIndex, StepSpec
from vla.featurize.sources.synthetic_scene import ball_centres, camera_poses, depth, intrinsics
from vla.stores.errors import SourceError, UsageError
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings

VERSION = 1
"""Part of the digest: raise it whenever the same settings would give other pixels or numbers."""

COLOURS = {"red": (255, 64, 64), "green": (64, 255, 64), "blue": (64, 64, 255)}
FPS = 10.0
GEOMETRY = ("depth", "intrinsics", "pose")
MAX_EPISODE_NUMBERS = 20_000_000
"""Of one column of an episode, which is made as a whole: 160 MB."""
MAX_FRAMES = 100_000_000
"""Of all episodes: 115 days at 10 fps."""
MAX_FRAME_PIXELS = 4096**2
"""Of all cameras of one frame, which is drawn in float64: 0.8 GB."""
REACH = 0.8
"""Blobs stay within this distance of the centre, in units of half a picture."""


class SyntheticSettings(Settings):
    """What is made up. `length` is the range of frames an episode, both ends included. `depth`: whether there is a
    scene in three dimensions behind the pictures, see synthetic_scene.py."""

    episodes: int = Field(6, ge=1, le=1_000_000)
    length: tuple[int, int] = (8, 20)
    cameras: int = Field(2, ge=1, le=16)
    image_size: int = Field(32, ge=8, le=4096)
    action_dim: int = Field(4, ge=1, le=256)
    state_dim: int = Field(4, ge=1, le=256)
    seed: int = Field(0, ge=0)
    depth: bool = False

    @model_validator(mode="after")
    def _lengths_in_order(self) -> SyntheticSettings:
        if not 1 <= self.length[0] <= self.length[1]:
            raise ValueError("length is the least and the greatest number of frames, from 1 on")
        columns = max(self.action_dim, self.state_dim, 3 * self.cameras)
        if self.length[1] * columns > MAX_EPISODE_NUMBERS or self.length[1] * self.episodes > MAX_FRAMES:
            raise ValueError(
                f"length {list(self.length)} exceeds {MAX_EPISODE_NUMBERS // columns} frames an episode, or "
                f"{MAX_FRAMES // self.episodes} for {self.episodes} episodes"
            )
        if self.cameras * self.image_size**2 > MAX_FRAME_PIXELS:
            raise ValueError(
                f"image_size {self.image_size} exceeds {MAX_FRAME_PIXELS} pixels over {self.cameras} cameras"
            )
        return self


class SyntheticSource:
    """One blob a camera, wandering smoothly; the action is where the blobs are.

    Camera v shows its blob at (x_v, y_v) in [-1, 1], right and down positive. With p = (x_0, y_0, x_1, y_1, …) of
    length 2V, action k is p[k % 2V], its sign turned every further round: the pictures of one step determine its
    action exactly. The state is a hand that goes a tenth of its way to the blobs each step, laid out likewise: it
    hints at the action without giving it. The task names the blobs' colour.

    With `depth` the same pictures come with "depth", "intrinsics" and "pose" of every view, and the privileged step
    tells where the balls are that the blobs show: x, y, z of each in metres [3V].
    """

    def __init__(
        self,
        *,
        episodes: int = 6,
        length: tuple[int, int] = (8, 20),
        cameras: int = 2,
        image_size: int = 32,
        action_dim: int = 4,
        state_dim: int = 4,
        seed: int = 0,
        depth: bool = False,
    ) -> None:
        values = {
            "episodes": episodes,
            "length": length,
            "cameras": cameras,
            "image_size": image_size,
            "action_dim": action_dim,
            "state_dim": state_dim,
            "seed": seed,
            "depth": depth,
        }
        self.settings = SyntheticSettings.build(values, where="the synthetic source")
        low, high = self.settings.length
        self._lengths = np.random.default_rng(self.settings.seed).integers(low, high + 1, self.settings.episodes)

    def index(self) -> SourceIndex:
        """See `Source.index`."""
        s = self.settings
        tasks = [f"reach the {colour} blob" for colour in COLOURS]
        balls = tuple(f"{axis}{view}" for view in range(s.cameras) for axis in "xyz")
        return SourceIndex(
            kind="synthetic",
            root="synthetic",
            fps=FPS,
            cameras=tuple(f"camera{view}" for view in range(s.cameras)),
            episodes=tuple(
                Episode(f"episode_{i:06d}", int(n), tasks[i % len(tasks)]) for i, n in enumerate(self._lengths)
            ),
            steps={
                "action": StepSpec((s.action_dim,), "float32", "action", _names(s.action_dim, s.cameras)),
                "state": StepSpec((s.state_dim,), "float32", "state"),
                "timestamp": StepSpec((), "float64", "other"),
                "frame_index": StepSpec((), "int64", "other"),
                **({"privileged": StepSpec((len(balls),), "float32", "privileged", balls)} if s.depth else {}),
            },
            licence="CC0-1.0",
            extras=GEOMETRY if s.depth else (),
            sizes={f"camera{view}": (s.image_size, s.image_size) for view in range(s.cameras)},
        )

    def digest(self) -> str:
        """SHA-256 (hex) of the settings and the version: they are all that the data depend on."""
        values = self.settings.model_dump(mode="json", exclude=set() if self.settings.depth else {"depth"})
        return digest({"version": VERSION, **values})

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        places, hands = self._paths(episode)
        frames = np.arange(len(places))
        return {
            "action": _spread(places, self.settings.action_dim),
            "state": _spread(hands, self.settings.state_dim),
            "timestamp": frames / FPS,
            "frame_index": frames.astype(np.int64),
            **({"privileged": self._balls(places, frames).reshape(len(frames), -1)} if self.settings.depth else {}),
        }

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`."""
        length = int(self._lengths[episode])
        if not 0 <= start <= stop <= length:
            raise SourceError(f"frames {start} to {stop} of synthetic episode {episode}", expected=f"0 to {length}")
        return self._draw(episode, start, stop)

    def views(
        self, episode: int, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        """See `ViewSource.views`."""
        self.describe([name for name in names if name != "image"])
        return self._see(names, self.frames(episode, start, stop), self._paths(episode)[0], start)

    def describe(self, names: Sequence[str]) -> ExtrasRecord:
        """See `ViewSource.describe`: the digest covers all of them."""
        extras = self.index().extras
        unknown = [name for name in names if name not in extras]
        if unknown:
            fix = "" if extras else "--source synthetic:depth=true"
            has = ", ".join(("image", *extras))
            raise UsageError(f"the synthetic source has no {', '.join(unknown)}", expected=f"of {has}", fix=fix)
        return ExtrasRecord()

    def _see(
        self, names: tuple[str, ...], frames: Iterator[tuple[Image, ...]], places: NDArray[np.float64], start: int
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        size, steps = self.settings.image_size, np.arange(len(places))
        poses, balls = camera_poses(steps, self.settings.cameras), self._balls(places, steps)
        for frame, images in enumerate(frames, start):
            views = []
            for image, pose, ball in zip(images, poses[frame], balls[frame], strict=True):
                known = {"image": image, "intrinsics": intrinsics(size), "pose": pose.astype(np.float32)}
                if "depth" in names:
                    known["depth"] = depth(ball, pose, size)
                views.append({name: known[name] for name in names})
            yield tuple(views)

    def _balls(self, places: NDArray[np.float64], frames: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the centres of the balls [T, V, 3] in metres, as the steps hold them."""
        V = self.settings.cameras
        return ball_centres(places.reshape(-1, V, 2), camera_poses(frames, V)).astype(np.float32)

    def _draw(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        size = self.settings.image_size
        axis = (np.arange(size) + 0.5) / size * 2 - 1  # centres of pixels, in [-1, 1]
        colour = np.array(list(COLOURS.values())[episode % len(COLOURS)], np.float64)
        dim = np.random.default_rng([self.settings.seed, episode, 1]).uniform(0, 60, (self.settings.cameras, 1, 1, 3))
        for place in self._paths(episode)[0][start:stop]:
            x, y = place.reshape(-1, 2, 1, 1).swapaxes(0, 1)
            # A radius of an eighth of the picture: several pixels wide even at 16 px, so a coarse grid still sees it.
            glow = np.exp(-((axis[None, None, :] - x) ** 2 + (axis[None, :, None] - y) ** 2) / (2 * 0.25**2))
            pictures = dim + (colour - dim) * glow[..., None]
            yield tuple(np.round(pictures).astype(np.uint8))

    def _paths(self, episode: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the blobs' places and the hands', both [T, 2V] in [-1, 1]."""
        generator = np.random.default_rng([self.settings.seed, episode])
        coordinates = 2 * self.settings.cameras
        # 0.15 to 0.45 rad a step: a lap takes 14 to 42 frames, so an episode shows some but not all of it.
        speed, phase = generator.uniform(0.15, 0.45, coordinates), generator.uniform(0, 2 * np.pi, coordinates)
        frames = np.arange(int(self._lengths[episode]))[:, None]
        places: NDArray[np.float64] = REACH * np.sin(speed * frames + phase)
        hands = np.empty_like(places)
        hands[0] = generator.uniform(-REACH, REACH, coordinates)
        for t in range(1, len(hands)):
            hands[t] = hands[t - 1] + 0.1 * (places[t - 1] - hands[t - 1])
        return places, hands


def _spread(values: NDArray[np.float64], width: int) -> NDArray[np.float32]:
    """Lay coordinates [T, 2V] out over [T, width], the sign turned every further round."""
    rounds, which = np.divmod(np.arange(width), values.shape[1])
    return (values[:, which] * (-1.0) ** rounds).astype(np.float32)


def _names(width: int, cameras: int) -> tuple[str, ...]:
    rounds, which = np.divmod(np.arange(width), 2 * cameras)
    signs = np.where(rounds % 2, "-", "")
    return tuple(f"{sign}{'xy'[k % 2]}{k // 2}" for sign, k in zip(signs, which, strict=True))
