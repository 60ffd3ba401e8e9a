"""A store of many small episodes: how long it takes to open, to index and to inspect, and how much memory.

100,000 episodes of 10 frames, a million rows of 8 float16 numbers, in units of 256 rows: 3,907 commit records. Each
figure is taken in a process of its own; importing counts for `inspect_s`, not for `open_s` and `index_s`. `memory_mb`
is the most that the process held (VmHWM), Python and its libraries included. The page cache holds the records.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import arguments, report

from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

FRAMES, UNIT_ROWS = 10, 256

OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec
began = time.perf_counter()
store = open_store(Path(sys.argv[1]))
opened = time.perf_counter()
index = WindowIndex(store.episodes, np.flatnonzero(store.usable), WindowSpec(n_obs=2))
indexed = time.perf_counter()
rows = index.rows(np.arange(0, len(index), 1000))
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"open_s": opened - began, "index_s": indexed - opened, "memory_mb": peak, "windows": len(index)}))
"""

INSPECT = """
import json, sys, time
began = time.perf_counter()
from vla.cli import main
sys.argv = ["vla", "inspect", sys.argv[1], "--json"]
stdout, sys.stdout = sys.stdout, open("/dev/null", "w")
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps({"inspect_s": time.perf_counter() - began}), file=stdout)
"""


def make_store(root: Path, episodes: int) -> None:
    """Write a store of `episodes` episodes of ten tiny frames."""
    table = EpisodeTable.plan(
        [f"data/chunk-{i // 1000:03d}/episode_{i:06d}" for i in range(episodes)],
        [FRAMES] * episodes,
        [f"task {i % 50}" for i in range(episodes)],
    )
    manifest = Manifest(
        rows=table.rows,
        unit_rows=UNIT_ROWS,
        fps=10,
        cameras=("camera",),
        features={"token": FeatureInfo(shape=(1, 8), dims=("view", "channel"), dtype="float16")},
        steps={"action": StepInfo(shape=(4,), dtype="float32", role="action")},
        fingerprint={"backbone": {"name": "benchmark"}},
        tables={},
        provenance={},
    )
    with open_writer(root, manifest, table) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            buffer.put(buffer.rows.start, {"token": np.full((len(buffer.rows), 1, 8), unit % 100, np.float16)})
            buffer.steps["action"][:] = 0
            writer.commit(buffer)


def in_new_process(code: str, root: Path) -> dict[str, float]:
    """Run code on a store in a process of its own; return the figures that it prints."""
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(root: Path, rounds: int) -> dict[str, float]:
    """Return the median of each figure over some rounds."""
    found = [in_new_process(OPEN, root) | in_new_process(INSPECT, root) for _ in range(rounds)]
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    episodes, rounds = (20_000, 3) if options.quick else (100_000, 5)
    # In memory where there is room: 3,907 units are 23,000 files, each made durable.
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        root = Path(folder) / "store"
        make_store(root, episodes)
        report(
            {"episodes": episodes, "rows": episodes * FRAMES, **measure(root, rounds), "rounds": rounds},
            as_json=options.json,
        )


if __name__ == "__main__":
    main()
