"""How long a run will take, from three batches of one unit."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vla.featurize.backbones.base import naming
from vla.featurize.batch_size import ON_CPU
from vla.featurize.decode import Decoder, StageClock
from vla.featurize.job import Job, take_device
from vla.stores.unit_buffer import unit_buffer

PATIENCE = 10.0
"""Seconds that a probe may take before it makes do with what it has."""


@dataclass(frozen=True)
class Estimate:
    """Seconds a frame of each stage, one process."""

    stages: dict[str, float]

    @property
    def seconds_per_frame(self) -> float:
        """The pace of one process: decoding, network and writing overlap, so the slowest of them."""
        return max(self.stages.values(), default=0.0)

    def hours(self, frames: int, processes: int = 1) -> float:
        """Hours for `frames` on `processes` that do not get in each other's way."""
        return frames * self.seconds_per_frame / processes / 3600


def probe(job: Job, unit: int) -> Estimate:
    """Decode, preprocess and encode three batches of a unit, and forget them.

    The first warms up and is not counted. Where one frame alone takes seconds, the batches are of one frame. Raises
    what reading them raises; a bad episode that --skip-bad would leave out is left out.
    """
    config = job.config
    take_device(job)
    clock, encode_seconds, frames = StageClock(), 0.0, 0
    size = ON_CPU if config.batch_size == "auto" else config.batch_size
    decoder = Decoder(
        job.source,
        job.backbone,
        lambda number: unit_buffer(job.plan.manifest, number),
        job.plan.episodes,
        batch_size=size,
        skip_bad=config.skip_bad,
        augment=config.augment,
        clock=clock,
    )
    began, decoded = time.perf_counter(), 0
    for number, batch in enumerate(decoder.batches([unit])):
        if batch.images is None or number == 3:
            break
        images = batch.images if number else batch.images[: config.augment.copies + 1]
        started = time.perf_counter()
        with naming(f"unit {unit}"):
            for values in job.backbone.encode(images).values():
                values.cpu()  # a device is only waited for here
        spent = time.perf_counter() - started
        decoded += batch.frames
        slow = spent * batch.frames > PATIENCE
        if number or slow:
            encode_seconds, frames = encode_seconds + spent, frames + (batch.frames if number else 1)
        if slow or time.perf_counter() - began > PATIENCE:
            break
    reading = clock.seconds["decode"] + clock.seconds["preprocess"] + clock.seconds["augment"]
    return Estimate({"decode": reading / max(decoded, 1), "encode": encode_seconds / max(frames, 1)})
