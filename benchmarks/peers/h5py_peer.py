"""HDF5 with one-frame chunks, not compressed, one slice a window."""

from __future__ import annotations

from pathlib import Path

import h5py

from peers import Frames, Read, read_each

PACKAGE, INSTALL = "h5py", "pip install h5py"


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Write one data set of one-frame chunks."""
    with h5py.File(folder / "frames.h5", "w") as file:
        file.create_dataset("frames", data=frames, chunks=(1, *frames.shape[1:]))


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of slices."""
    data = h5py.File(folder / "frames.h5", "r")["frames"]
    return read_each(lambda start: data[start : start + window], window)
