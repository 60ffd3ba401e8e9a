"""Diffusion Policy's replay buffer held in memory as numpy arrays, which is how its image workspaces train.

Its pattern in our own words (real-stanford/diffusion_policy, `common/replay_buffer.py`, `common/sampler.py`): a table
of first and last rows, one a window; a sample slices every key; the samples are then collated. In memory the sample is
as long as the observations here, its best case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import Frames, Read

PACKAGE, INSTALL = "numpy", "pip install numpy"
ACTION_DIM = 4


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Keep nothing: the frames are in memory."""


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of samples from memory."""
    return sampler({"grid": frames, "action": np.zeros((len(frames), ACTION_DIM), np.float32)}, window, window)


def sampler(buffer: Mapping[str, Any], window: int, horizon: int) -> Read:
    """Return a reader of samples of `horizon` rows, of which the observations have the first `window`.

    With a longer horizon than window, the unread observations are filled with NaN, as `key_first_k` does there. Windows
    at an end are cut off, not padded, which only helps.
    """
    rows = len(buffer["action"])
    indices = [(start, min(start + horizon, rows)) for start in range(rows - window + 1)]

    def sample(number: int) -> dict[str, NDArray[Any]]:
        start, stop = indices[number]
        action = buffer["action"][start:stop]
        grid = buffer["grid"]
        if horizon == window:
            return {"grid": grid[start:stop], "action": action}
        filled = np.full((stop - start, *grid.shape[1:]), np.nan, grid.dtype)
        filled[:window] = grid[start : start + window]
        return {"grid": filled, "action": action}

    def read(starts: list[int], out: Frames) -> None:
        actions = np.zeros((len(starts), horizon, ACTION_DIM), np.float32)
        for at, start in enumerate(starts):
            found = sample(start)
            out[at * window : (at + 1) * window] = found["grid"][:window]
            actions[at, : len(found["action"])] = found["action"]

    return read
