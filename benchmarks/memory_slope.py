"""Does reading batches, or training, hold more and more memory? And does a store far larger than memory train at all?

`slope_mb_per_1000_batches`: least squares through its own memory (RssAnon) over 10,000 batches of a store in the page
cache, the first thousand left out. `limited_*`: a process that may use `limit_mb` of memory trains a small head on a
store three times as large, under a cgroup that counts the page cache too, or, where none can be made, under
RLIMIT_DATA.
`limited_by` says which, `limited_shuffle` what `data.shuffle = auto` made of it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, report
from random_store import EPISODE, GRID, write_store

from vla.stores.batches import WindowBatches
from vla.stores.join import join_stores
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec

BATCH, SAMPLE_EVERY = 64, 100
LIMITED_BATCH = 16
"""The ring of five batches is then 63 MB: torch itself takes most of the limit."""

MB = 1 << 20
CGROUPS = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))
"""Where a memory cgroup may be made, version 1 and 2, and the file of its limit."""


def own_memory_mb() -> float:
    """Return this process's own memory (RssAnon): pages of mapped files come and go under a limit."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def slope(samples: list[float], every: int) -> float:
    """Return the slope of samples taken every so many batches, in units per 1,000 batches."""
    return float(np.polyfit(np.arange(len(samples)) * every / 1000, samples, 1)[0])


def read_batches(root: Path, batches: int) -> list[float]:
    """Read shuffled batches; return the memory held every hundred."""
    stores = join_stores([open_store(root)])
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), WindowSpec(n_obs=2))
    source = WindowBatches(stores, index, features=("grid",), action_steps=("action",), batch_size=BATCH)
    stream = enumerate(source.shuffled(0, stop=batches))
    return [own_memory_mb() for number, _ in stream if number % SAMPLE_EVERY == 0]


def train(root: Path, run_dir: Path, steps: int) -> dict[str, Any]:
    """Train a small head; return how its memory developed and what the log says. Runs in the limited process."""
    import torch

    from vla.heads.batch import Batch
    from vla.heads.data import DataConfig, open_data
    from vla.training.config import TrainConfig
    from vla.training.loop import fit

    class Head(torch.nn.Module):
        """Actions from the mean of the tokens: small, so that reading is what is tested."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(GRID[-1], 4)

        def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            """Return the squared error of the first action."""
            tokens = batch.features["grid"].mean(dim=(1, 2, 3), dtype=torch.float32)
            return (self.linear(tokens) - batch.action[:, 0]).square().mean(), {}

    torch.set_num_threads(1)
    data = open_data(DataConfig(stores=(str(root),), validation=0))
    batches = data.batches(data.training, WindowSpec(n_obs=2, horizon=1), LIMITED_BATCH, pin=False)
    samples: list[float] = []
    config = TrainConfig(
        steps=steps,
        batch_size=LIMITED_BATCH,
        log_every=10,
        checkpoint_every=max(steps // 5, 1),
        ema=False,
        device="cpu",
    )
    fit(
        Head(),
        lambda first, stride: batches.shuffled(0, first),
        config,
        run_dir,
        artefact={},
        progress=lambda step, total, figures: samples.append(own_memory_mb()),
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    later = samples[len(samples) // 4 :]
    return {
        "slope_mb_per_1000_steps": slope(later, 1),
        "growth_mb": later[-1] - later[0],
        "memory_mb": max(samples),
        "shuffle": data.config.shuffle,
        "steps_per_s": float(np.median([line["steps_per_s"] for line in lines])),
        "log_lines_with_data_wait_share": sum("data_wait_share" in line for line in lines) / len(lines),
    }


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """Make a cgroup of that many bytes; None where that is not permitted. Removed afterwards."""
    for top, name in CGROUPS:
        group = top / f"vla-benchmark-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def train_limited(root: Path, run_dir: Path, steps: int, limit: int) -> dict[str, Any]:
    """Train in a process of its own that may use `limit` bytes."""
    with memory_group(limit) as group:

        def restrict() -> None:
            if group is None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            else:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, __file__, "--train", str(root), str(run_dir), str(steps)]
        # Before exec: every page of the new program counts.
        done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=restrict)
        if done.returncode:
            raise RuntimeError(f"the limited training ended with {done.returncode}: {done.stderr[-500:]}")
        found = {f"limited_{name}": value for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
        by = "RLIMIT_DATA (the page cache is not counted)" if group is None else f"cgroup {group.parent}"
    return {**found, "limited_by": by, "limit_mb": limit / MB}


def measure(
    folder: Path, batches: int, shape: tuple[int, ...], rows: int, train_rows: int, steps: int
) -> dict[str, Any]:
    """Make two stores below `folder` and measure both things. The limit is a third of the second store's features."""
    make: Callable[[tuple[int, ...]], Any] = lambda shape: np.zeros((EPISODE, *shape), np.float16)  # noqa: E731
    write_store(folder / "small", rows, {"grid": shape}, lambda some: {"grid": make(shape)})
    samples = read_batches(folder / "small", batches)[1000 // SAMPLE_EVERY :]
    figures = {"slope_mb_per_1000_batches": slope(samples, SAMPLE_EVERY), "batches": batches}
    size = train_rows * 2 * int(np.prod(GRID))
    write_store(folder / "large", train_rows, {"grid": GRID}, lambda some: {"grid": make(GRID)})
    figures |= train_limited(folder / "large", folder / "run", steps, size // 3)
    return figures | {"store_mb": size / MB}


def main() -> None:
    """Measure and report; `--train ROOT RUN STEPS` is how this script calls itself."""
    if sys.argv[1:2] == ["--train"]:
        root, run_dir, steps = sys.argv[2:]
        print(json.dumps(train(Path(root), Path(run_dir), int(steps))))
        return
    options = arguments(__doc__)
    batches, rows, steps = (3_000, 1024, 100) if options.quick else (10_000, 2048, 600)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), batches, (1, 4, 768), rows, 40 * EPISODE, steps)
        report(figures, as_json=options.json)


if __name__ == "__main__":
    main()
