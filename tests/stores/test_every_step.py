"""The stream of batches, restored at every step and compared with the rest of it; and carried into other processes.

The idea of restoring at every step is that of grain's `assert_equal_output_after_checkpoint`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores import batches as batches_module
from vla.stores import shuffle
from vla.stores.batches import WindowBatches
from vla.stores.join import join_stores
from vla.stores.store import Store, open_store
from vla.stores.windows import WindowIndex, WindowSpec

COUNT = 14
"""Batches compared: more than two epochs of 31 windows in batches of 5."""


class _NoReadahead:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def announce(self, rows: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "s"
    make_store(folder, lengths=(7, 9, 12, 3), unit_rows=8)
    return folder


@pytest.fixture(params=["announced", "not announced"])
def _readahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "not announced":
        monkeypatch.setattr(batches_module, "Readahead", _NoReadahead)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, pools of three blocks: an epoch has several of both."""
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 3 * 24)
    monkeypatch.setattr(shuffle, "POOL_BLOCKS", 3)


def taken(store: Store, kind: Any, start: int, count: int) -> list[tuple[bytes, ...]]:
    """Return `count` batches from `start` on, of a stream made anew, as bytes."""
    stores = join_stores([store])
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), WindowSpec(n_obs=2, horizon=3))
    wanted = {"features": ("grid",), "obs_steps": ("clock",), "action_steps": ("action",)}
    stream = WindowBatches(stores, index, batch_size=5, shuffle=kind, **wanted).shuffled(seed=4, start=start)  # type: ignore[arg-type]
    found = []
    for batch in itertools.islice(stream, count):
        arrays = (batch.features["grid"], batch.obs_steps["clock"], batch.action_steps["action"])
        masks = (batch.obs_valid, batch.action_valid, batch.task)
        found.append(tuple(values.tobytes() for values in (*arrays, *masks)))
    stream.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.usefixtures("_readahead", "_small_blocks")
@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_a_stream_restored_at_any_step_gives_the_rest_of_it(root: Path, kind: str) -> None:
    whole = taken(open_store(root), kind, 0, COUNT)
    assert len(set(whole)) == COUNT
    for start in range(COUNT):
        assert taken(open_store(root), kind, start, COUNT - start) == whole[start:], f"restored at {start}"


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_a_process_started_beside_an_open_reader_gives_the_same_stream(root: Path, kind: str) -> None:
    """What "spawn" starts shares nothing but the folder; this file is its program, see the end."""
    store = open_store(root)
    reader = store.reader("grid")
    reader.read(np.array([0]), np.empty((1, *reader.info.shape), reader.info.stored))
    command = [sys.executable, __file__, str(root), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=55)
    reader.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == digest_of(taken(store, kind, 3, 4))


def digest_of(batches: list[tuple[bytes, ...]]) -> str:
    return hashlib.sha256(b"".join(part for batch in batches for part in batch)).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="fork with threads is only safe enough on Linux")
@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_a_process_forked_beside_a_running_stream_reads_for_itself_and_does_not_hang(root: Path, kind: str) -> None:
    """The parent's reader is open and its thread is reading; the child opens the store anew."""
    store = open_store(root)
    stores = join_stores([store])
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), WindowSpec(n_obs=2, horizon=3))
    running = WindowBatches(stores, index, features=("grid",), batch_size=5, shuffle=kind).shuffled(seed=4)  # type: ignore[arg-type]
    next(running)
    wanted = taken(store, kind, 2, 5)
    child = os.fork()
    if child == 0:
        os._exit(7 if taken(open_store(root), kind, 2, 5) == wanted else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(list(itertools.islice(running, 5))) == 5  # the child's end did not disturb the parent
    running.close()  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.stdout.write(digest_of(taken(open_store(sys.argv[1]), sys.argv[2], 3, 4)))
