"""Diffusion Policy's replay buffer on disk, as fast as any zarr-python can read it.

The same files as `dp_disk_zarr3`; a read opens the chunk's file, decodes it with numcodecs and slices it, with nothing
of zarr in between. What zarr 2.12 adds (keys, metadata, chunk arithmetic) would make it slower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from peers import Frames, Read
from peers.dp_disk_zarr3_peer import CODEC, HORIZON, INSTALL, PACKAGE, build
from peers.dp_ram_peer import ACTION_DIM, sampler

__all__ = ["INSTALL", "PACKAGE", "build", "chunks_and_actions", "open_reader"]


class Chunks:
    """An array of chunks along the rows, sliced within its bounds."""

    def __init__(self, folder: Path, shape: tuple[int, ...], rows: int) -> None:
        self._folder, self.shape, self._rows = folder, shape, rows
        self.dtype = np.dtype(np.float16)
        self._tail = ".0" * (len(shape) - 1)

    def __getitem__(self, rows: slice) -> Frames:
        out = np.empty((rows.stop - rows.start, *self.shape[1:]), np.float16)
        for chunk in range(rows.start // self._rows, (rows.stop - 1) // self._rows + 1):
            raw = CODEC.decode((self._folder / f"{chunk}{self._tail}").read_bytes())
            values = np.frombuffer(raw, np.float16).reshape(self._rows, *self.shape[1:])
            first = chunk * self._rows
            start, stop = max(rows.start, first), min(rows.stop, first + self._rows)
            out[start - rows.start : stop - rows.start] = values[start - first : stop - first]
        return out


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of samples."""
    return sampler(chunks_and_actions(folder, frames), window, HORIZON)


def chunks_and_actions(folder: Path, frames: Frames) -> dict[str, Any]:
    """Return the buffer's arrays."""
    rows = zarr.open_group(folder / "replay.zarr", mode="r", zarr_format=2)["data/grid"].chunks[0]
    chunks = Chunks(folder / "replay.zarr" / "data" / "grid", frames.shape, rows)
    return {"grid": chunks, "action": np.zeros((len(frames), ACTION_DIM), np.float32)}
