"""Every head of the registry: training steps a second from a store, latency of a decision, memory; samplers' errors.

A head without needs trains on a 14x14x112 grid of the toy backbone. One with needs gets the features it names from the
backbones it names, with random weights, of a few synthetic episodes: a new head comes in by itself. What a machine
lacks for a head is told in its place. Each head runs in a process of its own, so that its peak of memory is its own.

The table of samplers: `fm` and `dp` trained on the shipped push-v3 demonstrations (EfficientNet grid, a tenth of the
episodes held out; `--quick`: the toy grid, few steps), then sampled on the held-out episodes in few steps and in many.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from demonstrations import KEPT, store_of

from vla.featurize.backbones.registry import load_backbone_class
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import build_head, load_head
from vla.heads.compatibility import requirements
from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.evaluate import evaluate_head
from vla.heads.model import HeadModel
from vla.heads.registry import HEADS, head_class
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.errors import VlaError
from vla.training.config import TrainConfig
from vla.training.loop import seed_everything

BATCH = 64
SOURCE = "synthetic:episodes=4,length=[24,32],cameras=1,depth=true"
MODELS: dict[str, dict[str, Any]] = {
    "dp": {"dp, net=mlp": {"net": "mlp"}, "dp, down_dims=[64,128,256]": {"down_dims": [64, 128, 256]}, "dp": {}},
    "hier": {"hier, mode=expert": {"mode": "expert"}},
    "pi0": {"pi0, tiny random networks": {"weights": "random"}},
    "pi05": {"pi05, tiny random networks": {"weights": "random"}},
    "spatial": {"spatial, width=128": {"width": 128}, "spatial": {}},
}
"""Settings in which a head is measured, where there is more than its defaults; `--quick` takes the first."""

PATIENCE_S = 60
"""Seconds of training after which the steps so far are enough, of which three at least are measured."""

SAMPLING_STEPS = (1, 2, 4, 10, 16)
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "fm": [{"sampler": kind, "sample_steps": steps} for kind in ("euler", "heun") for steps in (1, 2, 4, 5, 10)],
    "dp": [{"sampler": "ddim", "sample_steps": steps} for steps in (2, 4, 8, 10, 16)]
    + [{"sampler": "ddpm", "sample_steps": 100}],
}
SEEDS = 3
"""Of the sampler's noise: the spread between them is what a difference between samplers has to exceed."""

SMALL: dict[str, Any] = {"n_obs": 1, "horizon": 8, "n_action": 2, "encoder": {"noise": 0.2}}
"""Of the heads whose samplers are compared; the settings of rollout_success.py."""


def stores_for(head: str, folder: Path) -> tuple[str, ...]:
    """Return stores that a head can train on. Raises `VlaError` where this machine lacks what they are made with."""
    needs = requirements(head)
    if not needs:
        return (str(store_of("toy", "toy-14x14x112", grid=14, channels=112)),)
    made = {}
    for need in needs:
        given: dict[str, Any] = {"options": {"embedding": "table"}} if need.embeddings else {}
        if "weights" in load_backbone_class(need.backbone).settings_type.model_fields:
            given["weights"] = "random"
        root = folder / need.backbone
        if need.backbone not in made:
            run(prepare(FeaturizeConfig.build({"source": SOURCE, "backbone": need.backbone, **given})), root)
        made[need.backbone] = str(root)
    return tuple(made.values())


