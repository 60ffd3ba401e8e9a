"""What each storage dtype and form costs: bytes a frame, warm random reads, and the error against float32.

Frames are [1, 256, 768] (0.39 MB in float16): channels of different spread, tokens correlated with their frame, drawn
from a normal distribution. Reads are batches of 64 random rows into memory that is reused, checksums compared the first
time only, all stores interleaved; `read_vs_float16` compares frames a second. int8 is delivered as int8 with its
scales, as a head gets it: multiplying it out happens on the device and is not in the figure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import arguments, interleave, ratio, report

from vla.stores.dtypes import decode
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.store import Store, open_store
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

SHAPE, UNIT, BATCH = (1, 256, 768), 64, 64
CASES: dict[str, dict[str, str]] = {
    "float16": {},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "float16_zstd": {"compression": "zstd"},
    "float16_h5": {"format": "h5"},
}


def draw(rows: int) -> np.ndarray:
    """Return float32 frames: a quarter of each token's variance is its frame's, spreads of channels differ tenfold."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-1.15, 1.15, SHAPE[-1])).astype(np.float32)
    frame = rng.standard_normal((rows, 1, 1, SHAPE[-1]), np.float32)
    return spread * (0.5 * frame + 0.866 * rng.standard_normal((rows, *SHAPE), np.float32))


def make(root: Path, frames: np.ndarray, dtype: str = "float16", **form: str) -> Store:
    """Write the frames in one dtype and form."""
    table = EpisodeTable.plan(["episode"], [len(frames)], ["x"])
    manifest = Manifest(
        rows=len(frames),
        unit_rows=UNIT,
        fps=20,
        cameras=("camera",),
        features={"grid": FeatureInfo(shape=SHAPE, dims=("view", "token", "channel"), dtype=dtype)},
        steps={"action": StepInfo(shape=(4,), dtype="float32", role="action")},
        fingerprint={"backbone": {"name": "benchmark"}},
        tables={},
        provenance={},
        **form,
    )
    with open_writer(root, manifest, table) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            buffer.put(buffer.rows.start, {"grid": frames[buffer.rows.start : buffer.rows.stop]})
            buffer.steps["action"][:] = 0
            writer.commit(buffer)
    return open_store(root)


def relative_error(store: Store, frames: np.ndarray) -> float:
    """Return the L2 error of all values, relative to their L2 norm."""
    scales, squares = store.scales("grid"), 0.0
    for row in range(len(frames)):
        of_unit = None if scales is None else scales[row // UNIT]
        values = decode(store.feature_info("grid").dtype, store.read("grid", np.array([row])), of_unit)
        squares += float(((values.astype(np.float64) - frames[row]) ** 2).sum())
    return float(np.sqrt(squares) / np.linalg.norm(frames.astype(np.float64).ravel()))


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rows, batches, rounds = (128, 4, 5) if options.quick else (512, 8, 9)
    frames = draw(rows)
    chosen = np.random.default_rng(1).integers(0, rows, (batches, BATCH))
    figures: dict[str, dict[str, float]] = {}
    contestants: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            store = make(Path(folder) / name, frames, **case)
            data = sum(
                file.stat().st_size
                for kind in ("frames", "units")
                for file in (store.root / kind).rglob("*")
                if file.is_file()
            )
            figures[name] = {"bytes_per_frame": data / rows, "relative_l2_error": relative_error(store, frames)}
            contestants[name] = read_all(store, chosen)
            contestants[name]()
        times = interleave(contestants, rounds)
    for name, values in times.items():
        figures[name]["frames_per_s"] = chosen.size / float(np.median(values))
        figures[name]["read_vs_float16"] = ratio(times, name, "float16")["median"]
    report({"cases": figures, "rounds": rounds}, as_json=options.json)


def read_all(store: Store, chosen: np.ndarray) -> Callable[[], None]:
    """Return a function that reads all batches once."""
    reader = store.reader("grid")
    out = np.empty((BATCH, *SHAPE), reader.info.stored)

    def read() -> None:
        for rows in chosen:
            reader.read(rows, out)

    return read


if __name__ == "__main__":
    main()
