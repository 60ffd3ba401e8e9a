"""Random windows from a store, warm: against the same copy from RAM, and against zarr-python on the same shards.

A sample is a window of 2 frames of [256, 768] float16 (786 KB), a batch 64 of them, read into memory that is reused.
`share_of_ram_copy`: rows already compared with their checksums are not compared again (`--verify first`, the default).
`share_of_ram_copy_verified`: every row compared on every read. Both contestants below read the same random windows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from measure import arguments, interleave, ratio, report

from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

SHAPE = (1, 256, 768)
EPISODE, WINDOW, BATCH = 128, 2, 64


def make_store(root: Path, frames: np.ndarray) -> None:
    """Write the frames as a store of episodes of 128 frames, one a unit (50 MB)."""
    table = EpisodeTable.plan(
        [f"episode_{i}" for i in range(len(frames) // EPISODE)],
        [EPISODE] * (len(frames) // EPISODE),
        ["x"] * (len(frames) // EPISODE),
    )
    manifest = Manifest(
        rows=len(frames),
        unit_rows=EPISODE,
        fps=20,
        cameras=("camera",),
        features={"grid": FeatureInfo(shape=SHAPE, dims=("view", "token", "channel"), dtype="float16")},
        steps={"action": StepInfo(shape=(4,), dtype="float32", role="action")},
        fingerprint={"backbone": {"name": "benchmark"}},
        tables={},
        provenance={},
    )
    with open_writer(root, manifest, table) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            buffer.put(buffer.rows.start, {"grid": frames[buffer.rows.start : buffer.rows.stop]})
            buffer.steps["action"][:] = 0
            writer.commit(buffer)


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rows, batches, rounds = (256, 4, 5) if options.quick else (1024, 16, 7)
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((rows, *SHAPE), np.float32).astype(np.float16)
    starts = rng.integers(0, EPISODE - WINDOW + 1, (batches, BATCH)) + EPISODE * rng.integers(
        0, rows // EPISODE, (batches, BATCH)
    )
    out = np.empty((BATCH * WINDOW, *SHAPE), np.float16)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        make_store(root, frames)
        store = open_store(root)
        array = zarr.open_group(root, mode="r")["frames/grid"]
        first, always = store.reader("grid", "first"), store.reader("grid", "always")

        def ram() -> None:
            for batch in starts.tolist():
                for at, start in enumerate(batch):
                    np.copyto(out[at * WINDOW : (at + 1) * WINDOW], frames[start : start + WINDOW])

        def ours(reader) -> Callable[[], None]:
            def read() -> None:
                for batch in starts:
                    reader.read((batch[:, None] + np.arange(WINDOW)).reshape(-1), out)

            return read

        def zarr_python() -> None:
            # One batch a round: it is slow enough to time, and the ratio scales it to the same work.
            for at, start in enumerate(starts[0].tolist()):
                out[at * WINDOW : (at + 1) * WINDOW] = array[start : start + WINDOW]

        ours(first)()
        rows_of = (starts[0][:, None] + np.arange(WINDOW)).reshape(-1)
        zarr_python()
        assert (out == frames[rows_of]).all(), "zarr-python reads other values"
        first.read(rows_of, out)
        assert (out == frames[rows_of]).all(), "the reader reads other values"
        contestants = {"ram": ram, "ours": ours(first), "verified": ours(always), "zarr_python": zarr_python}
        times = interleave(contestants, rounds)
        times["zarr_python"] = [seconds * batches for seconds in times["zarr_python"]]
        first.close()
        always.close()
    samples = batches * BATCH
    report(
        {
            "share_of_ram_copy": ratio(times, "ours", "ram")["median"],
            "share_of_ram_copy_range": ratio(times, "ours", "ram"),
            "share_of_ram_copy_verified": ratio(times, "verified", "ram")["median"],
            "vs_zarr_python": ratio(times, "ours", "zarr_python")["median"],
            "vs_zarr_python_range": ratio(times, "ours", "zarr_python"),
            "windows_per_s": {name: samples / float(np.median(values)) for name, values in times.items()},
            "window_bytes": out.nbytes // BATCH,
            "rounds": rounds,
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
