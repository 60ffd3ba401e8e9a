"""LeRobot data sets, v3.0 and v2.1, straight from disk: pyarrow and PyAV, without the lerobot package."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources import parquet
from vla.featurize.sources.base import Episode, NoEpisodeError, SourceIndex, no_pictures
from vla.featurize.sources.episode_checks import (
    SKIP,
    clip_of,
    fitted,
    locate,
    require_finite,
    require_grid,
    require_order,
)
from vla.featurize.sources.lerobot_info import INFO, Info, inferred, inside, missing_file, read_info
from vla.featurize.sources.lerobot_layout import EpisodeRow, Layout, read_layout
from vla.featurize.sources.mapping import Column, ColumnMap, resolve
from vla.featurize.sources.pictures import decode_picture
from vla.featurize.sources.video import Clip, read_clip
from vla.stores.errors import SourceError
from vla.stores.filesystem import digest_file


@dataclass(frozen=True)
class _Checked:
    """An episode whose files are there and whose numbers hold: rows `first`..`first + length - 1` of `data`."""

    row: EpisodeRow
    data: Path
    first: int
    clips: dict[str, Clip]


@dataclass(frozen=True)
class _Indexed:
    index: SourceIndex
    columns: ColumnMap
    sizes: dict[str, tuple[int, int] | None]
    episodes: tuple[_Checked, ...]
    files: frozenset[str]


class LeRobotSource:
    """A LeRobot data set as a `Source`.

    `map` takes our names (`action`, `state`, `privileged`, a camera's, or a new one) to columns of the data set;
    `cameras` chooses views, in order (None: all, []: numbers alone); `skip_bad` leaves out episodes whose files are
    missing or whose numbers are wrong, and names them in `index().skipped`. Steps are `action`, `state` and
    `privileged` float32 [D], `timestamp` float64 [] in seconds, `frame_index` int64 [], and every other number or
    vector column under its name.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        map: Mapping[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.root = Path(root)
        self._map, self._cameras, self._skip_bad = dict(map or {}), cameras, skip_bad
        self._reader = parquet.RowReader()
        self._lock = threading.Lock()
        self._indexed: _Indexed | None = None
        self._digest: str | None = None

    def index(self) -> SourceIndex:
        """See `Source.index`. Every number of the data files is checked; no picture is looked at."""
        return self._index().index

    def digest(self) -> str:
        """See `Source.digest`: metadata, data files and the videos of the chosen cameras of the indexed episodes."""
        indexed = self._index()
        with self._lock:
            if self._digest is None:
                root = self.root.resolve()
                total = hashlib.sha256()
                for name in sorted(indexed.files):
                    total.update(f"{name}\0{(root / name).stat().st_size}\0{digest_file(root / name)}\n".encode())
                self._digest = total.hexdigest()
            return self._digest

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        indexed = self._index()
        checked = indexed.episodes[episode]
        return self._steps(indexed.columns, checked.data, checked.row, checked.first)

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`. Each call opens the files for itself and holds one frame a camera."""
        indexed = self._index()
        checked = indexed.episodes[episode]
        if not 0 <= start <= stop <= checked.row.length:
            raise SourceError(
                f"frames {start} to {stop} of {checked.row.id} in {self.root}", expected=f"0 to {checked.row.length}"
            )
        if not indexed.index.pictures:
            raise no_pictures(f"{checked.row.id} in {self.root}")
        return self._frames(indexed, checked, start, stop)

    def _frames(self, indexed: _Indexed, checked: _Checked, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        if start == stop:
            return
        views = [
            read_clip(checked.clips[column], start, stop)
            if column in checked.clips
            else self._pictures(checked, camera, column, indexed.sizes[column], start, stop)
            for camera, column in indexed.columns.cameras.items()
        ]
        yield from zip(*views, strict=True)

    def _pictures(
        self, checked: _Checked, camera: str, column: str, size: tuple[int, int] | None, start: int, stop: int
    ) -> Iterator[Image]:
        """Yield the pictures of a camera that are kept in the parquet file."""
        frame = start
        for table in self._reader.read(checked.data, [column], checked.first + start, checked.first + stop):
            for cell in table.column(column):
                where = f"{checked.data}, camera {camera}, {checked.row.id}, frame {frame}"
                yield decode_picture(_picture_bytes(cell, where), where, size)
                frame += 1

    def _index(self) -> _Indexed:
        with self._lock:
            if self._indexed is None:
                self._indexed = self._read_index()
            return self._indexed

    def _read_index(self) -> _Indexed:
        info = read_info(self.root)
        videos = [name for name, column in info.columns.items() if column.kind == "video"]
        columns, layout = self._resolve(info, videos)
        kept, skipped = [], self._unlisted(info, layout)
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for row in layout.rows:
            try:
                kept.append(self._check(info, columns, row, places))
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[row.id] = str(error)
        if not kept:
            raise NoEpisodeError(f"every episode of {self.root} is bad", skipped)
        sizes = {column: info.columns[column].size for column in columns.cameras.values()}
        index = SourceIndex(
            kind=f"lerobot-{info.version}",
            root=str(self.root),
            fps=info.fps,
            cameras=tuple(columns.cameras),
            episodes=tuple(Episode(c.row.id, c.row.length, self._task(layout, c)) for c in kept),
            steps=columns.specs,
            licence=info.licence,
            mapping=columns.names,
            skipped=skipped,
            pictures=bool(columns.cameras),
            sizes={camera: size for camera, column in columns.cameras.items() if (size := sizes[column]) is not None},
        )
        used = {checked.row.data for checked in kept} | {
            checked.row.videos[column].path for checked in kept for column in checked.clips
        }
        return _Indexed(index, columns, sizes, tuple(kept), frozenset(used | set(layout.files)))

    def _resolve(self, info: Info, videos: Sequence[str]) -> tuple[ColumnMap, Layout]:
        """Resolve the mapping against the columns that are there, and read the spans of the chosen videos only."""
        layout = read_layout(info, [])
        data = next((row.data for row in layout.rows if inside(info.root, row.data).is_file()), layout.rows[0].data)
        there = _columns_of(info, data)
        where = str(info.root / INFO) if there.keys() == info.columns.keys() else str(info.root / data)
        columns = resolve(there, self._map, self._cameras, where=where)
        chosen = [column for column in columns.cameras.values() if column in videos]
        return columns, read_layout(info, chosen) if chosen else layout

    def _unlisted(self, info: Info, layout: Layout) -> dict[str, str]:
        """Return {id: reason} of the episodes that info.json counts and no list describes."""
        listed = {row.index for row in layout.rows}
        if info.total_episodes is None or info.total_episodes == len(listed):
            return {}
        found = f"{info.root / layout.files[1]} lists {len(listed)} episodes, {INFO} says {info.total_episodes}"
        if not self._skip_bad:
            fix = f"--skip-bad, or total_episodes {len(listed)} in {INFO}"
            raise SourceError(found, expected="one number", fix=fix)
        absent = sorted(set(range(max(info.total_episodes, max(listed) + 1))) - listed)
        return {f"episode_{number:06d}": found for number in absent[:100_000]}

    def _check(
        self, info: Info, columns: ColumnMap, row: EpisodeRow, places: dict[str, dict[int, tuple[int, int]]]
    ) -> _Checked:
        """Raise `SourceError` where an episode's files are missing or its numbers are not what the metadata say."""
        if row.length < 1:
            raise SourceError(f"{self.root}: {row.id} has {row.length} frames", expected="at least 1", fix=SKIP)
        data = inside(info.root, row.data)
        if not data.is_file():
            raise missing_file(info.root, row.data, f"the steps of {row.id}", SKIP)
        if row.data not in places:
            places.clear()  # episodes come file by file
            places[row.data] = locate(data, row.index)
        first, count = places[row.data].get(row.index, (0, 0))
        if count != row.length:
            raise SourceError(f"{data}: {row.id} has {count} rows", expected=f"{row.length} as meta/ says", fix=SKIP)
        steps = self._steps(columns, data, row, first)
        times = np.asarray(steps["timestamp"], np.float64)
        videos = {name: row.videos[name] for name in columns.cameras.values() if name in row.videos}
        if videos:
            require_grid(times, info.fps, f"{data}, {row.id}")
        clips = {}
        for camera, column in columns.cameras.items():
            if column in videos:
                label = f"camera {camera}, {row.id}"
                clips[column] = clip_of(info, videos[column], float(times[0]), row, info.columns[column], label)
        return _Checked(row, data, first, clips)

    def _steps(self, columns: ColumnMap, data: Path, row: EpisodeRow, first: int) -> dict[str, NDArray[np.generic]]:
        """Read and check the numbers of one episode, {our name: [T, *shape]}."""
        theirs = tuple(dict.fromkeys(columns.steps.values()))
        table = pa.concat_tables(list(self._reader.read(data, theirs, first, first + row.length)))
        steps = {}
        for ours, name in columns.steps.items():
            where = f"{data}, {row.id}, column {name}"
            steps[ours] = fitted(parquet.to_array(table.column(name), where), columns.specs[ours], where)
        for ours in ("action", "state"):
            if ours in steps:
                require_finite(steps[ours], f"{data}, {row.id}, column {columns.steps[ours]}")
        require_order(steps["frame_index"], steps["timestamp"], f"{data}, {row.id}")
        return steps

    def _task(self, layout: Layout, checked: _Checked) -> str:
        """Return an episode's instruction; several are joined, as each holds for a part of it."""
        if checked.row.tasks:
            return "; ".join(checked.row.tasks)
        table = next(self._reader.read(checked.data, ["task_index"], checked.first, checked.first + 1))
        index = int(parquet.to_array(table.column("task_index"), f"{checked.data}, column task_index")[0])
        if index not in layout.tasks:
            raise SourceError(
                f"{checked.data}, {checked.row.id} has task {index}", expected=f"one of {layout.files[-1]}"
            )
        return layout.tasks[index]


def _columns_of(info: Info, data: str) -> dict[str, Column]:
    """Return the columns that exist: those of info.json that the data hold, the videos, and those it does not list."""
    file = inside(info.root, data)
    if not file.is_file():
        raise missing_file(info.root, data, "the steps of the first episode", SKIP)
    kinds = {field.name: field.type for field in parquet.schema(file)}
    columns = {name: c for name, c in info.columns.items() if name in kinds or c.kind == "video"}
    unlisted = [name for name in kinds if name not in columns]
    if unlisted:
        head = next(parquet.RowReader().read(file, unlisted, 0, 1), None)
        for name in unlisted:
            cell = head.column(name)[0].as_py() if head is not None else None
            columns[name] = inferred(*parquet.described(kinds[name], cell))
    return columns


def _picture_bytes(cell: Any, where: str) -> bytes:
    """Return a picture's bytes from a cell of type struct {bytes, path}, or of plain bytes."""
    value = cell.as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, dict) else None
    found = f"names {path!r} and holds no bytes" if path else "is empty"
    raise SourceError(f"{where} {found}", expected="pictures inside the parquet file", fix=SKIP)
