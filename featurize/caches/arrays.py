"""A folder of arrays, one file an episode: EPISODE.npy [T, ...], or EPISODE.safetensors of tensors [T, ...].

A .npy file is one feature. In a .safetensors file `action` and `state` [T, D] are steps and the rest are features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

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
from vla.featurize.sources.base import Episode, StepSpec
from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer

STEPS = ("action", "state")
_SAFE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8"}


class ArraysCache:
    """`feature` names the array of .npy files; with `has_views`, axis 1 of a feature is the view axis."""

    def __init__(
        self,
        path: Path,
        *,
        feature: str = "feature",
        task: str = "",
        cameras: Sequence[str] = ("camera",),
        has_views: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self._root, self._feature, self._task = path.resolve(), feature, task
        self._cameras, self._has_views, self._skip_bad = tuple(cameras), has_views, skip_bad
        self._files: list[Path] = []
        self._index: CacheIndex | None = None

    def settings(self) -> dict[str, Any]:
        """See `Cache.settings`."""
        return {
            "feature": self._feature,
            "task": self._task,
            "cameras": list(self._cameras),
            "has_views": self._has_views,
        }

    def index(self) -> CacheIndex:
        """See `Cache.index`. All files hold the same names, shapes and types but for their length."""
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def digest(self) -> str:
        """See `Cache.digest`."""
        self.index()
        return digest_files(self._root, [path.name for path in self._files])

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """See `Cache.features`."""
        specs, path = self.index().features, self._files[episode]
        read = _read(path, self._feature, list(specs), start, stop)
        return {
            name: as_feature(values, specs[name], self._has_views, f"{path}, {name}", start)
            for name, values in read.items()
        }

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """See `Cache.steps`."""
        specs, length, path = self.index().steps, self.index().episodes[episode].length, self._files[episode]
        read = _read(path, self._feature, list(specs), 0, length) if specs else {}
        return {name: as_vectors(values, f"{path}, {name}") for name, values in read.items()}

    def _read_index(self) -> CacheIndex:
        suffixes = {".npy", ".safetensors"}
        files = [path for path in self._root.glob("*") if path.suffix in suffixes and path.is_file()]
        if not files or len({path.suffix for path in files}) > 1:
            found = "two kinds of files" if files else "no arrays"
            raise SourceError(f"{self._root} holds {found}", expected="one .npy or .safetensors an episode")
        found_rows: dict[str, tuple[int, Rows]] = {}
        skipped: dict[str, str] = {}
        by_stem = {path.stem: path for path in sorted(files, key=lambda file: natural(file.stem))}
        for name, path in by_stem.items():
            try:
                found_rows[name] = self._rows(path)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[name] = str(error)
        if not found_rows:
            raise SourceError(f"{self._root} has no sound array: {next(iter(skipped.values()))}")
        rows = keep_usual_rows(found_rows, lambda name: str(by_stem[name]), skipped, skip_bad=self._skip_bad)
        self._files = [by_stem[name] for name in found_rows]
        episodes = [Episode(name, length, self._task) for name, (length, _) in found_rows.items()]
        features, steps = {}, {}
        for name, (shape, dtype) in rows.items():
            if name in STEPS and self._files[0].suffix == ".safetensors":
                steps[name] = StepSpec(shape, "float32", "action" if name == "action" else "state")
                continue
            require_views([shape[0] if self._has_views else 1], self._cameras, f"{self._root}, {name}")
            features[name] = feature_spec(shape, dtype, self._has_views, name, f"{self._root}, {name}")
        if not features:
            raise SourceError(f"{self._files[0]} holds no feature", expected=f"an array beside {', '.join(STEPS)}")
        return CacheIndex(None, self._cameras, tuple(episodes), features, steps, skipped)

    def _rows(self, path: Path) -> tuple[int, Rows]:
        """Return (length, {name: (shape of a row, dtype)}) of a file."""
        shapes = _shapes(path, self._feature)
        if path.suffix == ".safetensors":  # a step of one number may be [T]
            for name in shapes.keys() & set(STEPS):
                shape, dtype = shapes[name]
                shapes[name] = (*shape, 1) if len(shape) == 1 else shape, dtype
        lengths = {shape[0] for shape, _ in shapes.values() if shape}
        if len(lengths) != 1 or any(len(shape) < 2 for shape, _ in shapes.values()):
            what = {name: shape for name, (shape, _) in shapes.items()}
            raise SourceError(f"{path} holds shapes {what}", expected="[T, ...] of one length", fix=SKIP)
        length = lengths.pop()
        if length < 1:
            raise SourceError(f"{path} has no frames", expected="at least one", fix=SKIP)
        return length, {name: (shape[1:], dtype) for name, (shape, dtype) in sorted(shapes.items())}


def map_npy(path: Path) -> NDArray[Any]:
    """Map a .npy file. Pickled objects are refused, and so is a file that is longer or shorter than it says."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        refuse_pointer(path)
        raise SourceError(f"{path} does not load: {error}", expected="a plain .npy array", fix=SKIP) from None
    if not isinstance(array, np.memmap) or array.offset + array.nbytes != path.stat().st_size:
        raise SourceError(f"{path} has {path.stat().st_size} bytes", expected="an array that fills the file", fix=SKIP)
    return array


def _shapes(path: Path, feature: str) -> dict[str, tuple[tuple[int, ...], str]]:
    if path.suffix == ".npy":
        array = map_npy(path)
        return {feature: (array.shape, array.dtype.name)}
    with _Safe(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {
            name: (tuple(s.get_shape()), _SAFE_DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in found.items()
        }


def _read(path: Path, feature: str, names: Sequence[str], start: int, stop: int) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npy":
        return {feature: np.asarray(map_npy(path)[start:stop])}
    with _Safe(path) as file:
        return {name: _as_numpy(file.get_slice(name)[start:stop]) for name in names}


def _as_numpy(tensor: Any) -> NDArray[Any]:
    """Return a tensor as numpy's; bfloat16, which numpy has not, as float32, which holds each of its values."""
    return cast(NDArray[Any], (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())


class _Safe:
    """An open .safetensors file whose errors are `SourceError`s."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(self._path, framework="pt")
            return cast(Any, self._file).__enter__()
        except (SafetensorError, OSError) as error:
            refuse_pointer(self._path)
            what = f"{self._path} does not load: {error}"
            raise SourceError(what, expected="a whole .safetensors", fix=SKIP) from None

    def __exit__(self, *exception: object) -> None:
        cast(Any, self._file).__exit__(*exception)
