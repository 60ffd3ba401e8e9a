"""Diffusion Policy's ReplayBuffer with pictures: a zarr folder, `data/*` [N, ...] and `meta/episode_ends` int64 [E].

PushT's file, for one: `img` float32 [N, 96, 96, 3] in 0..255, `action` [N, 2], `state` [N, 5], `keypoint`. Layout:
`diffusion_policy/common/replay_buffer.py` of https://github.com/real-stanford/diffusion_policy.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.checks import SKIP, as_vectors, digest_files
from vla.featurize.caches.replay_buffer import read_ends
from vla.featurize.caches.zarr_arrays import ZarrArray, arrays_in, open_zarr_array
from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, NoEpisodeError, Role, SourceIndex, StepSpec, no_pictures
from vla.stores.errors import SourceError, UsageError
from vla.stores.manifest import Rate
from vla.stores.settings import nearest

ROLES: dict[str, Role] = {"action": "action", "state": "state", "privileged": "privileged"}


@dataclass(frozen=True)
class _Column:
    """Columns `start..stop-1` of an array [N, D], or all of an array [N], which is read as [N, 1]."""

    array: ZarrArray
    start: int
    stop: int

    def read(self, first: int, stop: int) -> NDArray[np.float32]:
        where = f"{self.array.path}, rows {first} to {stop - 1}"
        return as_vectors(self.array.read(first, stop), where)[:, self.start : self.stop]


@dataclass(frozen=True)
class _Indexed:
    index: SourceIndex
    cameras: tuple[ZarrArray, ...]
    columns: dict[str, tuple[_Column, ...]]
    rows: tuple[tuple[int, int], ...]
    """(first, stop) of each episode in the arrays."""


class ReplayBufferSource:
    """A ReplayBuffer folder as a `Source`.

    `cameras`: arrays of data/ (None: every array [N, H, W, 3]; []: none). `action`: an array [N, A]. `state` and
    `privileged`: arrays [N, D], joined in this order; `NAME[a:b]` takes columns a..b-1 (None: `state` where it exists).
    PushT's `state` holds the block's pose in columns 2 to 4, which a real robot would not know: `state=["state[0:2]"],
    privileged=["state[2:5]"]`. `picture_range`: what white is in float pictures, 255 or 1. `fps` has to be given: the
    format does not say it. `empty_chunks`: what a chunk without a file is, damage ("refuse") or the array's fill value
    ("fill"), which zarr need not store. `task`: the instruction. `skip_bad` leaves episodes out whose numbers are NaN
    or infinite, and names them.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        cameras: Sequence[str] | None = None,
        action: str = "action",
        state: Sequence[str] | None = None,
        privileged: Sequence[str] = (),
        picture_range: Literal[1, 255] = 255,
        fps: Rate | None = None,
        empty_chunks: Literal["refuse", "fill"] = "refuse",
        task: str = "",
        skip_bad: bool = False,
    ) -> None:
        if picture_range not in (1, 255):
            raise UsageError(f"picture_range {picture_range!r}", expected="1 or 255")
        self._root, self._cameras, self._range, self._fps = Path(path), cameras, picture_range, fps
        self._named = {"action": [action], "state": state, "privileged": list(privileged)}
        self._task, self._skip_bad, self._fill = task, skip_bad, empty_chunks == "fill"
        self._lock = threading.Lock()
        self._indexed: _Indexed | None = None
        self._digest: str | None = None

    def index(self) -> SourceIndex:
        """See `Source.index`. Every chunk is there; every number of action and state is checked."""
        return self._index().index

    def digest(self) -> str:
        """See `Source.digest`: the arrays that are read, and the ends of the episodes."""
        indexed = self._index()
        with self._lock:
            if self._digest is None:
                columns = [column.array for parts in indexed.columns.values() for column in parts]
                arrays = [*indexed.cameras, *columns, open_zarr_array(self._root / "meta" / "episode_ends")]
                files = {path.relative_to(self._root).as_posix() for array in arrays for path in array.files()}
                self._digest = digest_files(self._root, files)
            return self._digest

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        indexed = self._index()
        return _steps(indexed.columns, *indexed.rows[episode])

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`. Chunk by chunk: one chunk of each camera is in memory."""
        indexed = self._index()
        first, end = indexed.rows[episode]
        if not 0 <= start <= stop <= end - first:
            name = indexed.index.episodes[episode].id
            raise SourceError(f"frames {start} to {stop} of {name} in {self._root}", expected=f"0 to {end - first}")
        if not indexed.cameras:
            raise no_pictures(f"{indexed.index.episodes[episode].id} in {self._root}")
        views = [self._pictures(array, first + start, first + stop) for array in indexed.cameras]
        return zip(*views, strict=True)

    def _pictures(self, array: ZarrArray, first: int, stop: int) -> Iterator[Image]:
        rows = array.block_rows
        while first < stop:
            last = min((first // rows + 1) * rows, stop)  # the end of this chunk
            block = array.read(first, last)
            for row in range(last - first):
                yield _as_picture(block[row], self._range, f"{array.path}, row {first + row}")
            first = last

    def _index(self) -> _Indexed:
        with self._lock:
            if self._indexed is None:
                self._indexed = self._read_index()
            return self._indexed

    def _read_index(self) -> _Indexed:
        ends = read_ends(self._root / "meta" / "episode_ends")
        there = {path.name: open_zarr_array(path) for path in arrays_in(self._root / "data")}
        cameras = self._choose_cameras(there)
        columns = self._choose_columns(there)
        numbers = [column.array for parts in columns.values() for column in parts]
        for array in (*cameras.values(), *numbers):
            if array.shape[0] != ends[-1]:
                raise SourceError(
                    f"{array.path} has {array.shape[0]} rows", expected=f"{ends[-1]} as episode_ends says"
                )
            fix = "--set source_options.empty_chunks=fill if zarr left it out"
            array.require_whole(fill=self._fill, at_once=array in numbers, fix=fix)
        episodes, rows, skipped = [], [], {}
        for number, (first, stop) in enumerate(zip((0, *ends[:-1].tolist()), ends.tolist(), strict=True)):
            name = f"episode_{number:06d}"
            try:
                _steps(columns, first, stop)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[name] = str(error)
                continue
            episodes.append(Episode(name, stop - first, self._task))
            rows.append((first, stop))
        if not episodes:
            raise NoEpisodeError(f"every episode of {self._root} is bad", skipped)
        mapping = {name: "+".join(map(_written, parts)) for name, parts in columns.items()}
        widths = {name: sum(part.stop - part.start for part in parts) for name, parts in columns.items()}
        index = SourceIndex(
            kind="replay-buffer",
            root=str(self._root),
            fps=self._frequency(),
            cameras=tuple(cameras),
            episodes=tuple(episodes),
            steps={name: StepSpec((width,), "float32", ROLES[name]) for name, width in widths.items()},
            mapping=mapping | {"white": str(self._range)} | ({"empty_chunks": "fill"} if self._fill else {}),
            skipped=skipped,
            pictures=bool(cameras),
            sizes={camera: (array.shape[1], array.shape[2]) for camera, array in cameras.items()},
        )
        return _Indexed(index, tuple(cameras.values()), columns, tuple(rows))

    def _choose_cameras(self, there: dict[str, ZarrArray]) -> dict[str, ZarrArray]:
        pictures = {name: array for name, array in there.items() if len(array.shape) == 4 and array.shape[3] == 3}
        if self._cameras is not None and not self._cameras:
            return {}
        if not pictures:
            found = ", ".join(f"{name} {array.shape}" for name, array in there.items())
            raise SourceError(
                f"{self._root / 'data'} has no pictures, only {found or 'nothing'}",
                expected="an array [N, H, W, 3]",
                fix="vla import replay-buffer, where the arrays are features",
            )
        named = list(pictures) if self._cameras is None else self._cameras
        for name in named:
            if name not in pictures:
                hint = nearest(name, pictures)
                raise UsageError(
                    f"{self._root} has no pictures {name!r}{hint}", expected=f"one of {', '.join(pictures)}"
                )
        chosen = {name: pictures[name] for name in named}
        for array in chosen.values():
            if array.dtype != "uint8" and not array.dtype.startswith("float"):
                raise SourceError(f"{array.path} has dtype {array.dtype}", expected="pictures as uint8 or floats")
        return chosen

    def _choose_columns(self, there: dict[str, ZarrArray]) -> dict[str, tuple[_Column, ...]]:
        columns = {}
        for ours, named in self._named.items():
            if named is None:
                named = ["state"] if "state" in there else []
            if named:
                columns[ours] = tuple(self._column(there, text) for text in named)
        return columns

    def _column(self, there: dict[str, ZarrArray], text: str) -> _Column:
        """Parse `NAME` or `NAME[a:b]`. Raises `UsageError` naming the arrays that are there."""
        match = re.fullmatch(r"(.+?)(?:\[(\d+):(\d+)\])?", text)
        vectors = {name: array for name, array in there.items() if len(array.shape) in (1, 2)}
        if match is None or match[1] not in vectors:
            hint = nearest(match[1] if match else text, vectors)
            known = ", ".join(f"{name} {array.shape}" for name, array in vectors.items()) or "an array [N, D]"
            raise UsageError(f"{self._root / 'data'} has no numbers {text!r}{hint}", expected=f"one of {known}")
        array = vectors[match[1]]
        width = array.shape[1] if len(array.shape) == 2 else 1
        start, stop = (int(match[2]), int(match[3])) if match[2] else (0, width)
        if not 0 <= start < stop <= width:
            raise UsageError(f"columns {text!r}", expected=f"some of 0:{width}")
        return _Column(array, start, stop)

    def _frequency(self) -> float:
        if self._fps is None or not self._fps > 0:
            raise SourceError(
                f"{self._root} does not say how many frames a second it has",
                expected="Hz",
                fix="--set source_options.fps=10",
            )
        return float(self._fps)


def _steps(columns: dict[str, tuple[_Column, ...]], first: int, stop: int) -> dict[str, NDArray[np.generic]]:
    return {name: np.concatenate([part.read(first, stop) for part in parts], axis=1) for name, parts in columns.items()}


def _written(column: _Column) -> str:
    return f"{column.array.path.name}[{column.start}:{column.stop}]"


def _as_picture(pixels: NDArray[np.generic], white: int, where: str) -> Image:
    """Return uint8 [H, W, 3]. Floats are 0..white; what cannot be that is refused, never clipped."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    values = pixels.astype(np.float32)
    low, high = float(values.min()), float(values.max())  # NaN passes through both
    if not (low >= 0 and high <= white):
        fix = SKIP if white == 255 else "--set source_options.picture_range=255"
        raise SourceError(f"{where} has pixels from {low:g} to {high:g}", expected=f"0 to {white}", fix=fix)
    if white == 255 and 0 < high <= 1 and (values % 1).any():
        fix = "--set source_options.picture_range=1"
        raise SourceError(f"{where} has pixels from {low:g} to {high:g}", expected="0 to 255", fix=fix)
    whole: NDArray[np.float32] = np.rint(values * (255 / white))
    return whole.astype(np.uint8)