def measure_head(head: str, model: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Measure one head in this process; or say what it lacks."""
    torch.set_num_threads(1)
    before = _peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = DataConfig(stores=stores_for(head, Path(folder)), random_weights=True)
            data = open_data(config)
            seed_everything(0)
            built = build_head(head, model, data.io)
            built.prepare(data)
        except (VlaError, ImportError) as error:
            return {"left_out": str(error)}
        figures: dict[str, Any] = {"features": list(built.reads), "parameters": built.parameter_counts()}
        figures |= _training(built, data, 5 if quick else 30)
        figures["peak_mb"] = _peak_mb() - before
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            figures[f"latency_{device}_ms"] = _latencies(built, data, device, 10 if quick else 50)
    return figures


def _training(model: HeadModel, data: HeadData, steps: int) -> dict[str, Any]:
    """Train a few steps, measure all but three; return steps a second, and on a GPU the memory at its peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    groups = model.param_groups(1e-4) or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    batches = data.batches(data.training, model.config.window, BATCH, pin=False, reads=model.reads).shuffled(0)
    times: list[float] = []
    while len(times) < steps + 3 and (sum(times) < PATIENCE_S or len(times) < 6):
        began = time.perf_counter()
        loss, _ = model.loss(next(batches).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    figures = {"train_steps_per_s": 1 / float(np.median(times[3:])), "batch": BATCH, "trained_on": device.type}
    if device.type == "cuda":
        figures["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def _latencies(model: HeadModel, data: HeadData, device: str, count: int) -> dict[str, dict[str, float]]:
    """Return the p50 and p95 of one decision, by the number of sampling steps, of heads that sample."""
    model.to(device).eval()
    window = next(data.batches(data.training, model.config.window, 1, pin=False, reads=model.reads).in_order())
    batch, kept = window.to(device), model.config
    if "sample_steps" not in type(kept).model_fields:
        return {"one pass": _percentiles(lambda: model.act(batch), device, count)}
    found = {}
    for steps in SAMPLING_STEPS:
        model.config = kept.model_copy(update={"sample_steps": steps})
        found[str(steps)] = _percentiles(lambda: model.act(batch), device, count)
    model.config = kept
    return found


def _percentiles(act: Callable[[], Any], device: str, count: int) -> dict[str, float]:
    times = []
    for _ in range(count + 2):
        began = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return {"p50": float(np.percentile(times[2:], 50)), "p95": float(np.percentile(times[2:], 95))}


def _peak_mb() -> float:
    """Return the largest memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def samplers(head: str, store: Path, steps: int) -> list[dict[str, Any]]:
    """Train a head, and return its action error on held-out episodes for each sampler, mean and spread over seeds."""
    torch.set_num_threads(1)
    run_dir = KEPT / "runs" / f"samplers_{head}_{store.name}"
    shutil.rmtree(run_dir, ignore_errors=True)
    train = {**head_class("fm").train_defaults, "steps": steps, "warmup_steps": min(100, steps // 10)}
    net = {"net": "mlp"} if head == "dp" else {}
    values = {"head": head, "data": {"stores": [str(store)]}, "model": {**SMALL, **net}}
    values["train"] = TrainConfig.build({**train, "checkpoint_every": steps, "validate_every": steps}).model_dump()
    train_head(HeadTrainConfig.build(values), run_dir)
    trained, rows = load_head(run_dir), []
    for how in SAMPLERS[head]:
        trained.model.adjust(how)
        began = time.perf_counter()
        errors = [evaluate_head(trained, seed=seed).metrics() for seed in range(SEEDS)]
        seconds = (time.perf_counter() - began) / SEEDS
        executed, whole = ([found[key] for found in errors] for key in ("action_mae", "horizon_mae"))
        rows.append(
            {
                **how,
                "action_mae": float(np.mean(executed)),
                "spread": float(np.ptp(executed)),
                "horizon_mae": float(np.mean(whole)),
                "baseline_mae": errors[0]["baseline_mae"],
                "seconds": seconds,
            }
        )
    return rows


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__, samplers="the table of samplers alone")
    figures: dict[str, Any] = {}
    rows = {head: MODELS.get(head, {head: {}}) for head in HEADS if not options.samplers}
    chosen = [(h, row, m) for h, of in rows.items() for row, m in list(of.items())[: 1 if options.quick else None]]
    for head, row, model in chosen:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures[row] = pool.submit(measure_head, head, model, options.quick).result()
        sys.stderr.write(f"{row}: {figures[row]}\n")
    store = store_of("toy", "toy-14x14x112", grid=14, channels=112) if options.quick else store_of("efficientnet")
    table = {head: samplers(head, store, 40 if options.quick else 4000) for head in SAMPLERS}
    measure.report({"heads": figures, "samplers": table, "store": store.name}, as_json=options.json)


if __name__ == "__main__":
    main()
