"""LeRobot data sets, v3.0, v2.1 and v2.0, straight from disk: pyarrow and PyAV, without the lerobot package."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources import parquet
from vla.featurize.sources.base import Episode, NoEpisodeError, SourceIndex, StepSpec, no_pictures
from vla.featurize.sources.episode_checks import SKIP, locate, require_grid
from vla.featurize.sources.lerobot_clips import Align, Placed, place_clips
from vla.featurize.sources.lerobot_columns import ColumnReader
from vla.featurize.sources.lerobot_info import INFO, NUMBERS, Info, inferred, inside, missing_file, read_info
from vla.featurize.sources.lerobot_layout import EpisodeRow, Layout, read_layout, without_videos
from vla.featurize.sources.lerobot_modality import MODALITY, joined, read_modality, with_parts
from vla.featurize.sources.lerobot_records import disagreements, doubled_tasks, doubtful_tasks, unlisted_files
from vla.featurize.sources.lerobot_tasks import (
    TASK_INDEX,
    Tasks,
    Told,
    channels_of,
    instruction_column,
    read_tasks,
    told,
)
from vla.featurize.sources.mapping import Column, ColumnMap, Part, our_name, resolve
from vla.featurize.sources.pictures import decode_picture
from vla.featurize.sources.video import Clip, read_clip
from vla.stores.errors import SourceError
from vla.stores.filesystem import digest_file

TASK_SPEC = StepSpec((), "int64", "other")


@dataclass(frozen=True)
class _Checked:
    """An episode whose files are there and whose numbers hold: rows `first`..`first + length - 1` of `data`."""

    row: EpisodeRow
    data: Path
    first: int
    clips: dict[str, Clip]
    told: Told


@dataclass(frozen=True)
class _Rows:
    """An episode's rows `first`.. of `data`: the time of the first, what they were told, and their `index` column."""

    data: Path
    first: int
    first_time: float
    told: Told
    index: tuple[int, int] | None


@dataclass(frozen=True)
class _Opened:
    """What the metadata say of all episodes. `parts` {column: parts of others}; `channels` {annotation: column}.

    `instruction` is the column of the instruction, None where an episode's own list is it. `files` are metadata files
    beside those of `layout` and `tasks`.
    """

    columns: ColumnMap
    parts: Mapping[str, tuple[Part, ...]]
    layout: Layout
    tasks: Tasks
    channels: Mapping[str, str]
    instruction: str | None
    has_index: bool
    files: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Indexed:
    index: SourceIndex
    columns: ColumnMap
    parts: Mapping[str, tuple[Part, ...]]
    sizes: dict[str, tuple[int, int] | None]
    episodes: tuple[_Checked, ...]
    files: frozenset[str]


