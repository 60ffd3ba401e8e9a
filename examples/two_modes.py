"""Two experts, one task: past an obstacle on the left or on the right. `dp` and `fm` keep both ways, `mlp` averages.

A point stands below an obstacle and has to reach the goal above it. Half of the demonstrations pass it on the left,
half on the right, from the same places; nothing that is observed tells which. The mean of both leads through it.

`python examples/two_modes.py --out docs/two-modes.png` trains the three heads, prints how their paths pass the
obstacle, and draws them. `--steps 200` is a quick look.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.model import HeadModel
from vla.training.config import TrainConfig
from vla.training.loop import fit, seed_everything

HORIZON = 16
"""Waypoints of a path, from below the obstacle to above it."""

RADIUS = 0.35
"""Of the obstacle, which is at (0, 0); the experts pass it at about twice that distance."""

HEADS: dict[str, dict[str, Any]] = {
    "dp": {"n_obs": 1, "horizon": HORIZON, "n_action": 1, "down_dims": [32, 64], "encoder": {"dim": 32}},
    "fm": {"n_obs": 1, "horizon": HORIZON, "n_action": 1, "width": 128, "encoder": {"dim": 32}},
    "mlp": {"n_obs": 1, "horizon": HORIZON, "n_action": 1, "hidden": 128, "encoder": {"dim": 32}},
}
STEPS = 1500
BATCH = 64


def demonstrations(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return where `count` paths start [count, 2] and the paths [count, HORIZON, 2], half of them on each side.

    x from left to right, y upwards, in units of which the field is about 2 wide.
    """
    rng = np.random.default_rng(seed)
    start = np.stack([rng.uniform(-0.15, 0.15, count), np.full(count, -1.0)], axis=1)
    side = np.where(np.arange(count) % 2, 1.0, -1.0)
    along = np.linspace(0, 1, HORIZON)
    bulge = side[:, None] * rng.uniform(0.6, 0.8, (count, 1)) * np.sin(np.pi * along)
    x = start[:, :1] * (1 - along) + bulge
    y = np.broadcast_to(-1 + 2 * along, x.shape)
    return start.astype(np.float32), np.stack([x, y], axis=2).astype(np.float32)


def batch_of(start: NDArray[np.float32], paths: NDArray[np.float32] | None = None) -> Batch:
    """Return windows whose state is where they start and whose actions are the path's waypoints."""
    count = len(start)
    return Batch(
        features={},
        state=torch.from_numpy(start)[:, None],
        task=torch.zeros(count, dtype=torch.int64),
        obs_valid=torch.ones(count, 1, dtype=torch.bool),
        action=None if paths is None else torch.from_numpy(paths),
    )


def train(head: str, steps: int, folder: Path, seed: int = 0) -> HeadModel:
    """Train a head on 512 demonstrations, by the loop that trains all heads."""
    start, paths = demonstrations(512, seed)
    seed_everything(seed)
    made = HeadIO(action_dim=2, action_names=("x", "y"), state_dim=2, state_names=("x", "y"), tasks=("past it",))
    model = build_head(head, HEADS[head], made)
    model.fit_normalisers(paths.reshape(-1, 2), start)

    def batches(first: int, stride: int) -> Iterator[Batch]:
        for number in range(first, sys.maxsize, stride):
            chosen = np.random.default_rng([seed, number]).integers(0, len(start), BATCH)
            yield batch_of(start[chosen], paths[chosen])

    values = {"steps": steps, "batch_size": BATCH, "lr": 2e-3, "ema": False, "device": "cpu", "checkpoint_every": steps}
    fit(model, batches, TrainConfig.build(values), folder, artefact={"head": head})
    return model


def paths_of(model: HeadModel, count: int, seed: int = 1) -> NDArray[np.float32]:
    """Return paths [count, HORIZON, 2] that a head plans from one and the same place, the middle."""
    start = np.tile(np.float32([0, -1]), (count, 1))
    return model.act(batch_of(start), torch.Generator().manual_seed(seed)).numpy()


def statistics(paths: NDArray[np.float32]) -> dict[str, float]:
    """Return the shares of paths [N, HORIZON, 2] that pass left, pass right, and run into the obstacle; they sum to 1.

    Also "offset", how far from the middle they pass on average, whichever side.
    """
    hit = (np.hypot(paths[..., 0], paths[..., 1]) < RADIUS).any(axis=1)
    x = paths[:, HORIZON // 2, 0]
    return {
        "left": float((~hit & (x < 0)).mean()),
        "right": float((~hit & (x > 0)).mean()),
        "hit": float(hit.mean()),
        "offset": float(np.abs(x).mean()),
    }


def draw(planned: dict[str, NDArray[np.float32]], out: Path) -> None:
    """Draw what the experts did and what each head plans."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    blue, vermillion, grey = "#0072B2", "#D55E00", "#777777"  # told apart under every common colour blindness
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(planned) + 1, sharex=True, sharey=True)
    _, shown = demonstrations(40, seed=0)
    for panel, (name, paths) in zip(panels, {"experts": shown, **planned}.items(), strict=True):
        for path in paths[:60]:
            panel.plot(path[:, 0], path[:, 1], color=grey if name == "experts" else blue, lw=0.8, alpha=0.5)
        panel.add_patch(Circle((0, 0), RADIUS, color=vermillion, alpha=0.35, lw=0))
        panel.plot([0], [-1], "o", color="black", ms=5)
        panel.plot([0], [1], "*", color="black", ms=9)
        found = statistics(paths)
        panel.set_title(name, fontsize=12)
        said = f"left {found['left']:.0%}, right {found['right']:.0%}, hit {found['hit']:.0%}"
        panel.set_xlabel(said, fontsize=9)
        panel.set(xticks=[], yticks=[], xlim=(-1, 1), ylim=(-1.15, 1.15), aspect="equal")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    out.write_bytes(content.getvalue())


def main() -> None:
    """Train, count, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a .png to draw")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of each head")
    options = parser.parse_args()
    planned = {}
    for head in HEADS:
        with tempfile.TemporaryDirectory() as folder:
            planned[head] = paths_of(train(head, options.steps, Path(folder) / "run"), 200)
    print(json.dumps({head: statistics(paths) for head, paths in planned.items()}, indent=1))
    if options.out is not None:
        draw(planned, options.out)


if __name__ == "__main__":
    main()
