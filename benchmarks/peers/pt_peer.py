"""One `.pt` file a frame, as many projects cache features: `torch.load` for each frame of a window."""

from __future__ import annotations

from pathlib import Path

import torch

from peers import Frames, Read

PACKAGE, INSTALL = "torch", "pip install torch"


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Write one file a frame."""
    for row, frame in enumerate(frames):
        torch.save(torch.from_numpy(frame), folder / f"{row:06d}.pt")


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader that loads each frame."""

    def read(starts: list[int], out: Frames) -> None:
        for at, start in enumerate(starts):
            for offset in range(window):
                frame = torch.load(folder / f"{start + offset:06d}.pt", weights_only=True)
                out[at * window + offset] = frame.numpy()

    return read
