"""robomimic's HDF5: `data/demo_N/obs/KEY` [T, ...] and `data/demo_N/actions` [T, D].

Only what lies in the file itself is read (`vla.featurize.hdf5`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.base import CacheIndex
from vla.featurize.caches.checks import (
    SKIP,
    Rows,
    as_feature,
    as_vectors,
    digest_files,
    feature_spec,
    keep_usual_rows,
    natural,
    require_views,
)
from vla.featurize.hdf5 import count_attribute, dataset, find, group, opened, read_rows, read_whole, require_rows
from vla.featurize.robosuite_attributes import control_frequency
from vla.featurize.sources.base import Episode, StepSpec
from vla.stores.errors import SourceError, UsageError

LAYOUT = "data/demo_N/obs, data/demo_N/actions"


class RobomimicCache:
    """`features` {ours: key of obs}; `state`: keys of obs, joined in this order; `task`: the instruction.

    With `has_views`, axis 1 of every feature is the view axis, and `cameras` names its entries.
    """

    def __init__(
        self,
        path: Path,
        *,
        features: Mapping[str, str] | None = None,
        state: Sequence[str] = (),
        task: str = "",
        cameras: Sequence[str] = ("camera",),
        has_views: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self._path, self._features, self._state, self._task = path.resolve(), dict(features or {}), tuple(state), task
        self._cameras, self._has_views, self._skip_bad = tuple(cameras), has_views, skip_bad
        self._index: CacheIndex | None = None

    def settings(self) -> dict[str, Any]:
        """See `Cache.settings`."""
        return {
            "features": self._features,
            "state": list(self._state),
            "task": self._task,
            "cameras": list(self._cameras),
            "has_views": self._has_views,
        }

    def index(self) -> CacheIndex:
        """See `Cache.index`."""
        if self._index is None:
            with opened(self._path) as file:
                self._index = self._read_index(file)
        return self._index

    def digest(self) -> str:
        """See `Cache.digest`."""
        return digest_files(self._path.parent, [self._path.name])

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """See `Cache.features`."""
        index, made = self.index(), {}
        with opened(self._path) as file:
            for name, spec in index.features.items():
                data = dataset(file, f"data/{index.episodes[episode].id}/obs/{self._features[name]}")
                made[name] = as_feature(
                    read_rows(data, start, stop), spec, self._has_views, f"{self._path}:{data.name}", start
                )
        return made

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """See `Cache.steps`."""
        index = self.index()
        demo = f"data/{index.episodes[episode].id}"
        with opened(self._path) as file:
            paths = {"action": [f"{demo}/actions"], "state": [f"{demo}/obs/{key}" for key in self._state]}
            return {
                name: np.concatenate(
                    [as_vectors(read_whole(dataset(file, path)), f"{self._path}:{path}") for path in paths[name]],
                    axis=1,
                )
                for name in index.steps
            }

    def _read_index(self, file: h5py.File) -> CacheIndex:
        demos = sorted(group(file, "data", LAYOUT), key=natural)
        if not self._features:
            raise UsageError(
                f"no features named; {self._path} holds {', '.join(_keys(file, demos)) or 'no observations'}",
                expected="the observations to import",
                fix="--set options.features.NAME=KEY",
            )
        found: dict[str, tuple[int, Rows]] = {}
        skipped: dict[str, str] = {}
        for demo in demos:
            try:
                shapes = self._shapes(file, demo)
                lengths = {shape[0] for shape, _ in shapes.values()}
                if len(lengths) > 1:
                    what = {key: shape for key, (shape, _) in shapes.items()}
                    raise SourceError(f"{self._path}:data/{demo} has shapes {what}", expected="one length", fix=SKIP)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[demo] = str(error)
                continue
            found[demo] = lengths.pop(), {key: (shape[1:], dtype) for key, (shape, dtype) in shapes.items()}
        if not found:
            raise SourceError(f"{self._path} has no sound demonstration", expected="data/demo_N")
        rows = keep_usual_rows(found, lambda demo: f"{self._path}:data/{demo}", skipped, skip_bad=self._skip_bad)
        episodes = tuple(Episode(demo, length, self._task) for demo, (length, _) in found.items())
        fps, steps = control_frequency(file), self._step_specs(rows)
        return CacheIndex(fps, self._cameras, episodes, self._specs(rows), steps, skipped)

    def _shapes(self, file: h5py.File, demo: str) -> Rows:
        """Return {path below the demonstration: (shape, dtype)} of all that is imported."""
        keys = ["actions", *(f"obs/{key}" for key in (*self._features.values(), *self._state))]
        found = {}
        for key in keys:
            data = dataset(file, f"data/{demo}/{key}")
            flat = key == "actions" or key.removeprefix("obs/") in self._state
            shape = (*data.shape, 1) if flat and data.ndim == 1 else tuple(data.shape)
            if len(shape) < 2 or (flat and len(shape) != 2):
                raise SourceError(f"{self._path}:{data.name} has shape {data.shape}", expected="[T, D]", fix=SKIP)
            require_rows(data, len(data) if flat else 1)
            found[key] = shape, data.dtype.name
        stated, rows = count_attribute(find(file, f"data/{demo}"), "num_samples"), found["actions"][0][0]
        if stated not in (None, rows):
            what = f"{self._path}:data/{demo} has {rows} rows"
            raise SourceError(what, expected=f"{stated} as its num_samples says", fix=SKIP)
        return found

    def _specs(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
        specs = {}
        for name, key in self._features.items():
            shape, dtype = shapes[f"obs/{key}"]
            require_views([shape[0] if self._has_views else 1], self._cameras, f"{self._path}, obs/{key}")
            specs[name] = feature_spec(shape, dtype, self._has_views, name, f"{self._path}, obs/{key}")
        return specs

    def _step_specs(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, StepSpec]:
        steps = {"action": StepSpec(shapes["actions"][0], "float32", "action")}
        if self._state:
            size = sum(shapes[f"obs/{key}"][0][0] for key in self._state)
            steps["state"] = StepSpec((size,), "float32", "state")
        return steps


def _keys(file: h5py.File, demos: Sequence[str]) -> list[str]:
    """Return the observations of the first demonstration, for a message."""
    for demo in demos[:1]:
        if type(file["data"].get(demo, getlink=True)) is h5py.HardLink and "obs" in file["data"][demo]:
            return sorted(file["data"][demo]["obs"])
    return []