class LeRobotSource:
    """A LeRobot data set as a `Source`.

    `map` takes our names (`action`, `state`, `privileged`, a camera's, or a new one) to columns of the data set;
    `cameras` chooses views, in order (None: all that have pictures, []: numbers alone); `annotation` names the
    `annotation.*` column that is the instruction (None: `task_index`). `align` is how rows find their frames:
    "timestamp", or "index" where timestamps are no multiples of 1/fps and row i saw frame i (None: by timestamp, which
    has to fit). `skip_bad` leaves out episodes whose files are missing or whose numbers are wrong, and names them in
    `index().skipped`; records that contradict each other are then in `index().warnings`. Steps are `action`, `state`
    and `privileged` float32 [D], `timestamp` float64 [] in seconds, `frame_index` int64 [], every other number or
    vector column under its name, and `task_index` int64 [] where the instruction changes inside an episode.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        map: Mapping[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        annotation: str | None = None,
        align: Align | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.root = Path(root)
        self._map, self._cameras, self._skip_bad = dict(map or {}), cameras, skip_bad
        self._annotation, self._align = annotation, align
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
        columns, fps = indexed.columns, indexed.index.fps
        return self._steps(columns, indexed.parts, fps, checked.data, checked.row, checked.first)

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

    def _steps(
        self,
        columns: ColumnMap,
        parts: Mapping[str, tuple[Part, ...]],
        fps: float,
        data: Path,
        row: EpisodeRow,
        first: int,
        unread: dict[str, str] | None = None,
    ) -> dict[str, NDArray[np.generic]]:
        """Read and check the numbers of one episode, {our name: [T, *shape]}; see `ColumnReader.read`."""
        asked = {our_name(name) for name in self._map}
        reader = ColumnReader(self._reader, columns, parts, frozenset(asked), fps, self._align != "index")
        return reader.read(data, row, first, unread)

    def _index(self) -> _Indexed:
        with self._lock:
            if self._indexed is None:
                self._indexed = self._read_index()
            return self._indexed

    def _read_index(self) -> _Indexed:
        info = read_info(self.root)
        opened = self._open(info)
        skipped = self._unlisted(info, opened.layout)
        rows: dict[int, _Rows] = {}
        unread: dict[str, str] = {}
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for row in opened.layout.rows:
            try:
                rows[row.index] = self._check(info, opened, row, places, unread)
            except SourceError as error:
                self._skip(skipped, row, error)
        opened = _without(opened, unread)
        placed, unclaimed = self._clips(info, opened, rows)
        kept = []
        for row in opened.layout.rows:
            clips = {column: place[row.index] for column, place in placed.items() if row.index in place}
            wrong = next((clip for clip in clips.values() if isinstance(clip, SourceError)), None)
            if wrong is not None:
                self._skip(skipped, row, wrong)
            elif row.index in rows:
                found = {column: clip for column, clip in clips.items() if isinstance(clip, Clip)}
                kept.append(_Checked(row, rows[row.index].data, rows[row.index].first, found, rows[row.index].told))
        if not kept:
            raise NoEpisodeError(f"every episode of {self.root} is bad", skipped)
        choices = {"annotation": self._annotation, "align": "index" if self._align == "index" else None}
        warnings = [*opened.warnings, *self._disagreements(info, opened, rows, places, list(placed), unclaimed)]
        named = {name: choice for name, choice in choices.items() if choice is not None}
        return _indexed(self.root, info, opened, kept, skipped, warnings, named)

    def _skip(self, skipped: dict[str, str], row: EpisodeRow, error: SourceError) -> None:
        """Note why an episode is left out. Raises `error` unless bad episodes are to be skipped."""
        if not self._skip_bad:
            raise error
        skipped.setdefault(row.id, str(error))

    def _open(self, info: Info) -> _Opened:
        """Resolve the mapping against the columns that exist, and read the spans of the chosen videos only."""
        videos = [name for name, column in info.columns.items() if column.kind == "video"]
        layout = read_layout(info, [])
        data = next((row.data for row in layout.rows if inside(info.root, row.data).is_file()), layout.rows[0].data)
        kinds, there = _columns_of(info, data)
        where = str(info.root / INFO) if there.keys() == info.columns.keys() else str(info.root / data)
        modality = read_modality(info.root)
        if modality is not None:
            there = with_parts(there, modality, str(info.root / MODALITY))
        there = joined(there, self._map.values())
        absent = self._absent(info, there, videos)
        there = {name: column for name, column in there.items() if name not in absent}
        names = modality.cameras if modality is not None else {}
        timed = self._align != "index"
        columns = resolve(there, self._map, self._cameras, where=where, camera_names=names, needs_time=timed)
        chosen = [column for column in columns.cameras.values() if column in videos]
        channels = channels_of(kinds, modality.annotations if modality is not None else {})
        return _Opened(
            columns,
            {name: column.parts for name, column in there.items() if column.parts},
            read_layout(info, chosen) if chosen else layout,
            read_tasks(info),
            channels,
            instruction_column(kinds, channels, self._annotation, where),
            "index" in kinds,
            (MODALITY,) if modality is not None else (),
            tuple(f"camera {name} of {info.root / INFO} has no video, and is left out" for name in absent),
        )

    def _absent(self, info: Info, there: Mapping[str, Column], videos: Sequence[str]) -> list[str]:
        """Return the declared cameras without videos that are left out: where none is chosen and others remain."""
        if self._cameras is not None or not videos:
            return []
        # A name that is no folder's is not left out: `resolve` refuses it.
        absent = [name for name in without_videos(info, videos) if name not in self._map.values() and "/" not in name]
        pictures = [name for name, column in there.items() if column.kind in ("picture", "video")]
        return absent if len(absent) < len(pictures) else []

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
        self,
        info: Info,
        opened: _Opened,
        row: EpisodeRow,
        places: dict[str, dict[int, tuple[int, int]]],
        unread: dict[str, str],
    ) -> _Rows:
        """Raise `SourceError` where an episode's data are missing or its numbers are not what the metadata say.

        `unread` gains {column that nobody asked for: why it cannot be read}.
        """
        if row.length < 1:
            raise SourceError(f"{self.root}: {row.id} has {row.length} frames", expected="at least 1", fix=SKIP)
        data = inside(info.root, row.data)
        if not data.is_file():
            raise missing_file(info.root, row.data, f"the steps of {row.id}", SKIP)
        if row.data not in places:
            places[row.data] = locate(data, row.index)
        first, count = places[row.data].get(row.index, (0, 0))
        if count != row.length:
            raise SourceError(f"{data}: {row.id} has {count} rows", expected=f"{row.length} as meta/ says", fix=SKIP)
        steps = self._steps(opened.columns, opened.parts, info.fps, data, row, first, unread)
        times = np.asarray(steps["timestamp"], np.float64)
        if self._align != "index" and any(name in row.videos for name in opened.columns.cameras.values()):
            require_grid(times, info.fps, f"{data}, {row.id}")
        told, span = self._told(opened, row, data, first)
        return _Rows(data, first, float(times[0]), told, span)

    def _told(self, opened: _Opened, row: EpisodeRow, data: Path, first: int) -> tuple[Told, tuple[int, int] | None]:
        """Return what the frames of an episode were told, and their values of the column `index` (first, last + 1)."""
        wanted = {*opened.channels.values(), *([opened.instruction] if opened.instruction else [])}
        names = [*sorted(wanted), *(["index"] if opened.has_index else [])]
        where, span = f"{data}, {row.id}", None
        table = pa.concat_tables(list(self._reader.read(data, names, first, first + row.length))) if names else None
        if table is not None and opened.has_index:
            index = parquet.to_array(table.column("index"), f"{where}, column index").reshape(-1).astype(np.int64)
            if (np.diff(index) != 1).any():
                at = int((np.diff(index) != 1).argmax()) + 1
                raise SourceError(f"{where}: row {at} has index {index[at]}", expected=f"{index[at - 1] + 1}", fix=SKIP)
            span = (int(index[0]), int(index[-1]) + 1)
        return told(table, opened.instruction, opened.channels, opened.tasks, row.tasks, where), span

    def _clips(self, info: Info, opened: _Opened, rows: Mapping[int, _Rows]) -> tuple[dict[str, Placed], list[str]]:
        """Return {video column: {episode index: clip, or what is wrong}} of the episodes whose numbers hold.

        Beside these, the frames that belong to no episode.

        An episode whose numbers do not hold still fills its place in a shared video; its time is then another's.
        """
        usual = next((found.first_time for found in rows.values()), 0.0)
        placed, unclaimed = {}, []
        for camera, column in opened.columns.cameras.items():
            if info.columns[column].kind == "video":
                used = {row.videos[column].path for row in opened.layout.rows if row.index in rows}
                members = [row for row in opened.layout.rows if row.videos[column].path in used and row.length > 0]
                timed = [(row, rows[row.index].first_time if row.index in rows else usual) for row in members]
                found = place_clips(info, column, camera, timed, self._align)
                placed[column] = {number: clip for number, clip in found.clips.items() if number in rows}
                unclaimed += found.unclaimed
        return placed, unclaimed

    def _disagreements(
        self,
        info: Info,
        opened: _Opened,
        rows: Mapping[int, _Rows],
        places: Mapping[str, Mapping[int, tuple[int, int]]],
        videos: Sequence[str],
        unclaimed: Sequence[str],
    ) -> list[str]:
        """Return what the records of the data set contradict each other in. Raises the first unless `skip_bad`."""
        listed = {(row.data, row.index) for row in opened.layout.rows}
        stray = [
            f"{info.root / data} has rows of episode {number}, which meta/ does not list there"
            for data, found in places.items()
            for number in found
            if (data, number) not in listed
        ]
        extra = [*unclaimed, *stray, *unlisted_files(info, opened.layout.rows, videos)]
        indices = {number: row.index for number, row in rows.items() if row.index is not None}
        problems = list(disagreements(info, opened.layout, indices, extra))
        if problems and not self._skip_bad:
            fix = "--skip-bad, which reads the data set all the same"
            raise SourceError(problems[0], expected="records that agree", fix=fix)
        listings = [row for row in opened.layout.rows if row.index in rows]
        return [*problems, *doubled_tasks(info, opened.tasks)] + [
            line for row in listings for line in doubtful_tasks(info, row, rows[row.index].told, opened.tasks)
        ]


def _indexed(
    root: Path,
    info: Info,
    opened: _Opened,
    kept: Sequence[_Checked],
    skipped: Mapping[str, str],
    warnings: Sequence[str],
    choices: Mapping[str, str],
) -> _Indexed:
    """Describe the episodes that are kept; `choices` are the options that change what is read of the same files."""
    columns = opened.columns
    told_by = opened.instruction
    changes = any(checked.told.changes for checked in kept)
    if changes and told_by is not None and told_by not in columns.steps.values():
        # The instruction of each frame: the number of one of the episode's texts `task_N`.
        steps, specs = {**columns.steps, TASK_INDEX: told_by}, {**columns.specs, TASK_INDEX: TASK_SPEC}
        columns = ColumnMap(columns.cameras, steps, specs)
    sizes = {column: info.columns[column].size for column in columns.cameras.values()}
    index = SourceIndex(
        kind=f"lerobot-{info.version}",
        root=str(root),
        fps=info.fps,
        cameras=tuple(columns.cameras),
        episodes=tuple(Episode(c.row.id, c.row.length, c.told.task, dict(c.told.texts)) for c in kept),
        steps=columns.specs,
        licence=info.licence,
        mapping={**columns.names, **choices},
        skipped=skipped,
        warnings=tuple(warnings),
        pictures=bool(columns.cameras),
        sizes={camera: size for camera, column in columns.cameras.items() if (size := sizes[column]) is not None},
    )
    used = {checked.row.data for checked in kept} | {
        checked.row.videos[column].path for checked in kept for column in checked.clips
    }
    # An episode's own list already holds its one text; only other texts depend on the file of tasks.
    if opened.tasks.texts and any(c.told.texts or list(c.row.tasks) != [c.told.task] for c in kept):
        used.add(opened.tasks.file)
    used.update(opened.layout.files, opened.files)
    return _Indexed(index, columns, opened.parts, sizes, tuple(kept), frozenset(used))


def _without(opened: _Opened, unread: Mapping[str, str]) -> _Opened:
    """Leave out step columns, {our name: why}, with a warning for each."""
    columns = opened.columns
    steps = {name: column for name, column in columns.steps.items() if name not in unread}
    specs = {name: spec for name, spec in columns.specs.items() if name not in unread}
    warnings = tuple(f"column {name} is left out: {reason}" for name, reason in unread.items())
    return replace(opened, columns=ColumnMap(columns.cameras, steps, specs), warnings=opened.warnings + warnings)


def _columns_of(info: Info, data: str) -> tuple[dict[str, Any], dict[str, Column]]:
    """Return {name: pyarrow type} of a data file, and the columns that exist.

    These are the columns of info.json that the data hold, the videos, and the columns that info.json does not list or
    lists with a type that is not LeRobot's.
    """
    file = inside(info.root, data)
    if not file.is_file():
        raise missing_file(info.root, data, "the steps of the first episode", SKIP)
    kinds = {field.name: field.type for field in parquet.schema(file)}
    columns = {name: c for name, c in info.columns.items() if name in kinds or c.kind == "video"}
    for name in kinds.keys() & columns.keys():
        if columns[name].kind == "number" and parquet.described(kinds[name], None)[0] not in {*NUMBERS, "null"}:
            columns[name] = Column("unused", str(kinds[name]), ())
    unlisted = [name for name in kinds if name not in columns or columns[name].kind == "unused"]
    if unlisted:
        head = next(parquet.RowReader().read(file, unlisted, 0, 1), None)
        for name in unlisted:
            cell = head.column(name)[0].as_py() if head is not None else None
            found = inferred(*parquet.described(kinds[name], cell))
            if name not in columns or (found.kind == "number" and columns[name].dtype != "depth map"):
                columns[name] = found
    return kinds, columns


def _picture_bytes(cell: Any, where: str) -> bytes:
    """Return a picture's bytes from a cell of type struct {bytes, path}, or of plain bytes."""
    value = cell.as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, dict) else None
    found = f"names {path!r} and holds no bytes" if path else "is empty"
    raise SourceError(f"{where} {found}", expected="pictures inside the parquet file", fix=SKIP)
