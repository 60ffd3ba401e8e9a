"""tensorstore on our own shards: the reads of a batch are all begun, then copied as they end (its fastest way)."""

from __future__ import annotations

from pathlib import Path

from peers import Frames, Read
from vla.stores.errors import missing_extra

PACKAGE, INSTALL = "tensorstore", missing_extra("bench")


def build(folder: Path, frames: Frames, store: Path) -> None:
    """Keep nothing: our shards are read."""


def open_reader(folder: Path, frames: Frames, store: Path, window: int) -> Read:
    """Return a reader of futures. Nothing is cached beside the page cache (cache_pool is 0 by default)."""
    import tensorstore

    place = {"driver": "file", "path": f"{store / 'frames' / 'grid'}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()

    def read(starts: list[int], out: Frames) -> None:
        begun = [array[start : start + window].read() for start in starts]
        for at, future in enumerate(begun):
            out[at * window : (at + 1) * window] = future.result()

    return read
