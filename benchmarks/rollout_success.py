"""Success in closed loop on push-v3: every head on a pretrained grid, pixels, and the floor and ceiling around them.

The 100 shipped demonstrations train every policy (no episode is held out here: success is measured on scenes that no
demonstration showed). `floor` sees proprioception alone, `ceiling` the simulator's own state. Every row has the same
settings, which were chosen on other scenes than those played here. Two rows run side by side, one a core: decisions'
latency is told by `vla rollout` on a quiet machine, not here. `--quick` shows that the script runs: few steps, few
rollouts, no figure to quote.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch
from demonstrations import KEPT, store_of

from vla.heads.checkpoint import load_head
from vla.heads.model import SMALL_NET
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.registry import make_env
from vla.rollout.evaluate import roll_out
from vla.rollout.policy import Policy

ENV = "metaworld:push-v3"
MODEL: dict[str, Any] = {"n_obs": 1, "horizon": 8, "n_action": 1, "encoder": {"noise": 0.2}}
STATE_ALONE: dict[str, Any] = {"encoder": {"use_features": False}}
ROWS: dict[str, dict[str, Any]] = {
    "floor (proprioception, fm)": {"head": "fm", "backbone": "toy", "model": STATE_ALONE},
    "ceiling (simulator state, fm)": {"head": "fm", "backbone": "toy", "model": STATE_ALONE, "state": ["privileged"]},
    "pixels, fm": {"head": "fm", "backbone": "pixels"},
    "efficientnet, mlp": {"head": "mlp", "backbone": "efficientnet"},
    "efficientnet, fm": {"head": "fm", "backbone": "efficientnet"},
    "efficientnet, dp": {"head": "dp", "backbone": "efficientnet", "model": {"net": "mlp"}},
    "efficientnet, dp (U-Net)": {
        "head": "dp",
        "backbone": "efficientnet",
        "model": {"down_dims": [64, 128, 256]},
        "train": {"lr": 5e-4},
    },
    "efficientnet, hier": {
        "head": "hier",
        "backbone": "efficientnet",
        "model": {"mode": "expert"},
        "train": {"lr": 1e-3},
    },
}
DTYPES = {
    f"efficientnet as {dtype}, fm": {"head": "fm", "backbone": "efficientnet", "dtype": dtype}
    for dtype in ("float16", "float32", "bfloat16", "int8")
}
"""What the storage dtype does to the task: `--dtypes`."""


def success(name: str, steps: int, episodes: int) -> dict[str, Any]:
    """Train one row of the table and roll it out."""
    torch.set_num_threads(1)
    row = (ROWS | DTYPES)[name]
    data = {"stores": [str(_store(row))], "validation": 0.0}
    data |= {"state": row["state"]} if "state" in row else {}
    train = {**SMALL_NET, **row.get("train", {}), "steps": steps, "warmup_steps": min(100, steps // 10)}
    train |= {"checkpoint_every": steps}
    values = {"head": row["head"], "data": data, "model": {**MODEL, **row.get("model", {})}, "train": train}
    run_dir = KEPT / "runs" / name.translate({ord(" "): "_", ord(","): None, ord("("): None, ord(")"): None})
    shutil.rmtree(run_dir, ignore_errors=True)
    began = time.perf_counter()
    train_head(HeadTrainConfig.build(values), run_dir)
    trained = time.perf_counter() - began
    policy = Policy(load_head(run_dir))
    env = make_env(ENV, **policy.env_options())
    try:
        report = roll_out(env, policy, episodes)
    finally:
        env.close()
    sys.stderr.write(f"{name}: {report.success}, trained in {trained:.0f} s\n")
    low, high = report.success.interval
    figures = {"successes": report.success.successes, "episodes": episodes, "rate": report.success.rate}
    return {**figures, "low": low, "high": high, "train_seconds": trained}


def _store(row: dict[str, Any]) -> Path:
    dtype = row.get("dtype")
    return store_of(row["backbone"], f"{row['backbone']}-{dtype}" if dtype else None, dtype)


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__, dtypes="the storage dtypes of one row instead of the table")
    steps, episodes = (100, 1) if options.quick else (4000, 100)
    rows = DTYPES if options.dtypes else ROWS
    slow = () if options.dtypes else ("efficientnet",)
    names = [name for name, row in rows.items() if not (options.quick and row["backbone"] in slow)]
    for name in names:
        _store(rows[name])  # before two rows want the same one
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(success, names, [steps] * len(names), [episodes] * len(names)))
    table = dict(zip(names, results, strict=True))
    measure.report({"env": ENV, "train_steps": steps, "model": MODEL, "table": table}, as_json=options.json)


if __name__ == "__main__":
    main()
