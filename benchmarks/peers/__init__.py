"""Other ways to keep features and to read windows of them, each one small file with the same three parts.

`build(folder, frames, store)` keeps `frames` float16 [N, V, P, C] in `folder` (or nothing, where it reads the shards of
our own `store`). `open_reader(folder, frames, store, window)` returns `read(starts, out)`, which fills `out`
[B * window, V, P, C] with the rows start .. start+window-1 of each start: every peer gets memory that is reused.
`INSTALL` says how to get what it needs. Patterns of other projects are re-implemented here in our own words.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.float16]
Read = Callable[[list[int], Frames], None]


class Peer(Protocol):
    """What each module of this package is."""

    PACKAGE: str
    INSTALL: str

    def build(self, folder: Path, frames: Frames, store: Path) -> None:
        """Keep the frames."""

    def open_reader(self, folder: Path, frames: Frames, store: Path, window: int) -> Read:
        """Return a reader of windows."""


WINDOW_PEERS = (
    "zarr_python",
    "dp_disk",
    "dp_disk_two_frames",
    "dp_disk_zarr3",
    "dp_ram",
    "pt",
    "h5py",
    "h5py_read_direct",
    "tensorstore",
    "mds",
    "litdata",
)
"""Peers that read windows of two frames; each is the module `peers.<name>_peer`."""


def find(name: str) -> Peer | str:
    """Return the peer, or, where its package is not installed, the line that says how to install it."""
    module = importlib.import_module(f"peers.{name}_peer")
    if importlib.util.find_spec(module.PACKAGE) is None:
        return f"{name} is skipped: {module.INSTALL}"
    return module  # type: ignore[return-value]


def read_each(load: Callable[[int], Frames], window: int) -> Read:
    """Return a reader that calls `load(start)` [window, …] for each window and copies the result into the batch."""

    def read(starts: list[int], out: Frames) -> None:
        for at, start in enumerate(starts):
            out[at * window : (at + 1) * window] = load(start)

    return read
