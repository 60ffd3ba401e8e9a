"""Histories from `.pt` files, the pattern of OpenTrackVLA's vision cache: two files a frame, 32 loads a sample.

In our own words, without its parsing of JSON: the pooled tokens (`coarse`) of each of the last 31 frames and the grid
of tokens (`fine`) of the newest one, each a file of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch

from peers import Frames


def build(folder: Path, coarse: Frames, fine: Frames) -> None:
    """Write `coarse` [N, …] and `fine` [N, …], one file a row each."""
    for name, values in (("coarse", coarse), ("fine", fine)):
        (folder / name).mkdir()
        for row, value in enumerate(values):
            torch.save(torch.from_numpy(value), folder / name / f"{row:06d}.pt")


def read(folder: Path, newest: list[int], history: int, coarse: Frames, fine: Frames) -> None:
    """Fill `coarse` [B * history, …] and `fine` [B, …] with the samples that end at the rows `newest` [B]."""
    for at, row in enumerate(newest):
        for offset in range(history):
            path = folder / "coarse" / f"{row - history + 1 + offset:06d}.pt"
            coarse[at * history + offset] = torch.load(path, weights_only=True).numpy()
        fine[at] = torch.load(folder / "fine" / f"{row:06d}.pt", weights_only=True).numpy()
