"""From rows of a unit to preprocessed batches: which frames, decoded, made ready for the network."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vla.featurize.augment import AugmentConfig, augmented
from vla.featurize.backbones.base import Backbone, naming
from vla.featurize.sources.base import Source
from vla.featurize.views import read_views
from vla.stores.errors import SourceError
from vla.stores.tables import EpisodeTable
from vla.stores.unit_buffer import UnitBuffer

RING = 5
"""Batch buffers: one being filled, two waiting (run.AHEAD), one in the network's hands, one whose features are awaited.
"""


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of one episode inside one unit; `row` is the store row of frame `start`."""

    episode: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class Batch:
    """Preprocessed `frames` for store rows from `row` on; without images it marks the end of the unit.

    `images` [B, V, 3, h, w], or [B, C + 1, V, 3, h, w] for a backbone with a context of C frames (see
    `Backbone.encode`). B is `frames`, or frames * (K + 1) with each frame's K augmented copies behind it. The memory of
    `images` is reused: it is valid until the next batch but one is asked for.
    """

    buffer: UnitBuffer
    row: int
    images: torch.Tensor | None = None
    frames: int = 0


class StageClock:
    """Seconds each stage of the pipeline was busy."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began


def segments(episodes: EpisodeTable, rows: range) -> Iterator[Segment]:
    """Yield the parts of episodes that lie in a unit's rows, in order."""
    first = int(np.searchsorted(episodes.row_start, rows.start, side="right")) - 1
    for episode in range(max(first, 0), len(episodes)):
        begin, length = int(episodes.row_start[episode]), int(episodes.length[episode])
        if begin >= rows.stop:
            return
        start, stop = max(rows.start - begin, 0), min(rows.stop - begin, length)
        if start < stop:
            yield Segment(episode, start, stop, begin + start)


