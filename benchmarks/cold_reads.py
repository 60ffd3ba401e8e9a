"""Windows from a store that is not in memory: against what the disk gives, and block shuffle against global shuffle.

Before each measurement our shards are fsynced and dropped from the page cache (posix_fadvise), and mincore(2) says
whether they are gone. Frames are [256, 768] float16 (393 KB), windows 2 of them, batches 64.
`share_of_disk_limit`: bytes of different rows a second, through the ring of batches and checksums compared, over
random reads of the same size with O_DIRECT by the best of 1, 4 and 16 threads.
`blocks_vs_random`: windows a second of a whole epoch in blocks over those of a global shuffle, of which only the first
windows are read, few enough that hardly any row is met twice. Disks of virtual machines may be cached by their host.
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import page_cache
from measure import arguments, interleave, ratio, report
from random_store import EPISODE, GRID, write_store

from vla.stores.batches import Shuffle, WindowBatches
from vla.stores.join import join_stores
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec

WINDOW, BATCH = 2, 64
ROW_BYTES = 2 * int(np.prod(GRID))
DEPTH = 3
DIRECT_THREADS = (1, 4, 16)


def direct(shards: list[Path], reads: int, threads: int) -> Callable[[], None]:
    """Return a contestant that reads random pieces of a window's size, past the page cache."""
    size = WINDOW * ROW_BYTES  # a multiple of the page, as O_DIRECT demands
    places = EPISODE * ROW_BYTES // size
    rng = np.random.default_rng(0)
    wanted = [divmod(int(n), places) for n in rng.permutation(len(shards) * places)[:reads]]

    def read(descriptors: list[int], part: list[tuple[int, int]]) -> None:
        with mmap.mmap(-1, size) as buffer:
            for shard, place in part:
                if os.preadv(descriptors[shard], [buffer], place * size) != size:
                    raise OSError(f"{shards[shard]}: a short read")

    def run() -> None:
        descriptors = [os.open(shard, os.O_RDONLY | os.O_DIRECT) for shard in shards]
        workers = [threading.Thread(target=read, args=(descriptors, wanted[n::threads])) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for descriptor in descriptors:
            os.close(descriptor)

    return run


def measure(folder: Path, rows: int, batches: int, rounds: int) -> dict[str, Any]:
    """Write a store below `folder`, time cold reads of it, and compare."""
    frames = np.random.default_rng(0).standard_normal((EPISODE, *GRID), np.float32).astype(np.float16)
    write_store(folder / "store", rows, {"grid": GRID}, lambda some: {"grid": frames})
    store = open_store(folder / "store")
    stores = join_stores([store])
    shards = sorted((folder / "store" / "frames" / "grid").glob("c.*"))
    index = WindowIndex(store.episodes, np.arange(len(store.episodes)), WindowSpec(n_obs=WINDOW, horizon=1))

    # Training makes its ring of buffers once: so do the streams here, because new memory costs as much as the disk.
    buffers = itertools.cycle([np.zeros((BATCH * WINDOW, *GRID), np.float16) for _ in range(DEPTH + 2)])

    def ring(shuffle: Shuffle) -> WindowBatches:
        return WindowBatches(
            stores,
            index,
            features=("grid",),
            batch_size=BATCH,
            shuffle=shuffle,
            allocate=lambda shape, dtype: next(buffers),
        )

    def through(source: WindowBatches, count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in source.shuffled(0, depth=DEPTH, stop=count):
                pass

        return run

    def one_by_one() -> None:
        reader = store.reader("grid")
        for windows in picked:
            reader.read(index.rows(windows).obs.reshape(-1), out)
        reader.close()

    random, blocks, epoch = ring("global"), ring("blocks"), len(index) // BATCH
    picked = [random.windows_of_batch(0, number) for number in range(batches)]
    out = np.zeros((BATCH * WINDOW, *GRID), np.float16)
    cached: list[float] = []

    def make_cold() -> None:
        page_cache.drop(shards)
        cached.append(page_cache.resident(shards))

    contestants = {f"direct_{n}": direct(shards, batches * BATCH, n) for n in DIRECT_THREADS}
    contestants |= {
        "one_by_one": one_by_one,
        "random": through(random, batches),
        "blocks": through(blocks, epoch),
    }
    times = interleave(contestants, rounds, make_cold)
    different = len(np.unique(index.rows(np.concatenate(picked)).obs))
    bytes_of = dict.fromkeys(contestants, batches * BATCH * WINDOW * ROW_BYTES)
    bytes_of |= dict.fromkeys(("one_by_one", "random"), different * ROW_BYTES)
    bytes_of["blocks"] = rows * ROW_BYTES
    rates = {name: [bytes_of[name] / s / 1e6 for s in values] for name, values in times.items()}
    disk = [max(rates[f"direct_{n}"][at] for n in DIRECT_THREADS) for at in range(rounds)]
    shares = [rate / limit for rate, limit in zip(rates["random"], disk, strict=True)]
    windows = {"random": batches * BATCH, "blocks": epoch * BATCH}
    per_window = {name: [s / windows[name] for s in times[name]] for name in windows}
    return {
        "share_of_disk_limit": statistics.median(shares),
        "share_of_disk_limit_range": [min(shares), max(shares)],
        "blocks_vs_random": ratio(per_window, "blocks", "random")["median"],
        "blocks_vs_random_range": ratio(per_window, "blocks", "random"),
        "blocks_share_of_disk_limit": statistics.median(r / d for r, d in zip(rates["blocks"], disk, strict=True)),
        "announced_vs_one_by_one": ratio(times, "random", "one_by_one")["median"],
        "mb_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "windows_per_s": {name: 1 / statistics.median(values) for name, values in per_window.items()},
        "cached_before": max(cached),
        "rounds": rounds,
    }


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rows, batches, rounds = (2048, 4, 3) if options.quick else (6144, 12, 7)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), rows, batches, rounds), as_json=options.json)


if __name__ == "__main__":
    main()
