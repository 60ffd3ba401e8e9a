"""LeRobot data sets (v3.0 and v2.1) straight from disk, without the lerobot package."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, Role, SourceIndex, StepSpec
from vla.featurize.sources.lerobot_layout import EpisodeRecord, Layout, inside, read_columns, read_layout
from vla.featurize.sources.pictures import decode_picture
from vla.featurize.sources.video import read_clip
from vla.stores.errors import SourceError
from vla.stores.filesystem import digest_file
from vla.stores.settings import nearest

ALIASES = {
    "action": ("action", "actions"),
    "state": ("observation.state", "state", "observation.states"),
    "privileged": ("observation.environment_state",),
}
"""Names under which data sets in the wild keep what we call action, state and privileged; only the first counts
without a `--map`, the others are what an error proposes."""

CACHED_FILES = 4


@dataclass(frozen=True)
class _Table:
    """The numbers of one data file: `columns[name]` [rows, D], `episode` int64 [rows]."""

    columns: dict[str, NDArray[Any]]
    episode: NDArray[np.int64]


class LeRobotSource:
    """A LeRobot data set as a `Source`.

    `map` takes our names (`action`, `state`, `privileged`, or a camera's) to columns of the data set; `cameras` chooses
    views, in order (None: all); `skip_bad` leaves out episodes whose files or numbers are bad, and names them.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        map: Mapping[str, str] | None = None,
        cameras: tuple[str, ...] | list[str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.root = Path(root)
        self._map, self._wanted_cameras, self._skip_bad = dict(map or {}), cameras, skip_bad
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._lock = threading.Lock()
        self._indexed: tuple[SourceIndex, list[EpisodeRecord]] | None = None

    def index(self) -> SourceIndex:
        """See `Source.index`. Every number of the data files is looked at; no picture is."""
        return self._index()[0]

    def digest(self) -> str:
        """See `Source.digest`."""
        total = hashlib.sha256()
        for path in sorted(self._files()):
            file = self.root / path
            total.update(f"{path}\0{file.stat().st_size}\0{digest_file(file)}\n".encode())
        return total.hexdigest()

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`. Besides the mapped columns: `timestamp` and `frame_index`."""
        index, records = self._index()
        record = records[episode]
        table = self._table(record.data)
        rows = table.episode == record.index
        values = {ours: table.columns[theirs][rows] for ours, theirs in self._columns(self._layout).items()}
        return {name: values[name].reshape(record.length, *index.steps[name].shape) for name in index.steps}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`."""
        index, records = self._index()
        record = records[episode]
        if not 0 <= start <= stop <= record.length:
            raise SourceError(
                f"frames {start}..{stop - 1} of episode {record.index}", expected=f"0..{record.length - 1}"
            )
        if start == stop:
            return
        views = [self._view(record, index.mapping[camera], start, stop) for camera in index.cameras]
        for number, images in enumerate(zip(*views, strict=True), start):
            for camera, image in zip(index.cameras, images, strict=True):
                height, width = self._layout.features[index.mapping[camera]]["shape"][:2]
                if image.shape[:2] not in ((height, width), self._channels_first(index.mapping[camera])):
                    found = f"{image.shape[1]} x {image.shape[0]}"
                    raise SourceError(
                        f"{self.root}, episode {record.index}, frame {number}: {camera} is {found} pixels",
                        expected=f"{width} x {height}, as meta/info.json says",
                    )
            yield images

    def _index(self) -> tuple[SourceIndex, list[EpisodeRecord]]:
        if self._indexed is None:
            self._layout = read_layout(self.root)
            columns = self._columns(self._layout)
            cameras = self._cameras(self._layout)
            steps = {ours: self._step_spec(ours, theirs) for ours, theirs in columns.items()}
            kept, skipped = [], {}
            seen: set[int] = set()
            for record in self._layout.episodes:
                try:
                    if record.index in seen:
                        raise SourceError(f"{self.root} lists episode {record.index} twice", expected="unique indices")
                    seen.add(record.index)
                    self._check(record, columns, steps, [theirs for _, theirs in cameras])
                except SourceError as error:
                    if not self._skip_bad:
                        raise
                    skipped[_episode_id(record)] = str(error)
                    continue
                kept.append(record)
            if not kept:
                raise SourceError(f"every episode of {self.root} is bad; the first: {next(iter(skipped.values()))}")
            index = SourceIndex(
                kind=f"lerobot-{self._layout.version}",
                root=str(self.root),
                fps=self._layout.fps,
                cameras=tuple(ours for ours, _ in cameras),
                episodes=tuple(Episode(_episode_id(record), record.length, record.task) for record in kept),
                steps=steps,
                licence=self._layout.licence,
                mapping={**columns, **dict(cameras)},
                skipped=skipped,
            )
            self._indexed = index, kept
        return self._indexed

    def _columns(self, layout: Layout) -> dict[str, str]:
        """Return {our name: their column} of the numbers."""
        columns = {}
        for ours, names in ALIASES.items():
            theirs = self._map.get(ours, names[0])
            if theirs in layout.features:
                columns[ours] = theirs
            elif ours in self._map:
                hint = nearest(theirs, layout.features)
                raise SourceError(f"--map {ours}={theirs}: {self.root} has no {theirs!r}{hint}", expected=_list(layout))
            elif ours == "action":
                raise self._missing(layout, "action", names[0])
            elif ours == "state" and any(alias in layout.features for alias in names[1:]):
                raise self._missing(layout, "state", names[0])
        columns |= {name: name for name in ("timestamp", "frame_index") if name in layout.features}
        return columns

    def _missing(self, layout: Layout, ours: str, wanted: str) -> SourceError:
        there = [alias for alias in ALIASES[ours] if alias in layout.features]
        fix = f"--map {ours}={there[0] if there else 'THEIR_COLUMN'}"
        return SourceError(f"{self.root / 'meta/info.json'} has no {wanted!r}", expected=_list(layout), fix=fix)

    def _cameras(self, layout: Layout) -> list[tuple[str, str]]:
        """Return (our name, their column) of each view, in order."""
        renamed = {theirs: ours for ours, theirs in self._map.items() if theirs in layout.cameras}
        unknown = [
            f"{ours}={theirs}"
            for ours, theirs in self._map.items()
            if ours not in ALIASES and theirs not in layout.cameras
        ]
        if unknown:
            raise SourceError(f"--map {unknown[0]}: no such camera", expected=f"one of {', '.join(layout.cameras)}")
        known = {renamed.get(theirs, theirs): theirs for theirs in layout.cameras}
        if not known:
            raise SourceError(f"{self.root / 'meta/info.json'} names no camera", expected="a video or image feature")
        wanted = list(known) if self._wanted_cameras is None else list(self._wanted_cameras)
        cameras = []
        for name in wanted:
            matches = [ours for ours in known if ours == name or ours.rsplit(".", 1)[-1] == name]
            if len(matches) != 1:
                hint = nearest(name, known)
                raise SourceError(f"{self.root} has no camera {name!r}{hint}", expected=f"one of {', '.join(known)}")
            cameras.append((matches[0], known[matches[0]]))
        return cameras

    def _step_spec(self, ours: str, theirs: str) -> StepSpec:
        spec = self._layout.features[theirs]
        shape = tuple(int(n) for n in spec.get("shape") or ())
        if ours in ("timestamp", "frame_index"):
            return StepSpec((), "float64" if ours == "timestamp" else "int64", "other")
        if len(shape) != 1 or shape[0] < 1:
            raise SourceError(f"{self.root / 'meta/info.json'}: {theirs} has shape {shape}", expected="one axis")
        roles: dict[str, Role] = {"action": "action", "state": "state"}
        role = "privileged" if spec.get("privileged") else roles.get(ours, "privileged")
        return StepSpec(shape, "float32", role, _names(spec.get("names"), shape[0]))

    def _check(
        self, record: EpisodeRecord, columns: dict[str, str], steps: dict[str, StepSpec], cams: list[str]
    ) -> None:
        """Raise `SourceError` where an episode's files are missing or its numbers are not what the metadata say."""
        if record.length < 1:
            raise SourceError(
                f"{self.root}: episode {record.index} has {record.length} frames", expected="at least one"
            )
        table = self._table(record.data)
        rows = np.flatnonzero(table.episode == record.index)
        where = f"{self.root / record.data}, episode {record.index}"
        if len(rows) != record.length:
            raise SourceError(f"{where}: {len(rows)} rows", expected=f"{record.length}, as the metadata say")
        if rows[-1] - rows[0] + 1 != len(rows):
            raise SourceError(f"{where}: its rows are scattered", expected="consecutive rows")
        for ours, theirs in columns.items():
            values = table.columns[theirs][rows]
            if values[0].size != max(int(np.prod(steps[ours].shape)), 1):
                raise SourceError(f"{where}: {theirs} has width {values[0].size}", expected=f"{steps[ours].shape}")
            if ours in ("action", "state") and not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
                raise SourceError(f"{where}, frame {row}: {theirs} is not finite", expected="numbers", fix="--skip-bad")
        if "timestamp" in columns and (np.diff(table.columns[columns["timestamp"]][rows].ravel()) <= 0).any():
            raise SourceError(
                f"{where}: timestamps do not increase", expected="increasing timestamps", fix="--skip-bad"
            )
        for camera in cams:
            if camera in record.clips and not inside(self.root, record.clips[camera].path).is_file():
                raise self._missing_video(record, camera)

    def _missing_video(self, record: EpisodeRecord, camera: str) -> SourceError:
        path = record.clips[camera].path
        first = path.split("/")[0]
        other = sorted(p.name for p in self.root.iterdir() if p.is_dir() and nearest(p.name, [first])) if first else []
        fix = f"mv {self.root / other[0]} {self.root / first}" if other and other[0] != first else "--skip-bad"
        return SourceError(f"{self.root / path} is missing", expected=f"the video of episode {record.index}", fix=fix)

    def _table(self, path: str) -> _Table:
        with self._lock:
            table = self._tables.get(path)
            if table is None:
                theirs = sorted(set(self._columns(self._layout).values()))
                read = read_columns(inside(self.root, path), ["episode_index", *theirs])
                columns = {name: self._to_numpy(read.column(name), path, name) for name in theirs}
                episode = read.column("episode_index").to_numpy().astype(np.int64)
                table = self._tables[path] = _Table(columns, episode)
                if len(self._tables) > CACHED_FILES:
                    self._tables.popitem(last=False)
            return table

    def _to_numpy(self, column: Any, path: str, name: str) -> NDArray[Any]:
        """Turn a column of numbers or of equally long lists into an array [rows, D] (float) or [rows] (integers)."""
        array = column.combine_chunks()
        kind = array.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return np.asarray(array.to_numpy(zero_copy_only=False))
        if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
            flat = array.flatten().to_numpy(zero_copy_only=False)
            if array.null_count == 0 and len(array) and len(flat) % len(array) == 0:
                lengths = (
                    {len(flat) // len(array)}
                    if pa.types.is_fixed_size_list(kind)
                    else set(array.value_lengths().to_pylist())
                )
                if len(lengths) == 1:
                    return np.asarray(flat).reshape(len(array), -1)
        raise SourceError(f"{self.root / path}: column {name} is {kind}", expected="numbers, or lists of one length")

    def _view(self, record: EpisodeRecord, camera: str, start: int, stop: int) -> Iterator[Image]:
        clip = record.clips.get(camera)
        if clip is not None:
            return read_clip(inside(self.root, clip.path), clip.start, self._layout.fps, start, stop)
        return self._stored_pictures(record, camera, start, stop)

    def _stored_pictures(self, record: EpisodeRecord, camera: str, start: int, stop: int) -> Iterator[Image]:
        """Yield pictures kept in the parquet file, reading only the row groups that hold them."""
        file = inside(self.root, record.data)
        first = int(np.flatnonzero(self._table(record.data).episode == record.index)[0])
        reader = pq.ParquetFile(file)
        if camera not in reader.schema_arrow.names:
            raise SourceError(
                f"{file} has no column {camera}", expected=f"one of {', '.join(reader.schema_arrow.names)}"
            )
        begin = 0
        for group in range(reader.num_row_groups):
            rows = reader.metadata.row_group(group).num_rows
            low, high = max(first + start - begin, 0), min(first + stop - begin, rows)
            if low < high:
                for number, cell in enumerate(reader.read_row_group(group, [camera]).column(0)[low:high], begin + low):
                    where = f"{file}, episode {record.index}, frame {number - first}, {camera}"
                    yield self._picture(cell.as_py(), where)
            begin += rows

    def _picture(self, cell: Any, where: str) -> Image:
        if isinstance(cell, dict) and cell.get("bytes"):
            return decode_picture(cell["bytes"], where)
        if isinstance(cell, dict) and cell.get("path"):
            file = inside(self.root, str(cell["path"]))
            if file.is_file():
                return decode_picture(file.read_bytes(), str(file))
        raise SourceError(f"{where} holds no picture", expected="a struct of bytes and path")

    def _channels_first(self, camera: str) -> tuple[int, int] | None:
        shape = self._layout.features[camera]["shape"]
        return (int(shape[1]), int(shape[2])) if len(shape) == 3 and shape[0] in (1, 3) else None

    def _files(self) -> set[str]:
        index, records = self._index()
        cameras = {index.mapping[camera] for camera in index.cameras}
        files = {*self._layout.files, *(record.data for record in records)}
        return files | {record.clips[cam].path for record in records for cam in cameras if cam in record.clips}


def _episode_id(record: EpisodeRecord) -> str:
    return f"episode_{record.index:06d}"


def _names(names: Any, width: int) -> tuple[str, ...]:
    """Return component names where there is one for each; data sets nest them under "motors" and the like, or not."""
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    fits = isinstance(names, list) and len(names) == width and all(isinstance(name, str) for name in names)
    return tuple(names) if fits else ()


def _list(layout: Layout) -> str:
    return f"one of {', '.join(layout.features)}"
