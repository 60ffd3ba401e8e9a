"""MosaicML streaming: MDS shards on the local disk, one sample a frame, `dataset[i]` for each frame of a window."""

from __future__ import annotations

from pathlib import Path

from peers import Frames, Read

PACKAGE = "streaming"
INSTALL = "pip install mosaicml-streaming, in an environment of its own: it wants numpy<2.2 and torchvision"
SHARD_BYTES = 64 << 20


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Write shards of 64 MB."""
    from streaming import MDSWriter

    column = f"ndarray:float16:{','.join(map(str, frames.shape[1:]))}"
    with MDSWriter(out=str(folder), columns={"frame": column}, size_limit=SHARD_BYTES) as writer:
        for frame in frames:
            writer.write({"frame": frame})


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of single frames."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))

    def read(starts: list[int], out: Frames) -> None:
        for at, start in enumerate(starts):
            for offset in range(window):
                out[at * window + offset] = dataset[start + offset]["frame"]

    return read
