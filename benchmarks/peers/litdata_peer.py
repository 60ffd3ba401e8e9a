"""litdata: optimised chunks on the local disk, one sample a frame, `dataset[i]` for each frame of a window."""

from __future__ import annotations

from pathlib import Path

from peers import Frames, Read

PACKAGE = "litdata"
INSTALL = "pip install litdata, in an environment of its own: it wants torchvision"
CHUNK_BYTES = 64 << 20


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Write chunks of 64 MB, in this process (`litdata.optimize` starts workers around the same writer)."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for row, frame in enumerate(frames):
        writer.add_item(row, {"frame": frame})
    writer.done()
    writer.merge()


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of single frames."""
    from litdata import StreamingDataset

    # By default it decodes up to 64 neighbours of the item asked for: random reads are many times slower then.
    dataset = StreamingDataset(str(folder), shuffle=False, batch_decode=False)

    def read(starts: list[int], out: Frames) -> None:
        for at, start in enumerate(starts):
            for offset in range(window):
                out[at * window + offset] = dataset[start + offset]["frame"]

    return read
