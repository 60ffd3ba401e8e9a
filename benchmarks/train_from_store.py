"""Training from the store against training from tensors held in memory: the same head, batches and loop.

`data_wait_share`: of the time of training from the store, how much was spent waiting for a batch, as the training log
prints it. The contestant in memory holds every window's features as one tensor and gathers batches from it with torch.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import numpy as np
import torch
from demonstrations import store_of

from vla.heads.batch import Batch
from vla.heads.checkpoint import build_head
from vla.heads.data import DataConfig, HeadData, TensorBatches, open_data
from vla.heads.model import HeadModel
from vla.training.loop import seed_everything

BATCH = 64


def in_memory(batches: TensorBatches, data: HeadData) -> Iterator[Batch]:
    """Yield the same batches from tensors held in memory."""
    index = batches.batches.index
    rows = np.arange(data.stores.first.manifest.rows)
    features = {name: torch.from_numpy(data.stores.stores[0].read(name, rows)) for name in data.features}
    state = torch.from_numpy(data.stores.first.steps("state").astype(np.float32))
    action = torch.from_numpy(data.stores.first.steps("action").astype(np.float32))
    for number in itertools.count():
        chosen = index.rows(batches.batches.windows_of_batch(0, number))
        obs, act = torch.from_numpy(chosen.obs), torch.from_numpy(chosen.action)
        yield Batch(
            features={name: values[obs] for name, values in features.items()},
            state=state[obs],
            task=torch.from_numpy(chosen.task),
            obs_valid=torch.from_numpy(chosen.obs_valid),
            action=action[act],
            action_valid=torch.from_numpy(chosen.action_valid),
        )


class Timed:
    """A stream that sums the seconds spent waiting for it."""

    def __init__(self, stream: Iterator[Batch]) -> None:
        self.waited, self._stream = 0.0, stream

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._stream)
        self.waited += time.perf_counter() - began
        return batch


def run_steps(model: HeadModel, optimizer: torch.optim.Optimizer, stream: Iterator[Batch], steps: int) -> float:
    """Run optimiser steps; return seconds."""
    began = time.perf_counter()
    for _ in range(steps):
        loss, _ = model.loss(next(stream))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__)
    steps, rounds = (20, 5) if options.quick else (100, 7)
    torch.set_num_threads(1)
    root = store_of("toy", "toy-14x14x112", grid=14, channels=112) if options.quick else store_of("efficientnet")
    data = open_data(DataConfig(stores=(str(root),)))
    seed_everything(0)
    model = build_head("fm", {}, data.io)
    model.prepare(data)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=False)
    batches = data.batches(data.training, model.config.window, BATCH, pin=False)
    store = Timed(batches.shuffled(0))
    streams: dict[str, Iterator[Batch]] = {"store": store, "memory": in_memory(batches, data)}
    for stream in streams.values():
        run_steps(model, optimizer, stream, 5)
    # One block per contestant and round, alternating who goes first.
    times: dict[str, list[float]] = {name: [] for name in streams}
    store.waited = 0.0
    for number in range(rounds):
        for name in sorted(streams, reverse=bool(number % 2)):
            times[name].append(run_steps(model, optimizer, streams[name], steps))
    ratios = [memory / store for store, memory in zip(times["store"], times["memory"], strict=True)]
    measure.report(
        {
            "share_of_ram_training": statistics.median(ratios),
            "share_range": [min(ratios), max(ratios)],
            "data_wait_share": store.waited / sum(times["store"]),
            "steps_per_s": {name: steps / statistics.median(values) for name, values in times.items()},
            "batch_bytes": sum(info.row_bytes for info in data.stores.first.manifest.features.values()) * BATCH,
            "store": Path(root).name,
            "rounds": rounds,
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
