"""An epoch of head training from the store against the same head with its frozen backbone in the loop.

Online reads the same frames as decoded pictures held in memory (so that the comparison is with the network alone, not
with video decoding), preprocesses and encodes every batch, then takes the same training step.
"""

from __future__ import annotations

import statistics
import time

import measure
import torch
from demonstrations import PUSH, store_of

from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.registry import open_source
from vla.heads.batch import Batch
from vla.heads.checkpoint import build_head
from vla.heads.data import DataConfig, open_data
from vla.training.loop import seed_everything

BATCH = 16


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__)
    steps, rounds = (2, 3) if options.quick else (6, 5)
    torch.set_num_threads(1)
    data = open_data(DataConfig(stores=(str(store_of("efficientnet")),)))
    manifest = data.stores.first.manifest
    backbone = rebuild_backbone(manifest.provenance["backbone"], manifest.fingerprint["backbone"])
    source = open_source(PUSH)
    pictures = [
        views
        for e in range(len(data.stores.first.episodes))
        for views in source.frames(e, 0, source.index().episodes[e].length)
    ]
    seed_everything(0)
    model = build_head("fm", {}, data.io)
    model.prepare(data)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = data.batches(data.training, model.config.window, BATCH, pin=False)
    stream = batches.shuffled(0)
    number = 0

    def step(batch: Batch) -> None:
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def cached() -> None:
        for _ in range(steps):
            step(next(stream))

    def online() -> None:
        nonlocal number
        for _ in range(steps):
            rows = batches.batches.index.rows(batches.batches.windows_of_batch(0, number)).obs
            number += 1
            images = torch.stack([torch.stack([backbone.preprocess(v) for v in pictures[row]]) for row in rows[:, -1]])
            features = {name: values[:, None] for name, values in backbone.encode(images).items()}
            template = next(stream)
            step(Batch(**{**template.__dict__, "features": features}))

    cached(), online()
    times: dict[str, list[float]] = {"cached": [], "online": []}
    for _ in range(rounds):
        for name, work in (("cached", cached), ("online", online)):
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    ratios = [online / cached for cached, online in zip(times["cached"], times["online"], strict=True)]
    per_step = {name: statistics.median(values) / steps for name, values in times.items()}
    epoch = len(batches.batches.index) / BATCH
    measure.report(
        {
            "online_over_cached": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "ms_per_step": {name: 1e3 * value for name, value in per_step.items()},
            "epoch_seconds": {name: value * epoch for name, value in per_step.items()},
            "batch_size": BATCH,
            "rounds": rounds,
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
