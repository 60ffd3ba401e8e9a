"""Stage 1: decode -> preprocess -> encode -> commit, unit by unit, the stages overlapped by bounded queues.

One thread decodes and preprocesses batches ahead, the calling thread runs the network, one thread writes and commits.
Batches never cross a unit and every unit is computed from nothing but its own rows, so a resumed run computes the
same batches as an uninterrupted one, and its files are equal byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.featurize.augment import NO_COPIES, AugmentConfig
from vla.featurize.backbones.base import Backbone, naming
from vla.featurize.decode import Batch, Decoder, StageClock
from vla.featurize.sources.base import Source
from vla.stores.background import iterate_ahead
from vla.stores.manifest import copy_name
from vla.stores.tables import EpisodeTable
from vla.stores.unit_buffer import UnitBuffer
from vla.stores.writer import StoreWriter

AHEAD = 2
"""Batches waiting for the network: enough to hide decoding, too few to hoard memory."""

Progress = Callable[[int, int], None]
Features = list[dict[str, torch.Tensor]]
"""What the network made of the parts of a batch, on its device."""


@dataclass
class RunReport:
    """What a run did. `frames` are those it committed, without those of `skipped` episodes in the units that leave them
    out. `busy` holds each stage's share of the wall time (stages overlap: shares may sum above 1)."""

    frames: int = 0
    units: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def frames_per_s(self) -> float:
        """Time steps a second, all views counted as one."""
        return self.frames / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that was busy most."""
        return max(self.busy, key=lambda stage: self.busy[stage]) if self.busy else "none"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**self.__dict__, "frames_per_s": self.frames_per_s, "bottleneck": self.bottleneck}


def featurize(
    source: Source,
    backbone: Backbone,
    writer: StoreWriter,
    episodes: EpisodeTable,
    *,
    batch_size: int = 16,
    skip_bad: bool = False,
    pin: bool = False,
    augment: AugmentConfig = NO_COPIES,
    units: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> RunReport:
    """Compute and commit every pending unit of a store, or those of `units` that are pending.

    Of a `SharedWriter` those that it can claim when their turn comes: the others are somebody else's.
    `batch_size` counts time steps; `augment` is what the store was planned with, and each of its copies of a frame is a
    time step more; `pin` keeps batches in page-locked memory, for an accelerator. With `skip_bad`, an episode whose
    frames or steps cannot be read is left out and named in the commit; without it the run ends with the `SourceError`.
    A `RuntimeError` of the backbone, such as memory running out, is a `DataError` that names the unit. Units
    committed so far stay committed whatever happens. `progress` is called with frames done and frames in all.
    """
    report, clock, encoded = RunReport(), StageClock(), 0
    pending = writer.pending() if units is None else list(units)
    total = sum(len(writer.manifest.unit_range(unit)) for unit in pending)
    how: Any = {"batch_size": batch_size, "skip_bad": skip_bad, "augment": augment, "clock": clock, "pin": pin}
    decoder = Decoder(source, backbone, writer.begin, episodes, **how)
    mine = (unit for unit in pending if writer.claim(unit))
    began = time.perf_counter()
    ahead = closing(iterate_ahead(decoder.batches(mine), AHEAD))

    def take(batch: Batch, features: Features) -> None:
        nonlocal encoded
        # Where the device works, this is where its work is waited for, and its errors show.
        with clock.busy("encode"), naming(f"unit {batch.buffer.unit}"):
            arrays = _by_copy(features, augment.copies)
        with clock.busy("copy"):
            batch.buffer.put(batch.row, arrays)
        encoded += batch.frames
        progress(encoded, total)

    with ThreadPoolExecutor(1, thread_name_prefix="vla-commit") as committer, ahead as batches:
        committing: Future[None] | None = None
        awaited: tuple[Batch, Features] | None = None
        for batch in batches:
            features: Features = []
            if batch.images is not None:  # begun before the last one is waited for: a device never idles in between
                with clock.busy("encode"), naming(f"unit {batch.buffer.unit}"):
                    features = _encode(backbone, batch.images, batch_size)
            if awaited is not None:
                take(*awaited)
            awaited = (batch, features) if batch.images is not None else None
            if batch.images is not None:
                continue
            if committing is not None:  # one unit in flight: a failed commit ends the run before the next
                committing.result()
            committing = committer.submit(_commit, writer, batch.buffer, clock)
            report.skipped |= batch.buffer.skipped
            report.units += 1
            report.frames += int(batch.buffer.kept.sum())
        if committing is not None:
            committing.result()
    report.seconds = time.perf_counter() - began
    report.busy = {stage: seconds / max(report.seconds, 1e-9) for stage, seconds in clock.seconds.items()}
    return report


def _encode(backbone: Backbone, images: torch.Tensor, batch_size: int) -> Features:
    """Run the network; one frame with its copies may be more time steps than it is to be given at once."""
    return [backbone.encode(images[at : at + batch_size]) for at in range(0, len(images), batch_size)]


def _by_copy(parts: Features, copies: int) -> dict[str, NDArray[Any]]:
    """Return every array of the store, [frames, V, *shape], of frames with their copies behind them."""
    arrays = {name: np.concatenate([part[name].cpu().numpy() for part in parts]) for name in parts[0]}
    by_copy = {name: values.reshape(-1, copies + 1, *values.shape[1:]) for name, values in arrays.items()}
    return {copy_name(name, copy): values[:, copy] for name, values in by_copy.items() for copy in range(copies + 1)}


def _commit(writer: StoreWriter, buffer: UnitBuffer, clock: StageClock) -> None:
    with clock.busy("write"):
        writer.commit(buffer)
