"""robomimic's HDF5 with pictures: `data/demo_N/actions` [T, A], `data/demo_N/obs/KEY` [T, ...], `mask/FILTER`.

Pictures are observations uint8 [T, H, W, 3] called `NAME_image` (LIBERO: `NAME_rgb`). robomimic turns MuJoCo's
pictures upright before it stores them (`get_observation` of its `envs/env_robosuite.py`); LIBERO, which stores what
robosuite gives, does not: `flip` turns those.

Layout: https://robomimic.github.io/docs/datasets/overview.html. Links out of the file are refused (`featurize.hdf5`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.checks import as_vectors, digest_files, natural
from vla.featurize.hdf5 import (
    SKIP,
    arrays,
    count_attribute,
    dataset,
    find,
    group,
    opened,
    read_rows,
    read_whole,
    require_rows,
)
from vla.featurize.image import Image
from vla.featurize.robosuite_attributes import control_frequency, instruction
from vla.featurize.sources.base import Episode, NoEpisodeError, Role, SourceIndex, StepSpec, no_pictures
from vla.featurize.sources.usual_shape import keep_usual
from vla.stores.errors import SourceError, UsageError
from vla.stores.manifest import Rate
from vla.stores.settings import nearest

HONEST = ("eef_pos", "eef_quat", "gripper_qpos")
"""What robomimic's own configurations take as proprioception, of `robot0_`, `robot1_`, …"""

PRIVILEGED = "object"
"""robomimic's observation of where the objects are: simulator truth."""

LAYOUT = "data/demo_N/obs and data/demo_N/actions"
ROLES: dict[str, Role] = {"action": "action", "state": "state", "privileged": "privileged"}
PICTURE_ENDS = ("_image", "_rgb")
BLOCK = 32
"""Frames read at once: one camera of 84 x 84 then takes 0.7 MB."""


@dataclass(frozen=True)
class _Indexed:
    """`cameras` {our name: key of obs}; `columns` {our name: paths below the demonstration, joined in this order}."""

    index: SourceIndex
    cameras: dict[str, str]
    columns: dict[str, tuple[str, ...]]


