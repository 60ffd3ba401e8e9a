"""RGB2PC's windowed caches, de-duplicated to frames.

    PATH/[TASK/]episode_N.zarr/per_frame_features   zarr v2, [W, T, Hf, Wf, C]
    PATH/[TASK/]episode_N.zarr/frame_paths.json     list [W][T] of the pictures' paths
    PATH/[TASK/]episode_N.zarr/meta.json            num_frames, stride

Frame t of window w is frame w * stride + t of the episode, so most frames are stored up to T times. A network that
mixes the frames of a window gives one frame several features: such caches are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.base import CacheIndex
from vla.featurize.caches.checks import SKIP, Rows, as_feature, digest_files, feature_spec, keep_usual_rows, natural
from vla.featurize.caches.zarr_arrays import ZarrArray, open_zarr_array
from vla.featurize.sources.base import Episode
from vla.featurize.sources.files import read_json
from vla.stores.errors import DataError, SourceError

FEATURE = "grid"


class WindowsCache:
    """Feature `grid` [1, Hf, Wf, C] in the cache's dtype, without actions. The task's folder is the instruction."""

    def __init__(self, path: Path, *, camera: str = "head_camera", skip_bad: bool = False) -> None:
        self._root, self._camera, self._skip_bad = path.resolve(), camera, skip_bad
        self._arrays: list[tuple[ZarrArray, int]] = []
        self._index: CacheIndex | None = None

    def settings(self) -> dict[str, Any]:
        """See `Cache.settings`."""
        return {"camera": self._camera}

    def index(self) -> CacheIndex:
        """See `Cache.index`. The paths of the frames have to say what the stride says."""
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def digest(self) -> str:
        """See `Cache.digest`."""
        self.index()
        files = [path for array, _ in self._arrays for path in array.files()]
        files += [array.path.parent / name for array, _ in self._arrays for name in ("meta.json", "frame_paths.json")]
        return digest_files(self._root, [path.relative_to(self._root).as_posix() for path in files])

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """See `Cache.features`. One window is in memory at a time."""
        array, stride = self._arrays[episode]
        windows, width = array.shape[:2]
        rows = np.empty((stop - start, *array.shape[2:]), array.dtype)
        seen = np.zeros(stop - start, bool)
        for window in range(max(0, -(-(start - width + 1) // stride)), min(windows, -(-stop // stride))):
            values = array.read(window, window + 1)[0]
            for frame in range(max(start, window * stride), min(stop, window * stride + width)):
                row = values[frame - window * stride]
                if not seen[frame - start]:
                    rows[frame - start], seen[frame - start] = row, True
                elif rows[frame - start].tobytes() != row.tobytes():
                    raise SourceError(
                        f"{array.path}: window {window} has another frame {frame} than the windows before",
                        expected="equal bits; a network that mixes the frames of a window has no feature of a frame",
                        fix=SKIP,
                    )
        return {FEATURE: as_feature(rows, self.index().features[FEATURE], False, str(array.path), start)}

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """Return nothing: these caches hold no action."""
        return {}

    def _read_index(self) -> CacheIndex:
        arrays: dict[str, tuple[ZarrArray, int]] = {}
        found: dict[str, tuple[int, Rows]] = {}
        skipped: dict[str, str] = {}
        folders = [path for pattern in ("episode_*.zarr", "*/episode_*.zarr") for path in self._root.glob(pattern)]
        if not folders:
            raise SourceError(f"{self._root} holds no episode_N.zarr", expected="[TASK/]episode_N.zarr")
        for folder in sorted(folders, key=lambda path: natural(path.relative_to(self._root).as_posix())):
            name = folder.relative_to(self._root).as_posix().removesuffix(".zarr")
            try:
                array, stride = arrays[name] = _open(folder)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[name] = str(error)
                continue
            frames = (array.shape[0] - 1) * stride + array.shape[1]
            found[name] = frames, {FEATURE: (array.shape[2:], array.dtype)}
        if not found:
            raise SourceError(f"{self._root} has no sound episode: {next(iter(skipped.values()))}")
        rows = keep_usual_rows(found, lambda name: str(arrays[name][0].path), skipped, skip_bad=self._skip_bad)
        self._arrays = [arrays[name] for name in found]
        episodes = tuple(
            Episode(name, frames, arrays[name][0].path.parent.parent.name) for name, (frames, _) in found.items()
        )
        features = {FEATURE: feature_spec(*rows[FEATURE], False, FEATURE, str(self._root))}
        return CacheIndex(None, (self._camera,), episodes, features, {}, skipped)


def _open(folder: Path) -> tuple[ZarrArray, int]:
    """Return the array of an episode and its stride, after checking that windows overlap as the paths say."""
    array = open_zarr_array(folder / "per_frame_features")
    if len(array.shape) != 5 or min(array.shape) < 1:
        raise SourceError(f"{array.path} has shape {array.shape}", expected="[W, T, Hf, Wf, C]", fix=SKIP)
    array.require_whole()
    windows, width = array.shape[:2]
    try:
        meta = read_json(folder / "meta.json", "num_frames and stride")
        stride, frames = int(meta["stride"]), int(meta["num_frames"])
        flat = [[str(path) for path in row] for row in read_json(folder / "frame_paths.json", "paths of pictures")]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder}: meta.json or frame_paths.json does not read ({type(error).__name__})") from None
    covered = (windows - 1) * stride + width
    if not 1 <= stride <= width or frames != covered:
        raise SourceError(
            f"{folder / 'meta.json'}: {frames} frames, stride {stride}",
            expected=f"{covered} frames of {windows} windows of {width}",
            fix=SKIP,
        )
    if [len(row) for row in flat] != [width] * windows:
        raise SourceError(f"{folder / 'frame_paths.json'} is no table", expected=f"[{windows}][{width}]", fix=SKIP)
    names: dict[int, str] = {}
    for window, row in enumerate(flat):
        for place, path in enumerate(row):
            if names.setdefault(window * stride + place, path) != path:
                raise SourceError(
                    f"{folder / 'frame_paths.json'}: window {window} names frame {window * stride + place} {path!r}",
                    expected=repr(names[window * stride + place]),
                    fix=SKIP,
                )
    if len(set(names.values())) != frames:
        raise SourceError(f"{folder / 'frame_paths.json'} names a picture twice", expected="one a frame", fix=SKIP)
    return array, stride
