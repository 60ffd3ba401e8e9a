"""What `featurize` adds to the network: its frames per second against the bare forward pass on the same frames.

Bare: preprocessed batches already in memory, the same batch size, threads and device. Featurize: decoding the video,
preprocessing, the network, checks, statistics, checksums, fsync and commit. EfficientNet-Lite0 to block 10 at 224 px.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
from demonstrations import PUSH

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.plan import StoreOptions, make_plan

BATCH = 16


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__)
    episodes, rounds = (4, 3) if options.quick else (16, 7)
    torch.set_num_threads(1)  # the second core is what featurize decodes on, and the bare pass must not gain from it
    job = prepare(FeaturizeConfig(source=str(PUSH), backbone="efficientnet", threads=1, batch_size=BATCH))
    index = job.source.index()
    part = dataclasses.replace(index, episodes=index.episodes[:episodes])
    recipe = {"name": "efficientnet", "weights": None, "options": {}}
    plan = make_plan(part, "benchmark", job.backbone.spec(), recipe, StoreOptions(unit_rows=128))
    job = dataclasses.replace(job, plan=plan)
    images = [
        torch.stack([job.backbone.preprocess(view) for view in views])
        for episode in range(episodes)
        for views in job.source.frames(episode, 0, index.episodes[episode].length)
    ]
    batches = [torch.stack(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    job.backbone.encode(batches[0])
    ratios, bare_fps, our_fps, busy = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            began = time.perf_counter()
            for batch in batches:
                job.backbone.encode(batch)
            bare = time.perf_counter() - began
            root = Path(folder) / "store"
            shutil.rmtree(root, ignore_errors=True)
            report = run(job, root)
            ratios.append(bare / report.seconds)
            bare_fps.append(len(images) / bare)
            our_fps.append(report.frames_per_s)
            busy.append(report.busy)
    measure.report(
        {
            "share_of_bare_forward": statistics.median(ratios),
            "share_range": [min(ratios), max(ratios)],
            "bare_frames_per_s": statistics.median(bare_fps),
            "featurize_frames_per_s": statistics.median(our_fps),
            "busy": busy[-1],
            "frames": len(images),
            "views": len(index.cameras),
            "rounds": rounds,
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
