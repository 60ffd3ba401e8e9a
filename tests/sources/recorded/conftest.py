"""Writes the parts that data sets of one folder an episode are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture(scope="session")
def write_pictures(
    picture: Callable[[int, int, int], NDArray[np.uint8]], encoded: Callable[..., bytes]
) -> Callable[..., None]:
    """`write_pictures(folder, episode, frames, camera=0, name=…)` writes numbered pictures as `picture` draws them."""

    def write(folder: Path, episode: int, frames: int, camera: int = 0, name: str = "{}.jpg", first: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for frame in range(frames):
            file = folder / name.format(first + frame)
            kind = "PNG" if file.suffix == ".png" else "JPEG"
            file.write_bytes(encoded(picture(episode, frame, camera), kind))

    return write


@pytest.fixture(scope="session")
def cut_header() -> Callable[[Path, tuple[int, ...]], None]:
    """`cut_header(file, shape)` makes a .npy whose header declares `shape` float32 and that holds nothing more."""

    def write(file: Path, shape: tuple[int, ...]) -> None:
        with file.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)

    return write
