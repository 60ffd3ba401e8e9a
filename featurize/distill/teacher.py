"""A teacher's embeddings on disk: one vector a step, of a store, of zarr arrays, or of .npy files.

    a store                                feature [V, E], or [1, E] for all views
    [TASK/]EPISODE.zarr/per_frame_features zarr [T, E]
    [TASK/]EPISODE.npy                     [T, E]
    [TASK/]EPISODE/FRAME.npy               [E]; FRAME ends in the number of the frame, counted from 0

Nothing is unpickled: .npy files of objects and zarr arrays of objects are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.arrays import map_npy
from vla.featurize.caches.checks import digest_files, natural, require_finite
from vla.featurize.caches.zarr_arrays import open_zarr_array
from vla.featurize.sources.registry import recognise
from vla.stores.dtypes import decode
from vla.stores.errors import SourceError, UsageError
from vla.stores.fingerprint import digest
from vla.stores.join import join_stores
from vla.stores.store import open_store

ARRAY = "per_frame_features"


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of one episode: `frames` int64 [n], distinct; `values` float32 [n, V or 1, E], finite."""

    frames: NDArray[np.int64]
    values: NDArray[np.float32]


class Teacher(Protocol):
    """Embeddings by episode."""

    kind: str
    random_weights: bool

    def episodes(self) -> Sequence[str]:
        """Return the ids, as they are written there."""
        ...

    def load(self, episode: str) -> Embeddings:
        """Read one episode. Raises `SourceError` naming the file that cannot be used."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) of everything that the embeddings depend on."""
        ...


def open_teacher(path: Path | str, feature: str | None = None) -> Teacher:
    """Open the embeddings at `path`; `feature` names one of a store that has several.

    Raises `SourceError` where there is nothing of a known layout.
    """
    path = Path(path)
    if recognise(path) == "store":
        return StoreTeacher(path, feature)
    if feature is not None:
        raise UsageError(f"{path} is no store, and data.teacher_feature is {feature!r}", expected="a store")
    if not path.is_dir():
        raise SourceError(f"{path} is no folder", expected="a store, EPISODE.zarr, EPISODE.npy or EPISODE/FRAME.npy")
    arrays, files = sorted(path.glob(f"**/*.zarr/{ARRAY}")), sorted(path.rglob("*.npy"))
    if bool(arrays) == bool(files):
        found = f"both {ARRAY} and .npy files" if arrays else f"neither {ARRAY} nor .npy files"
        raise SourceError(f"{path} holds {found}", expected="a store, EPISODE.zarr, EPISODE.npy or EPISODE/FRAME.npy")
    return ZarrTeacher(path, arrays) if arrays else NpyTeacher(path, files)


class StoreTeacher:
    """One feature of a store of ours, made by `vla featurize` or `vla import`."""

    kind = "store"

    def __init__(self, path: Path, feature: str | None) -> None:
        self._stores = join_stores([open_store(path)])
        names = list(self._stores.owner)
        if feature is None and len(names) > 1:
            raise UsageError(f"{path} holds {', '.join(names)}", fix="--set data.teacher_feature=NAME")
        self._feature = feature or names[0]
        info = self._stores.feature_info(self._feature)
        if len(info.shape) != 2:
            raise UsageError(f"{path}: {self._feature!r} is {info.shape} a step", expected="one vector a view")
        self._manifest = self._stores.first.manifest
        self.random_weights = self._manifest.random_weights

    def episodes(self) -> Sequence[str]:
        """See `Teacher.episodes`: those that were not left out."""
        ids = self._stores.first.episodes.ids
        return [ids[at] for at in np.flatnonzero(self._stores.usable)]

    def load(self, episode: str) -> Embeddings:
        """See `Teacher.load`."""
        table = self._stores.first.episodes
        at = table.ids.index(episode)
        rows = int(table.row_start[at]) + np.arange(int(table.length[at]))
        info, reader = self._stores.feature_info(self._feature), self._stores.reader(self._feature)
        stored = np.empty((len(rows), *info.shape), info.stored)
        try:
            reader.read(rows, stored)
            scales = reader.scales(rows)
        finally:
            reader.close()
        values = decode(info.dtype, stored, None if scales is None else scales[:, None])
        return Embeddings(np.arange(len(rows)), _checked(values, f"{self._stores.first.root}, {episode}"))

    def digest(self) -> str:
        """See `Teacher.digest`: of the store's fingerprint and the feature's name."""
        return digest({"fingerprint": self._manifest.fingerprint, "feature": self._feature})


