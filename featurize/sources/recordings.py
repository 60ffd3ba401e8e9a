"""What sources made of one folder an episode share: indexing with `skip_bad`, one shape for all, digest, frames."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, NoEpisodeError, SourceIndex, StepSpec, no_pictures
from vla.featurize.sources.camera_files import CameraFiles
from vla.featurize.sources.episode_checks import OTHER_CAMERA, SKIP
from vla.featurize.sources.files import digest_files
from vla.featurize.sources.usual_shape import keep_usual
from vla.stores.errors import SourceError, UsageError

CLOCK = {"timestamp": StepSpec((), "float64", "other"), "frame_index": StepSpec((), "int64", "other")}


@dataclass(frozen=True)
class Recording:
    """One episode that was looked at. `steps` reads its numbers again, {name: [length, *shape]}, checked and finite.

    `files` are those it is made of besides its pictures, relative to the root.
    """

    task: str
    length: int
    views: Mapping[str, CameraFiles]
    specs: Mapping[str, StepSpec]
    steps: Callable[[], dict[str, NDArray[np.generic]]]
    files: tuple[str, ...]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[tuple[tuple[str, tuple[int, int]], ...], tuple[tuple[str, StepSpec], ...]]:
        """What all episodes of a source share: cameras with their sizes, steps with their shapes."""
        return tuple((name, view.size) for name, view in self.views.items()), tuple(sorted(self.specs.items()))


Found = Mapping[str, Callable[[], Recording | str]]
"""{episode id: look at it}; looking raises `SourceError` where files are missing or numbers are wrong, and returns the
reason where an option leaves the episode out."""


class RecordedSource(ABC):
    """Base of sources whose episodes are files of their own. `timestamp` and `frame_index` are added to the steps."""

    kind: ClassVar[str]

    def __init__(self, root: Path | str, *, fps: float | None, cameras: Sequence[str] | None, skip_bad: bool) -> None:
        if fps is None:
            found = f"{root}: no file of {self.kind} states its frames a second"
            raise UsageError(found, expected="the rate of the recording", fix="--set source_options.fps=20")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < np.inf:
            raise UsageError(f"fps = {fps!r}", expected="frames per second, above 0")
        if cameras is not None and (isinstance(cameras, str) or len(set(cameras)) != len(cameras)):
            raise UsageError(f"cameras = {cameras!r}", expected='distinct names, such as ["front","wrist"]')
        self.root = Path(root).resolve()
        self.fps, self._skip_bad = float(fps), skip_bad
        self.cameras = None if cameras is None else list(cameras)
        self._lock = threading.Lock()
        self._index: SourceIndex | None = None
        self._recordings: list[Recording] = []
        self._digest: str | None = None

    @abstractmethod
    def find(self) -> Found:
        """Return the episodes in natural order of their ids. Raises `SourceError` where there is none."""

    def mapping(self) -> dict[str, str]:
        """Return the choices that the numbers depend on; they enter the fingerprint."""
        return {}

    def assumed(self) -> dict[str, str]:
        """Return what no file states and no option gives, {option: value and where it is from}."""
        return {}

    def files(self) -> tuple[str, ...]:
        """Return the files that belong to no single episode, relative to the root; they enter the digest."""
        return ()

    def index(self) -> SourceIndex:
        """See `Source.index`. Every number is read and checked; of each camera's pictures the first is decoded."""
        with self._lock:
            if self._index is None:
                self._index = self._read_index()
            return self._index

    def digest(self) -> str:
        """See `Source.digest`."""
        self.index()
        with self._lock:
            if self._digest is None:
                names = set(self.files())
                for recording in self._recordings:
                    names.update(recording.files, *(view.files for view in recording.views.values()))
                self._digest = digest_files(self.root, names)
            return self._digest

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        self.index()
        recording = self._recordings[episode]
        frames = np.arange(recording.length, dtype=np.int64)
        return {**recording.steps(), "timestamp": frames / self.fps, "frame_index": frames}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """See `Source.frames`. Each call opens the files for itself."""
        index = self.index()
        recording = self._recordings[episode]
        if not 0 <= start <= stop <= recording.length:
            where = f"{index.episodes[episode].id} in {self.root}"
            raise SourceError(f"frames {start} to {stop} of {where}", expected=f"0 to {recording.length}")
        if start == stop:
            return iter(())
        if not recording.views:
            raise no_pictures(f"{index.episodes[episode].id} in {self.root}")
        return zip(*(view.read(start, stop) for view in recording.views.values()), strict=True)

    def _read_index(self) -> SourceIndex:
        found: dict[str, Recording] = {}
        skipped: dict[str, str] = {}
        filtered: set[str] = set()
        for name, look in self.find().items():
            try:
                recording = look()
                if isinstance(recording, str):
                    skipped[name] = recording
                    filtered.add(name)
                else:
                    found[name] = recording
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[name] = str(error)
        if not found:
            raise NoEpisodeError(f"no episode of {self.root} is left", skipped)

        def differs(name: str, model: str) -> SourceError:
            return _other_shape(self.root / name, found[name], found[model], model)

        model = keep_usual(found, lambda recording: recording.shape, differs, skipped, skip_bad=self._skip_bad)
        self._recordings = list(found.values())
        return SourceIndex(
            kind=self.kind,
            root=str(self.root),
            fps=self.fps,
            cameras=tuple(found[model].views),
            episodes=tuple(Episode(name, r.length, r.task, dict(r.texts)) for name, r in found.items()),
            steps={**found[model].specs, **CLOCK},
            mapping=self.mapping(),
            skipped=skipped,
            filtered=frozenset(filtered),
            pictures=bool(found[model].views),
            assumed=self.assumed(),
        )


def choose_cameras(there: Mapping[str, Path], wanted: Sequence[str] | None, where: str) -> dict[str, Path]:
    """Return {camera: folder}, those wanted in their order, or all (None). [] is none: numbers without pictures.

    Raises `SourceError` naming one that is missing.
    """
    if not there and wanted != []:
        raise SourceError(f"{where} has no camera", expected="a folder of .jpg or .png for each", fix=SKIP)
    if wanted is None:
        return dict(there)
    for name in wanted:
        if name not in there:
            raise SourceError(f"{where} has no camera {name!r}; it has {', '.join(there)}", fix=OTHER_CAMERA)
    return {name: there[name] for name in wanted}


def require_lengths(counts: Mapping[str, int], where: str, fix: str = SKIP) -> int:
    """Return the one length of all parts of an episode, {part: frames}. Raises `SourceError` naming them otherwise."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{part} has {count}" for part, count in counts.items())
        raise SourceError(f"{where}: {listed}", expected="one frame for each step", fix=fix)
    return next(iter(counts.values()))


def _other_shape(where: Path, found: Recording, model: Recording, name: str) -> SourceError:
    """Say how an episode differs from most others."""
    if list(found.views) != list(model.views):
        mine, theirs = (", ".join(recording.views) for recording in (found, model))
        return SourceError(f"{where} has cameras {mine}", expected=f"{theirs}, as {name}", fix=OTHER_CAMERA)
    for camera, view in found.views.items():
        (height, width), usual = view.size, model.views[camera].size
        if view.size != usual:
            pixels = f"{where}, camera {camera} has {width} x {height} pixels"
            return SourceError(pixels, expected=f"{usual[1]} x {usual[0]}, as {name}", fix=SKIP)
    mine, theirs = (
        ", ".join(f"{step} {list(spec.shape)}" for step, spec in sorted(recording.specs.items()))
        for recording in (found, model)
    )
    return SourceError(f"{where} has {mine}", expected=f"{theirs}, as {name}", fix=SKIP)
