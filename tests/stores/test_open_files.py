"""Open files stay below the limit of the process, whatever reads at a time."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores import open_files
from vla.stores.join import join_stores
from vla.stores.open_files import budget
from vla.stores.store import open_store

READ = """
import resource, sys
from pathlib import Path
import numpy as np
from vla.stores.batches import WindowBatches
from vla.stores.join import join_stores
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
stores = join_stores([open_store(path) for path in sys.argv[2:]])
index = WindowIndex(stores.first.episodes, np.arange(len(stores.first.episodes)), WindowSpec(n_obs=2, horizon=2))
batches = [
    WindowBatches(stores, index, features=dict.fromkeys(stores.owner, 2), obs_steps=(), action_steps=("action",),
                  batch_size=64, verify="first", shuffle=how)
    for how in ("global", "blocks")
]
streams = [each.shuffled(seed=0) for each in batches]
for _ in range(20):
    for stream in streams:
        next(stream)
for stream in streams:
    stream.close()
"""


def opened() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("form", ["zarr", "h5"])
def test_training_batches_of_more_units_than_files_are_read(
    tmp_path: Path, make_store: Callable[..., Any], form: str
) -> None:
    roots = []
    for name in ("a", "b"):
        features = {f"{name}{number}": ((1, 2), "float16") for number in range(2)}
        made = make_store(tmp_path / name, lengths=(300,), unit_rows=2, features=features, form={"format": form})
        roots.append(str(made.root))
    done = subprocess.run([sys.executable, "-c", READ, "96", *roots], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("limit", [64, 96, 256, 1024, 1 << 20, resource.RLIM_INFINITY])
def test_a_part_of_the_limit_is_left_to_the_rest_of_the_process(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert budget() >= 16
    assert limit == resource.RLIM_INFINITY or budget() <= 0.75 * limit


def test_all_readers_of_a_process_share_one_number_of_files(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "budget", lambda: 10)
    made = make_store(tmp_path / "s", lengths=(64,), unit_rows=2)
    store, rows = open_store(made.root), np.arange(64)
    readers = [store.reader("grid") for _ in range(4)]
    out = np.empty_like(made.features["grid"])
    before = opened()
    for _ in range(2):
        for reader in readers:
            reader.read(rows, out)
            np.testing.assert_array_equal(out, made.features["grid"])
            assert opened() - before <= 10
    for reader in readers:
        reader.close()


def test_readers_in_threads_take_no_file_from_one_that_is_reading(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "budget", lambda: 3)
    made = make_store(tmp_path / "s", lengths=(64,), unit_rows=2)
    store, wrong = open_store(made.root), list[str]()

    def read(seed: int) -> None:
        reader, order = store.reader("grid", "never"), np.random.default_rng(seed)
        for _ in range(50):
            rows = order.permutation(64)
            out = np.empty_like(made.features["grid"])
            reader.read(rows, out)
            if not np.array_equal(out, made.features["grid"][rows]):
                wrong.append(f"seed {seed}")
        reader.close()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_reader_that_is_forgotten_closes_its_files(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", lengths=(64,), unit_rows=2)
    before = opened()
    joined = join_stores([open_store(made.root)])
    reader = joined.reader("grid")
    reader.read(np.arange(64), np.empty_like(made.features["grid"]))
    assert opened() > before + 20
    del joined, reader
    assert opened() == before