class ZarrTeacher:
    """A zarr array [T, E] an episode."""

    kind, random_weights = "zarr", False

    def __init__(self, root: Path, arrays: Sequence[Path]) -> None:
        self._root = root
        self._arrays = {_name(root, path.parent.with_suffix("")): open_zarr_array(path) for path in arrays}

    def episodes(self) -> Sequence[str]:
        """See `Teacher.episodes`."""
        return sorted(self._arrays, key=natural)

    def load(self, episode: str) -> Embeddings:
        """See `Teacher.load`."""
        array = self._arrays[episode]
        if len(array.shape) != 2:
            raise SourceError(f"{array.path} has shape {array.shape}", expected="[T, E]: one embedding a frame")
        array.require_whole()
        values = array.read(0, array.shape[0])
        return Embeddings(np.arange(len(values)), _checked(values[:, None], str(array.path)))

    def digest(self) -> str:
        """See `Teacher.digest`: of paths, sizes and contents."""
        files = [path.relative_to(self._root).as_posix() for array in self._arrays.values() for path in array.files()]
        return digest_files(self._root, files)


class NpyTeacher:
    """Files [T, E], an episode each, or [E], a frame each in the folder of its episode."""

    kind, random_weights = "npy", False

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root, self._files = root, files
        self._whole: dict[str, Path] = {}
        self._single: dict[str, dict[int, Path]] = {}
        for path in files:
            shape = map_npy(path).shape
            if len(shape) == 2:
                self._whole[_name(root, path.with_suffix(""))] = path
            elif len(shape) == 1 and path.parent != root:
                frames = self._single.setdefault(_name(root, path.parent), {})
                other = frames.setdefault(_frame(path), path)
                if other != path:
                    raise SourceError(f"{other} and {path} are of one frame", expected="one file a frame")
            else:
                raise SourceError(f"{path} has shape {shape}", expected="EPISODE.npy [T, E], or EPISODE/FRAME.npy [E]")
        twice = self._whole.keys() & self._single.keys()
        if twice:
            raise SourceError(f"{root} holds {min(twice)} as a file and as a folder", expected="one of both")

    def episodes(self) -> Sequence[str]:
        """See `Teacher.episodes`."""
        return sorted([*self._whole, *self._single], key=natural)

    def load(self, episode: str) -> Embeddings:
        """See `Teacher.load`."""
        if episode in self._whole:
            path = self._whole[episode]
            values = np.asarray(map_npy(path))
            return Embeddings(np.arange(len(values)), _checked(values[:, None], str(path)))
        frames = dict(sorted(self._single[episode].items()))
        rows = [_checked(np.asarray(map_npy(path))[None, None], str(path)) for path in frames.values()]
        for path, row in zip(frames.values(), rows, strict=True):
            if row.shape != rows[0].shape:
                raise SourceError(f"{path} has {row.shape[-1]} numbers", expected=f"{rows[0].shape[-1]}")
        return Embeddings(np.array(list(frames), np.int64), np.concatenate(rows))

    def digest(self) -> str:
        """See `Teacher.digest`: of paths, sizes and contents."""
        return digest_files(self._root, [path.relative_to(self._root).as_posix() for path in self._files])


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _frame(path: Path) -> int:
    found = re.search(r"([0-9]+)$", path.stem)
    if found is None:
        raise SourceError(f"{path} names no frame", expected="a name that ends in its number, such as step_0007.npy")
    return int(found[1])


def _checked(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Return embeddings as float32. Refuses numbers that are not finite, and vectors of zeros: they stand for no
    direction, and are what a step that failed was filled with."""
    if values.dtype.kind not in "fiu" or not values.shape[-1]:
        raise SourceError(f"{where} is {values.dtype} {values.shape}", expected="numbers")
    with np.errstate(over="ignore"):
        rows = values.astype(np.float32)
    require_finite(rows, where, 0)
    empty = ~rows.any(axis=-1).all(axis=-1)
    if empty.any():
        raise SourceError(f"{where}, embedding {int(empty.argmax())} is all zeros", expected="a teacher's embedding")
    return rows
