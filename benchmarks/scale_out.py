"""Featurizing with two workers against one process, the cost of handing out a unit, and whether planning stays linear.

`two_workers_vs_one`: EfficientNet-Lite0 over made-up pictures, one torch thread a process, the cluster and the networks
warm: frames per second of two workers over those of one process that is kept on one core (its threads for decoding and
writing would take the other), in alternating rounds. On two cores nothing else may run.
`overhead_ms_per_unit`: units of one frame of the toy backbone on one worker, less what they take in this process; and
its share of the time in which one process makes a unit of 50 MB of EfficientNet's grid. `linear`: planning and
committing made-up features of 16 bytes a frame in memory: microseconds a frame at growing numbers of frames.
`time_left_error`: how far off the time left was that a tenth of one run foretold. `statistics_s`: opening a store of
10,000 units and merging its statistics from the commits.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from vla.featurize.cluster import open_cluster
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.spread import make_on_cluster
from vla.featurize.units import open_unit_maker
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

UNIT_BYTES = 50 << 20
UNIT = 24
"""Frames: 32 units for two workers, so that one does not wait long for the other at the end."""


def two_workers(folder: Path, frames: int, rounds: int) -> dict[str, Any]:
    """Compare two workers with one process, and tell how long one process takes for 50 MB."""
    source = f"synthetic:episodes={frames // UNIT},length=[{UNIT},{UNIT}],cameras=1,image_size=128"
    values = {"source": source, "backbone": "efficientnet", "threads": 1, "store": {"unit_rows": UNIT}}
    config, names = FeaturizeConfig.build(values), map(str, itertools.count())
    job = prepare(config)
    manifest = job.plan.manifest
    units = list(range(manifest.units))
    rows = {unit: len(manifest.unit_range(unit)) for unit in units}
    with open_cluster(2, None) as client:

        def together() -> None:
            report = make_on_cluster(client, job, folder / next(names), units, rows)
            assert report.run.frames == manifest.rows, report

        errors: list[float] = []

        def alone() -> None:
            seen, cores = [(time.perf_counter(), 0)], os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})
            run(job, folder / next(names), progress=lambda done, total: seen.append((time.perf_counter(), done)))
            os.sched_setaffinity(0, cores)
            (began, _), tenth, (ended, frames) = seen[1], next(s for s in seen if s[1] * 10 >= seen[-1][1]), seen[-1]
            foretold = (tenth[0] - began) / max(tenth[1] - seen[1][1], 1) * (frames - tenth[1])
            errors.append(abs(foretold / (ended - tenth[0]) - 1))

        times = measure.interleave({"together": together, "alone": alone}, rounds)
    seconds = statistics.median(times["alone"]) / (manifest.rows * manifest.row_bytes) * UNIT_BYTES
    return {"two_workers_vs_one": measure.ratio(times, "together", "alone"), "seconds_of_a_50_mb_unit": seconds} | {
        "time_left_error": {"median": statistics.median(errors), "max": max(errors)}
    }


def overhead(folder: Path, count: int) -> float:
    """Return seconds that handing out one unit costs, over making it."""
    values = {"source": f"synthetic:episodes={count},length=[1,1]", "backbone": "toy", "store": {"unit_rows": 1}}
    config = FeaturizeConfig.build(values)
    job = prepare(config)
    units = list(range(count))
    with open_unit_maker(job, folder / "here") as maker:
        began = time.perf_counter()
        for unit in units:
            maker.make([unit])
        here = time.perf_counter() - began
    with open_cluster(1, None) as client:
        make_on_cluster(client, job, folder / "there", [0], {0: 1})  # the worker is warm
        began = time.perf_counter()
        make_on_cluster(client, job, folder / "there", units[1:], dict.fromkeys(units, 1))
        there = time.perf_counter() - began
    return (there - here) / count


def commit(folder: Path, frames: int, unit_rows: int = 1024) -> float:
    """Return seconds to plan, open and commit a store of `frames` rows, 100 an episode."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    episodes = EpisodeTable.plan(
        [f"e{i}" for i in range(frames // 100)], [100] * (frames // 100), ["t"] * (frames // 100)
    )
    manifest = Manifest(
        rows=frames,
        unit_rows=unit_rows,
        fps=10,
        cameras=("top",),
        features={"tiny": FeatureInfo(shape=(1, 8), dims=("view", "channel"), dtype="float16")},
        steps={"action": StepInfo(shape=(2,), dtype="float32", role="action")},
        fingerprint={"made": "up"},
        tables={},
        provenance={},
    )
    with open_writer(folder, manifest, episodes) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            buffer.steps["action"][:] = 0
            buffer.put(buffer.rows.start, {"tiny": np.ones((len(buffer.rows), 1, 8), np.float32)})
            writer.commit(buffer)
    return time.perf_counter() - began


def consolidate(folder: Path, units: int) -> float:
    """Return seconds to open a store of so many units and to merge its statistics."""
    commit(folder, units * 10, unit_rows=10)
    began = time.perf_counter()
    store = open_store(folder)
    store.statistics("tiny")
    return time.perf_counter() - began


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__)
    torch.set_num_threads(1)
    sizes = (10_000, 30_000) if options.quick else (10_000, 100_000, 1_000_000)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        folder = Path(place)
        figures = two_workers(folder, *((128, 1) if options.quick else (768, 5)))
        per_unit = overhead(folder, 40 if options.quick else 400)
        figures["overhead_ms_per_unit"] = per_unit * 1e3
        figures["overhead_share_of_a_50_mb_unit"] = per_unit / figures["seconds_of_a_50_mb_unit"]
        linear = {frames: commit(folder / "plan", frames) / frames * 1e6 for frames in sizes}
        figures["statistics_s"] = consolidate(folder / "plan", 1000 if options.quick else 10_000)
        figures["linear_us_per_frame"] = {str(frames): value for frames, value in linear.items()}
    measure.report(figures, as_json=options.json)


if __name__ == "__main__":
    main()
