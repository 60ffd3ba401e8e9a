"""`dp_disk` with samples of two steps instead of 16: nothing is read or filled beyond the observations."""

from __future__ import annotations

from pathlib import Path

from peers import Frames, Read
from peers.dp_disk_peer import INSTALL, PACKAGE, build, chunks_and_actions
from peers.dp_ram_peer import sampler

__all__ = ["INSTALL", "PACKAGE", "build", "open_reader"]


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of samples."""
    return sampler(chunks_and_actions(folder, frames), window, window)
