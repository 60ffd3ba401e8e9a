"""What raw demonstrations look like to the pipeline, whatever their format on disk.

A source is indexed once (episodes, cameras, steps; cheap, no pixels), then read frame by frame. Frames and
steps of one episode correspond index by index: frame i was seen when step i's action was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.stores.errors import SourceError

NUMBERS = "leave source_options.cameras=[] out"
"""How a source that was opened for its numbers alone shows its pictures again."""

Role = Literal["action", "state", "privileged", "other"]


@dataclass(frozen=True)
class StepSpec:
    """One column of per-frame numbers, such as the action.

    `shape` excludes the frame axis. `role` says what heads may do with it: `action` is the label, `state` is honest
    proprioception, `privileged` is simulator truth that a real robot would not have and is never a default input.
    `names` label the components of a vector.
    """

    shape: tuple[int, ...]
    dtype: str
    role: Role
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Episode:
    """One demonstration. `id` is a stable key (never a position), `length` its frames, `task` its instruction.

    `texts` is what else is said of it, by name, such as the high-level task of which `task` is one part.
    """

    id: str
    length: int
    task: str
    texts: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class SourceIndex:
    """Everything about a source that is known without decoding pixels.

    `steps` always has exactly one column of role `action`, named `action`; at most one of role `state`, named `state`.
    `sizes` is (height, width) of each camera's pictures, of those cameras whose metadata say it.
    `skipped` maps episode ids left out under `--skip-bad` to the reason; `filtered` names those of them that an option
    leaves out on purpose. `warnings` are lines on what else was left out, or contradicts itself without being read.
    `mapping` is the resolved column mapping ({ours: theirs}); it enters the fingerprint. `extras` names what `views`
    gives beside the image; a source without any needs no such method (see `ViewSource`).
    `assumed` {option: value and why}: what neither a file states nor the user gives.
    `pictures` is false where there are only extras or numbers. `stores` are the folders or URLs of stores that are
    read.
    """

    kind: str
    root: str
    fps: float
    cameras: tuple[str, ...]
    episodes: tuple[Episode, ...]
    steps: Mapping[str, StepSpec]
    licence: str = "unknown"
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mapping: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    pictures: bool = True
    stores: tuple[str, ...] = ()
    filtered: frozenset[str] = frozenset()
    assumed: Mapping[str, str] = field(default_factory=dict)


def no_pictures(where: str) -> SourceError:
    """Return the error of a source without cameras that is asked for frames."""
    return SourceError(f"{where} was opened without cameras", expected="a backbone without pictures", fix=NUMBERS)


class NoEpisodeError(SourceError):
    """No episode of a source is left. `skipped` {episode: reason} holds all of them."""

    def __init__(self, found: str, skipped: Mapping[str, str]) -> None:
        self.skipped = dict(skipped)
        super().__init__(f"{found}; the first: {next(iter(skipped.values()), 'it holds no episode')}")


class Source(Protocol):
    """Raw demonstrations. Methods may be called from several threads at once; they share no decoder state."""

    def index(self) -> SourceIndex:
        """Read the metadata once and keep it. Raises `SourceError` naming file and fix where it does not conform."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) over the sorted relative paths, sizes and contents of the files that were indexed."""
        ...

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """Return `{name: [T, *shape]}` of one episode, by position in `index().episodes`.

        Raises `SourceError` on NaN or infinite values in `action` or `state`, naming file, column and row.
        """
        ...

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """Yield frames `start..stop-1` of an episode, each a tuple of V images in the order of `index().cameras`.

        Raises `SourceError` where a frame is missing or cannot be decoded, naming file, camera and frame.
        """
        ...


@dataclass(frozen=True)
class ExtrasRecord:
    """What extras depend on beyond the source's own digest: features of a store do, depth in the source's files not.

    `identity` {name: …} enters the fingerprint as `backbone.inputs`; `recipes` {name: {"backbone", "scales"}} is how a
    live policy makes them from pictures; `random_weights` whether any was made with such.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Any] = field(default_factory=dict)
    random_weights: bool = False


@runtime_checkable
class ViewSource(Source, Protocol):
    """A source that knows more of a frame than its pictures: depth, camera poses, features that were cached."""

    def views(
        self, episode: int, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        """Yield frames `start..stop-1`, each a tuple of V mappings with `names`, of "image" and `index().extras`.

        "depth" is float32 [H, W] in metres, 0 where unknown; "intrinsics" float32 [3, 3] in pixels of the image;
        "pose" float32 [4, 4], camera to world, OpenCV axes (x right, y down, z forward). Raises as `frames` does.
        """
        ...

    def describe(self, names: Sequence[str]) -> ExtrasRecord:
        """Tell what some extras depend on. Raises `UsageError` for a name that is no extra."""
        ...
