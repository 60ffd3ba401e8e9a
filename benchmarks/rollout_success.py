"""Success in closed loop on push-v3: every head on a pretrained grid, pixels, and the floor and ceiling around them.

The 100 shipped demonstrations train every policy (no episode is held out here: success is measured on scenes that no
demonstration showed). `floor` sees proprioception alone, `ceiling` the simulator's own state. `--quick` shows that the
script runs: few steps, few rollouts, no figure to quote.
"""

from __future__ import annotations

import shutil
import sys
import time
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
NO_FEATURES = {"encoder": {"use_features": False}}
DP = {"net": "mlp", "n_obs": 1, "horizon": 8, "n_action": 2}
ROWS: dict[str, dict[str, Any]] = {
    "floor (proprioception, fm)": {"head": "fm", "backbone": "toy", "model": NO_FEATURES},
    "ceiling (simulator state, fm)": {"head": "fm", "backbone": "toy", "model": NO_FEATURES, "state": ["privileged"]},
    "pixels, fm": {"head": "fm", "backbone": "pixels"},
    "efficientnet, mlp": {"head": "mlp", "backbone": "efficientnet"},
    "efficientnet, fm": {"head": "fm", "backbone": "efficientnet"},
    "efficientnet, dp": {"head": "dp", "backbone": "efficientnet", "model": DP},
}


def success(name: str, row: dict[str, Any], steps: int, episodes: int, runs: Path) -> dict[str, Any]:
    """Train one row of the table and roll it out."""
    data = {"stores": [str(store_of(row["backbone"]))], "validation": 0.0}
    data |= {"state": row["state"]} if "state" in row else {}
    train = {**SMALL_NET, "steps": steps, "warmup_steps": min(100, steps // 10), "checkpoint_every": steps}
    values = {"head": row["head"], "data": data, "model": row.get("model", {}), "train": train}
    run_dir = runs / name.replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
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
    return {**figures, "low": low, "high": high, "train_seconds": trained, **report.latency}


def main() -> None:
    """Measure and report."""
    options = measure.arguments(__doc__)
    steps, episodes = (100, 1) if options.quick else (3000, 100)
    torch.set_num_threads(1)
    rows = {key: row for key, row in ROWS.items() if not (options.quick and row["backbone"] == "efficientnet")}
    table = {name: success(name, row, steps, episodes, KEPT / "runs") for name, row in rows.items()}
    measure.report({"env": ENV, "train_steps": steps, "table": table}, as_json=options.json)


if __name__ == "__main__":
    main()
