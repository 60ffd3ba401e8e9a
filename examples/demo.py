"""The main job, end to end, on the data that ships: `make demo`. Run again, it reuses what is done.

It types the commands that a user types, and ends with a short report and pictures in `demo/report/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vla.heads.checkpoint import load_head
from vla.heads.evaluate import evaluate_head
from vla.rollout import report
from vla.stores.errors import VlaError

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
SOURCE = ROOT / "examples" / "push"
STORE, RUN = DEMO / "stores" / "efficientnet", DEMO / "runs" / "mlp"
VLA = str(Path(sys.executable).with_name("vla"))
HEAD = ["mlp", "--steps", "1500", "--set", "train.lr=2e-3", "--set", "train.weight_decay=0.01"]
ROLLOUTS = 10
EXPECTED_SECONDS = (80, 60, 15, 60, 10)
"""Of each step on two cores, for the time left; measured, and rounded up."""


def command(step: int, what: str, arguments: list[str], out: Path | None = None) -> None:
    """Show and run one `vla` command; end the demo with its exit code where it fails."""
    announce(step, what)
    shown = " ".join(
        Path(word).relative_to(ROOT).as_posix() if word.startswith(str(ROOT)) else word for word in arguments
    )
    print(f"$ vla {shown}", flush=True)
    done = subprocess.run([VLA, *arguments], stdout=subprocess.PIPE if out else None, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(done.stdout)


def announce(step: int, what: str) -> None:
    """Say which step begins and how long the rest takes about."""
    left = sum(EXPECTED_SECONDS[step - 1 :])
    print(f"\n[{step}/{len(EXPECTED_SECONDS)}] {what} (about {left // 60} min {left % 60:02d} s left)", flush=True)


def fresh(file: Path) -> bool:
    """Whether a result is newer than the checkpoint it is of."""
    return file.is_file() and file.stat().st_mtime > (load_head(RUN).folder / "complete.json").stat().st_mtime


def main() -> None:
    """Run the demo."""
    began = time.monotonic()
    os.chdir(ROOT)
    resume = ["--resume"] if STORE.exists() else []
    featurize = ["featurize", "--backbone", "efficientnet", "--source", str(SOURCE), "--out", str(STORE.parent)]
    command(1, "run the frozen backbone once over 100 demonstrations", [*featurize, *resume])
    resume = ["--resume"] if RUN.exists() else []
    command(2, "train a head from the store", ["train-head", *HEAD, "--store", str(STORE), "--out", str(RUN), *resume])
    errors, rollouts = DEMO / "evaluate.json", DEMO / "rollout.json"
    if not fresh(errors):
        command(3, "compare its actions with held-out demonstrations", ["evaluate", str(RUN), "--json"], errors)
    if not fresh(rollouts):
        video = ["--video", str(DEMO / "rollout.mp4")]
        rollout = ["rollout", str(RUN), "--env", "metaworld:push-v3", "--episodes", str(ROLLOUTS), *video, "--json"]
        command(4, "let it act in the simulator, on scenes that no demonstration showed", rollout, rollouts)
    announce(5, "draw the report")
    folder = DEMO / "report"
    folder.mkdir(exist_ok=True)
    report.feature_overlay(STORE, str(SOURCE), folder / "overlay.png")
    report.loss_curve(RUN / "metrics.jsonl", folder / "loss.png")
    report.predicted_against_true(evaluate_head(load_head(RUN)), folder / "actions.png")
    report.rollout_strip(DEMO / "rollout.mp4", folder / "rollout.png")
    text = summary(json.loads(errors.read_text()), json.loads(rollouts.read_text()))
    (folder / "README.md").write_text(text)
    print(f"\n{text}\nreport: {folder}; {time.monotonic() - began:.0f} s in all")


def summary(errors: dict[str, float], rollouts: dict[str, Any]) -> str:
    """Return the report's text."""
    interval = f"{rollouts['low']:.2f} to {rollouts['high']:.2f}"
    latency = rollouts["latency"]
    return f"""# push-v3 from cached EfficientNet-Lite0 features

- Success: {rollouts["successes"]} of {rollouts["episodes"]} unseen scenes (95 % interval {interval}).
  Ten rollouts are few; the README has a hundred, beside the floor and the ceiling of this task.
- Action error on held-out episodes: {errors["action_mae"]:.3f} per executed step, in the action's [-1, 1];
  {errors["baseline_mae"]:.3f} for always predicting the mean action.
- A decision takes {latency["p50_ms"]:.0f} ms (median), {latency["p95_ms"]:.0f} ms (95th percentile).

`overlay.png`: what the cameras saw, and the cached grid's first three principal components as colours.
`loss.png`: training loss, and the action error on held-out episodes. `actions.png`: predicted and demonstrated
actions, window by window. `rollout.png`: frames of the first rollouts (`../rollout.mp4`).

Backbone weights: EfficientNet-Lite0, Apache-2.0. Demonstrations: Meta-World, MIT.
"""


if __name__ == "__main__":
    try:
        main()
    except VlaError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
