"""Diffusion Policy's replay buffer on disk: a zarr v2 group with its default chunks (2 MB) and codec (Blosc lz4).

A sample is 16 steps long, of which two observations are read (`horizon` and `key_first_k` of its image workspaces).
Read by the zarr-python that is installed; Diffusion Policy itself pins 2.12, which has less overhead a read. `dp_disk`
bounds every version from above.
"""

from __future__ import annotations

import math
from pathlib import Path

import numcodecs
import zarr

from peers import Frames, Read
from peers.dp_ram_peer import ACTION_DIM, sampler

PACKAGE, INSTALL = "zarr", "pip install zarr"
CODEC = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)
TARGET_CHUNK_BYTES = 2e6
HORIZON = 16


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Write `data/grid` and `data/action`."""
    group = zarr.open_group(folder / "replay.zarr", mode="w", zarr_format=2)
    rows = math.ceil(TARGET_CHUNK_BYTES / frames[0].nbytes)
    grid = group.create_array(
        "data/grid", shape=frames.shape, dtype=frames.dtype, chunks=(rows, *frames.shape[1:]), compressors=CODEC
    )
    grid[...] = frames
    action = group.create_array(
        "data/action", shape=(len(frames), ACTION_DIM), dtype="float32", chunks=(len(frames), ACTION_DIM)
    )
    action[...] = 0


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of samples; actions are read into memory once, which only helps this peer."""
    data = zarr.open_group(folder / "replay.zarr", mode="r", zarr_format=2)["data"]
    return sampler({"grid": data["grid"], "action": data["action"][:]}, window, HORIZON)
