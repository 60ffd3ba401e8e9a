"""Diffusion Policy's ReplayBuffer: a zarr group with `data/*` [N, ...] and `meta/episode_ends` int64 [E].

A folder; a .zarr.zip has to be unpacked first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.base import CacheIndex
from vla.featurize.caches.checks import as_feature, as_vectors, digest_files, feature_spec, require_views
from vla.featurize.caches.zarr_arrays import ZarrArray, arrays_in, open_zarr_array
from vla.featurize.sources.base import Episode, StepSpec
from vla.stores.errors import SourceError, UsageError


class ReplayBufferCache:
    """`features` {ours: array of data/}; `action` and `state` name arrays of data/ (None: the cache has none).

    With `has_views`, axis 1 of every feature is the view axis, and `cameras` names its entries.
    """

    def __init__(
        self,
        path: Path,
        *,
        features: Mapping[str, str] | None = None,
        action: str | None = "action",
        state: str | None = None,
        task: str = "",
        cameras: Sequence[str] = ("camera",),
        has_views: bool = False,
    ) -> None:
        self._root, self._has_views, self._cameras, self._task = path.resolve(), has_views, tuple(cameras), task
        self._features, self._columns = dict(features or {}), {"action": action, "state": state}
        self._arrays: dict[str, ZarrArray] = {}
        self._ends: NDArray[np.int64] = np.zeros(0, np.int64)
        self._index: CacheIndex | None = None

    def settings(self) -> dict[str, Any]:
        """See `Cache.settings`."""
        return {
            "features": self._features,
            **self._columns,
            "task": self._task,
            "cameras": list(self._cameras),
            "has_views": self._has_views,
        }

    def index(self) -> CacheIndex:
        """See `Cache.index`. Every array has as many rows as the last episode ends at, and all its chunks."""
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def digest(self) -> str:
        """See `Cache.digest`: the arrays that are imported, and the ends of the episodes."""
        self.index()
        arrays = [*self._arrays.values(), open_zarr_array(self._root / "meta" / "episode_ends")]
        files = {path.relative_to(self._root).as_posix() for array in arrays for path in array.files()}
        return digest_files(self._root, files)

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """See `Cache.features`."""
        first = self._first(episode)
        made = {}
        for name, spec in self.index().features.items():
            array = self._arrays[name]
            values = array.read(first + start, first + stop)
            made[name] = as_feature(values, spec, self._has_views, str(array.path), first + start)
        return made

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """See `Cache.steps`."""
        first, stop = self._first(episode), int(self._ends[episode])
        return {
            name: as_vectors(self._arrays[name].read(first, stop), str(self._arrays[name].path))
            for name in self.index().steps
        }

    def _first(self, episode: int) -> int:
        return int(self._ends[episode - 1]) if episode else 0

    def _read_index(self) -> CacheIndex:
        data = self._root / "data"
        there = [path.name for path in arrays_in(data)]
        if not self._features:
            raise UsageError(
                f"no features named; {data} holds {', '.join(there) or 'nothing'}",
                expected="the arrays to import",
                fix="--set options.features.NAME=ARRAY",
            )
        columns = {name: array for name, array in self._columns.items() if array is not None}
        for name, array in (self._features | columns).items():
            if array not in there:
                fix = f"--set options.{name}=null where the cache has none" if name in columns else ""
                raise SourceError(f"{data} has no array {array!r}", expected=f"one of {', '.join(there)}", fix=fix)
            self._arrays[name] = open_zarr_array(data / array)
        self._ends = read_ends(self._root / "meta" / "episode_ends")
        rows = int(self._ends[-1])
        for name, opened in self._arrays.items():
            if opened.shape[0] != rows:
                raise SourceError(f"{opened.path} has {opened.shape[0]} rows", expected=f"{rows} as episode_ends says")
            opened.require_whole(at_once=name in columns)
        specs = {}
        for name in self._features:
            opened = self._arrays[name]
            if self._has_views:
                require_views(opened.shape[1:2] or (0,), self._cameras, str(opened.path))
            specs[name] = feature_spec(opened.shape[1:], opened.dtype, self._has_views, name, str(opened.path))
        if not self._has_views:
            require_views([1], self._cameras, str(self._root))
        steps = {}
        for name in columns:
            if len(self._arrays[name].shape) not in (1, 2):
                raise SourceError(f"{self._arrays[name].path} has shape {self._arrays[name].shape}", expected="[N, D]")
            steps[name] = StepSpec(
                self._arrays[name].shape[1:] or (1,), "float32", "action" if name == "action" else "state"
            )
        lengths = np.diff(self._ends, prepend=0)
        episodes = tuple(Episode(f"episode_{i:06d}", int(n), self._task) for i, n in enumerate(lengths))
        return CacheIndex(None, self._cameras, episodes, specs, steps)


def read_ends(path: Path) -> NDArray[np.int64]:
    """Return where each episode ends, int64 [E], increasing. Raises `SourceError` where the array is not that."""
    array = open_zarr_array(path)
    array.require_whole()
    if len(array.shape) != 1 or array.shape[0] < 1 or np.dtype(array.dtype).kind not in "iu":
        raise SourceError(f"{path} is {array.dtype} {array.shape}", expected="integers [E]")
    array.require_whole(at_once=True)
    ends = array.read(0, array.shape[0]).astype(np.int64)
    if (np.diff(ends, prepend=0) < 1).any():
        at = int((np.diff(ends, prepend=0) < 1).argmax())
        raise SourceError(f"{path}: episode {at} ends at {ends[at]}", expected="ends that increase")
    return ends