class RobomimicSource:
    """A robomimic file as a `Source`.

    `cameras`: keys of obs, with or without `_image` (None: every picture, []: none). `state`: keys of obs, joined in
    this order (None: end-effector position, quaternion and gripper of each robot). `filter`: only the demonstrations
    that `mask/FILTER` lists, such as "train". `task`: the instruction (None: what the file or its environment says).
    `fps` (None: the environment's control frequency). `flip`: pictures are stored upside down. `skip_bad` leaves
    demonstrations out that do not hold, and names them. Steps are `action`, `state` and `privileged` float32 [D].
    """

    def __init__(
        self,
        path: Path | str,
        *,
        cameras: Sequence[str] | None = None,
        state: Sequence[str] | None = None,
        filter: str | None = None,
        task: str | None = None,
        fps: Rate | None = None,
        flip: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self._path, self._cameras, self._state, self._filter = Path(path), cameras, state, filter
        self._task, self._fps, self._flip, self._skip_bad = task, fps, flip, skip_bad
        self._lock = threading.Lock()
        self._indexed: _Indexed | None = None
        self._digest: str | None = None

    def index(self) -> SourceIndex:
        """See `Source.index`. Every number of actions and states is checked; no picture is looked at."""
        return self._index().index

    def digest(self) -> str:
        """See `Source.digest`."""
        with self._lock:
            if self._digest is None:
                self._digest = digest_files(self._path.resolve().parent, [self._path.resolve().name])
            return self._digest

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        indexed = self._index()
        with opened(self._path) as file:
            return self._steps(file, indexed.index.episodes[episode].id, indexed.columns)

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`."""
        indexed = self._index()
        chosen = indexed.index.episodes[episode]
        if not 0 <= start <= stop <= chosen.length:
            raise SourceError(
                f"frames {start} to {stop} of {chosen.id} in {self._path}", expected=f"0 to {chosen.length}"
            )
        if not indexed.cameras:
            raise no_pictures(f"{chosen.id} in {self._path}")
        return self._frames(indexed, chosen.id, start, stop)

    def _frames(self, indexed: _Indexed, demo: str, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            with opened(self._path) as file:
                views = [
                    read_rows(dataset(file, f"data/{demo}/obs/{key}"), first, last) for key in indexed.cameras.values()
                ]
            if self._flip:
                views = [view[:, ::-1] for view in views]
            for frame in range(last - first):
                yield tuple(np.ascontiguousarray(view[frame]) for view in views)

    def _index(self) -> _Indexed:
        with self._lock:
            if self._indexed is None:
                with opened(self._path) as file:
                    self._indexed = self._read_index(file)
            return self._indexed

    def _read_index(self, file: h5py.File) -> _Indexed:
        demos = self._demos(file)
        observed = self._observations(file, demos)
        cameras = self._choose_cameras(observed)
        columns = self._choose_columns(observed)
        task = self._task if self._task is not None else instruction(file)
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        skipped: dict[str, str] = {}
        for demo in demos:
            try:
                found[demo] = self._check(file, demo, cameras, columns)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[demo] = str(error)
        if not found:
            raise NoEpisodeError(f"every demonstration of {self._path} is bad", skipped)

        def differs(demo: str, model: str) -> SourceError:
            others = {name: shape[1:] for name, shape in found[demo].items() if shape[1:] != found[model][name][1:]}
            usual = {name: found[model][name][1:] for name in others}
            what = f"{self._path}:data/{demo} has rows of shape {others}"
            return SourceError(what, expected=f"{usual} as most have, such as {model}", fix=SKIP)

        whole = self._filter is None and not skipped
        warnings = self._disagreements(file, {demo: shapes["action"][0] for demo, shapes in found.items()}, whole)
        model = keep_usual(found, _row_shapes, differs, skipped, skip_bad=self._skip_bad)
        widths = {name: found[model][name][1] for name in columns}
        names = {ours: "+".join(paths) for ours, paths in columns.items()}
        names |= ({"flip": "true"} if self._flip else {}) | ({"filter": self._filter} if self._filter else {})
        index = SourceIndex(
            kind="robomimic",
            root=str(self._path),
            fps=self._frequency(file),
            cameras=tuple(cameras),
            episodes=tuple(Episode(demo, shapes["action"][0], task) for demo, shapes in found.items()),
            steps={name: StepSpec((width,), "float32", ROLES[name]) for name, width in widths.items()},
            mapping=names,
            skipped=skipped,
            warnings=warnings,
            pictures=bool(cameras),
        )
        return _Indexed(index, cameras, columns)

    def _demos(self, file: h5py.File) -> list[str]:
        there = sorted(group(file, "data", LAYOUT), key=natural)
        if not there:
            raise SourceError(f"{self._path} has no demonstration", expected=LAYOUT)
        if self._filter is None:
            return there
        masks = sorted(group(file, "mask", "mask/FILTER beside data")) if "mask" in file else []
        if self._filter not in masks:
            hint = nearest(self._filter, masks)
            known = f"one of {', '.join(masks)}" if masks else "no filter: the file has none"
            raise UsageError(f"{self._path} has no filter {self._filter!r}{hint}", expected=known)
        listed = read_whole(dataset(file, f"mask/{self._filter}", "SO"))
        kept = sorted((name.decode() if isinstance(name, bytes) else str(name) for name in listed.ravel()), key=natural)
        lost = [name for name in kept if name not in there]
        if len(set(kept)) < len(kept):
            twice = next(name for name in kept if kept.count(name) > 1)
            raise SourceError(f"{self._path}:mask/{self._filter} lists {twice} twice", expected="each name once")
        if lost or not kept:
            raise SourceError(
                f"{self._path}:mask/{self._filter} lists {', '.join(lost[:3]) or 'nothing'}", expected="names of data/"
            )
        return kept

    def _observations(self, file: h5py.File, demos: Sequence[str]) -> dict[str, h5py.Dataset]:
        """Return {key: data set} of a demonstration whose observations are like most others'."""
        seen = {demo: there for demo in demos if (there := _observed(file, demo))}
        if seen:
            usual = Counter(seen.values()).most_common(1)[0][0]
            demo = next(demo for demo, there in seen.items() if there == usual)
            observed = arrays(file, f"data/{demo}/obs")
            return {key: observed[key] for key, *_ in usual}
        raise SourceError(
            f"{self._path} has no observations",
            expected=f"{LAYOUT}, with pictures",
            fix=f"vla record robosuite --task {self._path} --out DIR, which draws the simulator's states",
        )

    def _choose_cameras(self, observed: dict[str, h5py.Dataset]) -> dict[str, str]:
        """Return {our name: key of obs}. Raises `UsageError` naming the pictures that are there."""
        pictures = [key for key, data in observed.items() if _is_picture(data)]
        chosen = {}
        for name in pictures if self._cameras is None else self._cameras:
            key = next((key for key in (name, *(name + end for end in PICTURE_ENDS)) if key in pictures), None)
            if key is None:
                known = f"one of {', '.join(pictures)}" if pictures else "pictures uint8 [T, H, W, 3] in obs"
                raise UsageError(f"{self._path} has no pictures {name!r}{nearest(name, pictures)}", expected=known)
            chosen[_camera_name(key)] = key
        if not chosen and self._cameras is None:
            raise SourceError(
                f"{self._path} has no pictures, only {', '.join(observed)}",
                expected="uint8 [T, H, W, 3] in obs",
                fix=f"vla record robosuite --task {self._path} --out DIR, which draws the simulator's states",
            )
        return chosen

    def _choose_columns(self, observed: dict[str, h5py.Dataset]) -> dict[str, tuple[str, ...]]:
        """Return {our name: paths below the demonstration}."""
        numbers = [key for key, data in observed.items() if data.ndim in (1, 2)]
        if self._state is None:
            robots = sorted({key.partition("_")[0] for key in numbers if key.startswith("robot")}, key=natural)
            state = [key for robot in robots for end in HONEST if (key := f"{robot}_{end}") in numbers]
        else:
            state = list(self._state)
        for key in state:
            if key not in numbers:
                hint = nearest(key, numbers)
                raise UsageError(
                    f"{self._path} has no numbers obs/{key}{hint}", expected=f"one of {', '.join(numbers)}"
                )
        columns: dict[str, tuple[str, ...]] = {"action": ("actions",)}
        columns |= {"state": tuple(f"obs/{key}" for key in state)} if state else {}
        return columns | ({"privileged": (f"obs/{PRIVILEGED}",)} if PRIVILEGED in numbers else {})

    def _check(
        self, file: h5py.File, demo: str, cameras: dict[str, str], columns: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Return {column or obs/KEY of a camera: shape} of a demonstration whose numbers and lengths hold."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, values in self._steps(file, demo, columns).items():
            shapes[name] = values.shape
        for key in cameras.values():
            data = dataset(file, f"data/{demo}/obs/{key}")
            if not _is_picture(data):
                found = f"{data.dtype} {data.shape}"
                raise SourceError(f"{self._path}:{data.name} is {found}", expected="uint8 [T, H, W, 3]", fix=SKIP)
            if data.id.get_storage_size() == 0:
                raise SourceError(f"{self._path}:{data.name} was never written", expected="pictures", fix=SKIP)
            require_rows(data, BLOCK)
            shapes[f"obs/{key}"] = data.shape
        if len({shape[0] for shape in shapes.values()}) > 1 or shapes["action"][0] < 1:
            raise SourceError(f"{self._path}:data/{demo} has shapes {shapes}", expected="one length", fix=SKIP)
        stated, rows = count_attribute(find(file, f"data/{demo}"), "num_samples"), shapes["action"][0]
        if stated not in (None, rows):
            found = f"{self._path}:data/{demo} has {rows} rows"
            raise SourceError(found, expected=f"{stated} as its num_samples says", fix=SKIP)
        return shapes

    def _disagreements(self, file: h5py.File, lengths: Mapping[str, int], whole: bool) -> tuple[str, ...]:
        """Return what the file says of its demonstrations, {name: rows}, and does not hold.

        A wrong `total` is raised unless `skip_bad`; arrays that nobody reads only get a warning.
        """
        beside = [
            f"{self._path}:{above}/{name} has {len(data)} rows, its actions {rows}"
            for demo, rows in lengths.items()
            for above in (f"data/{demo}", f"data/{demo}/obs")
            for name, data in arrays(file, above).items()
            if len(data) != rows
        ]
        stated, rows = count_attribute(find(file, "data"), "total"), sum(lengths.values())
        if not whole or stated in (None, rows):
            return tuple(beside)
        found = f"{self._path}:data says total = {stated}, its demonstrations have {rows} rows"
        if not self._skip_bad:
            fix = "--skip-bad, which reads the file all the same"
            raise SourceError(found, expected="records that agree", fix=fix)
        return (found, *beside)

    def _steps(self, file: h5py.File, demo: str, columns: dict[str, tuple[str, ...]]) -> dict[str, NDArray[np.generic]]:
        """Read the numbers of a demonstration, {our name: float32 [T, D]}, finite."""
        steps: dict[str, NDArray[np.generic]] = {}
        for ours, paths in columns.items():
            parts = []
            for path in paths:
                data = dataset(file, f"data/{demo}/{path}")
                parts.append(as_vectors(read_whole(data), f"{self._path}:{data.name}"))
            if len({len(part) for part in parts}) > 1:
                lengths = dict(zip(paths, map(len, parts), strict=True))
                raise SourceError(f"{self._path}:data/{demo} has lengths {lengths}", expected="one length", fix=SKIP)
            steps[ours] = np.concatenate(parts, axis=1)
        return steps

    def _frequency(self, file: h5py.File) -> float:
        fps = self._fps if self._fps is not None else control_frequency(file)
        if fps is None:
            raise SourceError(
                f"{self._path} does not say its control frequency", expected="Hz", fix="--set source_options.fps=20"
            )
        return fps


def _observed(file: h5py.File, demo: str) -> tuple[tuple[str, int, str], ...]:
    """Return (key, axes, dtype) of each array among a demonstration's observations.

    Nothing where there are none; `RobomimicSource._check` then says what is wrong with the demonstration.
    """
    try:
        found = arrays(file, f"data/{demo}/obs")
    except SourceError:
        return ()
    return tuple((key, data.ndim, data.dtype.str) for key, data in found.items())


def _row_shapes(shapes: dict[str, tuple[int, ...]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, shape[1:]) for name, shape in shapes.items())


def _is_picture(data: h5py.Dataset) -> bool:
    return bool(data.dtype == np.uint8 and data.ndim == 4 and data.shape[3] == 3 and min(data.shape[1:]) > 0)


def _camera_name(key: str) -> str:
    return next((key.removesuffix(end) for end in PICTURE_ENDS if key.endswith(end)), key)