class Decoder:
    """Decodes and preprocesses the frames of units, in batches that never cross a unit.

    `begin(unit)` gives the buffers of a unit.
    """

    def __init__(
        self,
        source: Source,
        backbone: Backbone,
        begin: Callable[[int], UnitBuffer],
        episodes: EpisodeTable,
        *,
        batch_size: int,
        skip_bad: bool,
        augment: AugmentConfig,
        clock: StageClock,
        pin: bool = False,
    ) -> None:
        self._source, self._backbone, self._begin, self._episodes = source, backbone, begin, episodes
        self._skip_bad, self._clock, self._augment, self._pin = skip_bad, clock, augment, pin
        self._slots = self._augment.copies + 1  # time steps that the network sees of a frame
        self._batch_frames = max(batch_size // self._slots, 1)
        self._cameras = source.index().cameras if self._augment.copies else ()
        self._spec = backbone.spec()
        self._ring: Iterator[torch.Tensor] | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32

    def batches(self, units: Iterable[int]) -> Iterator[Batch]:
        """Yield the batches of each unit, then one without images that ends the unit."""
        for unit in units:
            buffer = self._begin(unit)
            row, count, images = buffer.rows.start, 0, None
            for at, ready in self._frames(buffer):
                if images is not None and (at != row + count or count == self._batch_frames):
                    yield Batch(buffer, row, images[: count * self._slots], count)
                    images = None
                if images is None:
                    images, row, count = self._next_images(), at, 0
                slots = images[count * self._slots :][: self._slots].reshape(-1, *self._shape[1:])
                for place, tensor in zip(slots, ready, strict=True):
                    place.copy_(tensor)
                count += 1
            if images is not None:
                yield Batch(buffer, row, images[: count * self._slots], count)
            yield Batch(buffer, buffer.rows.stop)

    def _frames(self, buffer: UnitBuffer) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (store row, network inputs) of a unit, and fill its steps; leave bad episodes out where allowed."""
        for segment in segments(self._episodes, buffer.rows):
            try:
                yield from self._frames_of(buffer, segment)
            except SourceError as error:
                if not self._skip_bad:
                    raise
                rows = range(segment.row, segment.row + segment.stop - segment.start)
                buffer.leave_out(self._episodes.ids[segment.episode], rows, str(error))

    def _frames_of(self, buffer: UnitBuffer, segment: Segment) -> Iterator[tuple[int, list[torch.Tensor]]]:
        with self._clock.busy("decode"):
            self._fill_steps(buffer, segment)
        context = self._spec.context
        first = max(segment.start - context, 0)  # the past of a segment may lie in the unit before
        task = self._episodes.tasks[int(self._episodes.task[segment.episode])]
        frames = read_views(self._source, self._spec, segment.episode, task, first, segment.stop)
        past: deque[list[list[torch.Tensor]]] = deque(maxlen=context + 1)
        for frame in range(first, segment.stop):
            with self._clock.busy("decode"):
                views = next(frames, None)
            if views is None:
                raise SourceError(f"episode {self._episodes.ids[segment.episode]!r} has no frame {frame}")
            past.append([self._ready(views, segment), *self._copies(views, segment, frame)])
            if frame >= segment.start:
                window = [past[0]] * (context + 1 - len(past)) + list(past)
                of_copy = (seen[copy] for copy in range(self._slots) for seen in window)  # a copy's past is its own
                yield segment.row + frame - segment.start, list(itertools.chain(*of_copy))

    def _copies(self, views: tuple[Any, ...], segment: Segment, frame: int) -> Iterator[list[torch.Tensor]]:
        """Yield the network's input of each augmented copy of a time step."""
        copies = augmented(views, self._augment, self._episodes.ids[segment.episode], frame, self._cameras)
        for _ in range(self._augment.copies):
            with self._clock.busy("augment"):
                adjusted = next(copies)
            yield self._ready(adjusted, segment)

    def _ready(self, views: tuple[Any, ...], segment: Segment) -> list[torch.Tensor]:
        with self._clock.busy("preprocess"), naming(f"episode {self._episodes.ids[segment.episode]!r}"):
            ready = [self._backbone.preprocess(view) for view in views]
        self._require_shape(ready, segment)
        return ready

    def _fill_steps(self, buffer: UnitBuffer, segment: Segment) -> None:
        steps, name = self._source.steps(segment.episode), self._episodes.ids[segment.episode]
        if steps.keys() != buffer.steps.keys():
            raise SourceError(f"episode {name!r} has columns {sorted(steps)}", expected=f"{sorted(buffer.steps)}")
        first = segment.row - buffer.rows.start
        for column, values in steps.items():
            wanted = (int(self._episodes.length[segment.episode]), *buffer.steps[column].shape[1:])
            if values.shape != wanted:
                raise SourceError(f"episode {name!r} has {column!r} of shape {values.shape}", expected=f"{wanted}")
            part = values[segment.start : segment.stop]
            buffer.steps[column][first : first + len(part)] = part

    def _require_shape(self, ready: list[torch.Tensor], segment: Segment) -> None:
        shapes = {tuple(tensor.shape) for tensor in ready}
        shape = (len(ready), *ready[0].shape)
        if not self._shape:
            model = self._first_readable() or ready
            self._shape, self._dtype = (len(model), *model[0].shape), model[0].dtype
        if len(shapes) > 1 or shape != self._shape:
            raise SourceError(
                f"episode {self._episodes.ids[segment.episode]!r} makes a network input of {len(ready)} x "
                f"{' and '.join(map(str, sorted(shapes)))}",
                expected=f"{self._shape[0]} x {self._shape[1:]} as the first episode",
                fix="--skip-bad leaves the episode out",
            )

    def _first_readable(self) -> list[torch.Tensor] | None:
        """Return the network's input of the source's first frame that reads and whose views are of one shape.

        It decides for all: a run that begins with another unit, or makes a few of them, leaves out the same episodes.
        """
        for episode in range(len(self._episodes)):
            task = self._episodes.tasks[int(self._episodes.task[episode])]
            try:
                views = next(read_views(self._source, self._spec, episode, task, 0, 1), ())
            except SourceError:
                continue  # this episode's own segments say what is wrong with it
            ready = [self._backbone.preprocess(view) for view in views]
            if len({tuple(tensor.shape) for tensor in ready}) == 1:
                return ready
        return None

    def _next_images(self) -> torch.Tensor:
        if self._ring is None:
            # Reused memory: the first touch of a fresh page costs more than filling it again.
            context = (self._spec.context + 1,) if self._spec.context else ()
            shape = (self._batch_frames * self._slots, *context, *self._shape)
            # Pinned, a batch travels to the device while the one before it is computed.
            ring = [torch.empty(shape, dtype=self._dtype, pin_memory=self._pin) for _ in range(RING)]
            self._ring = itertools.cycle(ring)
        return next(self._ring)
