"""Random windows from a store, warm: against the same copy from RAM, and against other ways to keep features.

A sample is a window of 2 frames of [256, 768] float16 (786 KB), a batch 64 of them, read into memory that is reused.
`share_of_ram_copy`: rows already compared with their checksums are not compared again (`--verify first`, the default).
`share_of_ram_copy_verified`: every row compared on every read.
`vs_<peer>`: how many times as fast as the peer (see peers/), in the same run, on the same windows, into the same
memory; `vs_pt_history`: 31 frames of 4 pooled tokens and the newest frame's 64 tokens, 1536 channels, against 32 `.pt`
files.
Each contestant's values are compared bit for bit on one batch first. Slow peers read fewer batches a round, scaled.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, interleave, ratio, report
from numpy.typing import NDArray
from peers import WINDOW_PEERS, Frames, find, pt_history
from random_store import GRID, random_windows, write_store

from vla.stores.reader import FeatureReader
from vla.stores.store import open_store

WINDOW, BATCH = 2, 64
FAST = ("ram", "ours", "verified", "dp_ram", "ours_history")
"""Contestants fast enough to need all batches of a round to be timed well; the others read one in four."""

HISTORY, COARSE, FINE = 31, (1, 4, 1536), (1, 64, 1536)
Contestants = dict[str, Callable[[], None]]


def read_ours(reader: FeatureReader, batch: NDArray[np.int64], window: int, out: Frames) -> None:
    """Read windows that begin at the rows `batch` [B]."""
    reader.read((batch[:, None] + np.arange(window)).reshape(-1), out)


def over(read: Callable[[NDArray[np.int64]], None], starts: NDArray[np.int64]) -> Callable[[], None]:
    """Return a contestant that reads some batches."""

    def run() -> None:
        for batch in starts:
            read(batch)

    return run


def share(name: str, batches: int) -> int:
    """How many of the batches a contestant reads a round."""
    return batches if name in FAST else max(batches // 4, 1)


def two_frame_windows(folder: Path, rows: int, batches: int) -> tuple[Contestants, list[str]]:
    """Build every way to keep the same frames; return contestants and what was skipped."""
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((rows, *GRID), np.float32).astype(np.float16)
    starts = random_windows(rows, batches, BATCH, WINDOW)
    out = np.empty((BATCH * WINDOW, *GRID), np.float16)
    root = folder / "store"
    write_store(root, rows, {"grid": GRID}, lambda some: {"grid": frames[some.start : some.stop]})
    store, skipped = open_store(root), []

    def ram(batch: NDArray[np.int64]) -> None:
        for at, start in enumerate(batch.tolist()):
            np.copyto(out[at * WINDOW : (at + 1) * WINDOW], frames[start : start + WINDOW])

    first, always = store.reader("grid", "first"), store.reader("grid", "always")
    reads: dict[str, Callable[[NDArray[np.int64]], None]] = {
        "ram": ram,
        "ours": lambda batch: read_ours(first, batch, WINDOW, out),
        "verified": lambda batch: read_ours(always, batch, WINDOW, out),
    }
    for name in WINDOW_PEERS:
        peer = find(name)
        if isinstance(peer, str):
            skipped.append(peer)
            continue
        own = folder / name
        own.mkdir()
        peer.build(own, frames, root)
        reads[name] = _peer(peer.open_reader(own, frames, root, WINDOW), out)
    wanted = frames[(starts[0][:, None] + np.arange(WINDOW)).reshape(-1)]
    for name, read in reads.items():
        out[:] = 0
        read(starts[0])
        assert np.array_equal(out, wanted), f"{name} reads other values"
    over(reads["ours"], starts)()  # compares each row with its checksum once
    return {name: over(read, starts[: share(name, batches)]) for name, read in reads.items()}, skipped


def _peer(read: Callable[[list[int], Frames], None], out: Frames) -> Callable[[NDArray[np.int64]], None]:
    return lambda batch: read(batch.tolist(), out)


def histories(folder: Path, rows: int, batches: int) -> Contestants:
    """Build a store and `.pt` files of pooled tokens and grids; return the contestants for histories."""
    rng = np.random.default_rng(1)
    coarse = rng.standard_normal((rows, *COARSE), np.float32).astype(np.float16)
    fine = rng.standard_normal((rows, *FINE), np.float32).astype(np.float16)
    newest = random_windows(rows, batches, BATCH, HISTORY, seed=1) + HISTORY - 1
    root, files = folder / "histories", folder / "pt_history"

    def values(some: range) -> dict[str, Frames]:
        return {"coarse": coarse[some.start : some.stop], "fine": fine[some.start : some.stop]}

    write_store(root, rows, {"coarse": COARSE, "fine": FINE}, values)
    files.mkdir()
    pt_history.build(files, coarse, fine)
    store = open_store(root)
    readers = {name: store.reader(name, "first") for name in ("coarse", "fine")}
    out, out_fine = np.empty((BATCH * HISTORY, *COARSE), np.float16), np.empty((BATCH, *FINE), np.float16)

    def ours(batch: NDArray[np.int64]) -> None:
        read_ours(readers["coarse"], batch - HISTORY + 1, HISTORY, out)
        readers["fine"].read(batch, out_fine)

    def pt(batch: NDArray[np.int64]) -> None:
        pt_history.read(files, batch.tolist(), HISTORY, out, out_fine)

    rows_of = (newest[0][:, None] + np.arange(1 - HISTORY, 1)).reshape(-1)
    for name, read in (("ours", ours), ("pt", pt)):
        out[:], out_fine[:] = 0, 0
        read(newest[0])
        assert np.array_equal(out, coarse[rows_of]), f"{name} reads other histories"
        assert np.array_equal(out_fine, fine[newest[0]]), f"{name} reads other grids"
    over(ours, newest)()
    return {"ours_history": over(ours, newest), "pt_history": over(pt, newest[: share("pt_history", batches)])}


def measure(rows: int, batches: int, rounds: int) -> dict[str, Any]:
    """Build, time and compare."""
    with tempfile.TemporaryDirectory() as folder:
        contestants, skipped = two_frame_windows(Path(folder), rows, batches)
        contestants |= histories(Path(folder), rows, batches)
        times = interleave(contestants, rounds)
    for line in skipped:
        sys.stderr.write(line + "\n")
    times = {name: [s * batches / share(name, batches) for s in values] for name, values in times.items()}
    figures: dict[str, Any] = {}
    for name, ours in (("share_of_ram_copy", "ours"), ("share_of_ram_copy_verified", "verified")):
        figures[name], figures[f"{name}_range"] = ratio(times, ours, "ram")["median"], ratio(times, ours, "ram")
    for peer in (name for name in times if name not in FAST or name == "dp_ram"):
        against = ratio(times, "ours_history" if peer == "pt_history" else "ours", peer)
        figures[f"vs_{peer}"], figures[f"vs_{peer}_range"] = against["median"], against
    samples = batches * BATCH
    return {
        **figures,
        "skipped": skipped,
        "windows_per_s": {name: samples / float(np.median(values)) for name, values in times.items()},
        "window_bytes": WINDOW * 2 * int(np.prod(GRID)),
        "rounds": rounds,
    }


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rows, batches, rounds = (256, 4, 5) if options.quick else (512, 16, 7)
    report(measure(rows, batches, rounds), as_json=options.json)


if __name__ == "__main__":
    main()
