"""A store of given features, one episode a unit, for the benchmarks that read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

EPISODE = 128
"""Frames an episode, all of one unit: 50 MB of a [256, 768] grid in float16."""

GRID = (1, 256, 768)
"""Views, tokens, channels."""


def write_store(
    root: Path,
    rows: int,
    shapes: dict[str, tuple[int, ...]],
    values: Callable[[range], dict[str, NDArray[np.float16]]],
) -> None:
    """Write float16 features of the given row shapes; `values(rows)` returns those of some rows."""
    episodes = rows // EPISODE
    table = EpisodeTable.plan([f"episode_{i}" for i in range(episodes)], [EPISODE] * episodes, ["x"] * episodes)
    manifest = Manifest(
        rows=table.rows,
        unit_rows=EPISODE,
        fps=20,
        cameras=("camera",),
        features={
            name: FeatureInfo(shape=shape, dims=("view", f"{name}_token", f"{name}_channel"), dtype="float16")
            for name, shape in shapes.items()
        },
        steps={"action": StepInfo(shape=(4,), dtype="float32", role="action")},
        fingerprint={"backbone": {"name": "benchmark"}},
        tables={},
        provenance={},
    )
    with open_writer(root, manifest, table) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            buffer.put(buffer.rows.start, dict(values(buffer.rows)))
            buffer.steps["action"][:] = 0
            writer.commit(buffer)


def random_windows(rows: int, batches: int, batch: int, window: int, seed: int = 0) -> NDArray[np.int64]:
    """Return first rows [batches, batch] of windows that lie inside their episodes."""
    rng = np.random.default_rng(seed)
    inside = rng.integers(0, EPISODE - window + 1, (batches, batch))
    return inside + EPISODE * rng.integers(0, rows // EPISODE, (batches, batch))
