"""What a foreign feature cache looks like to the import, whatever its format on disk.

A cache is indexed once (episodes, shapes; no feature is read), then read by ranges of frames. It holds features, and
where its format has them the action and the state of every frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from vla.featurize.backbones.base import FeatureSpec
from vla.featurize.sources.base import Episode, StepSpec


@dataclass(frozen=True)
class CacheIndex:
    """Everything about a cache that is known without reading features.

    `features` exclude frames and views; `cameras` name the V views. `steps` is empty where the format holds no action;
    `fps` is None where it does not say. `skipped` maps episodes left out under `skip_bad` to the reason.
    """

    fps: float | None
    cameras: tuple[str, ...]
    episodes: tuple[Episode, ...]
    features: Mapping[str, FeatureSpec]
    steps: Mapping[str, StepSpec]
    skipped: Mapping[str, str] = field(default_factory=dict)


class Cache(Protocol):
    """A feature cache on disk. Methods keep no file open between calls."""

    def index(self) -> CacheIndex:
        """Read the layout. Raises `SourceError` naming the file that does not conform."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) over the sorted relative paths, sizes and contents of the files that were indexed."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the options, JSON-able: all that the result depends on beside the files."""
        ...

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Return `{name: [stop - start, V, *shape]}` of an episode, by position in `index().episodes`.

        Raises `SourceError` naming the file where it is damaged, mis-sized or not finite.
        """
        ...

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """Return `{name: [T, *shape]}` of one episode, finite. Raises `SourceError` naming the file."""
        ...
