"""Batches: a function of (seed, number), complete, resumable, and whole while they are held."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.stores.batches import WindowBatch, WindowBatches
from vla.stores.errors import CorruptionError
from vla.stores.join import join_stores
from vla.stores.windows import WindowIndex, WindowSpec

SPEC = WindowSpec(n_obs=2, horizon=4, action_offset=-1)


def batches_of(made: Any, batch_size: int = 4, **options: Any) -> WindowBatches:
    stores = join_stores([made.open()])
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), SPEC)
    wanted = {"features": ("grid",), "obs_steps": ("clock",), "action_steps": ("action",), **options}
    return WindowBatches(stores, index, batch_size=batch_size, **wanted)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Any:
    return make_store(tmp_path_factory.mktemp("batches") / "s", lengths=(5, 9, 6, 3), unit_rows=8)


def copied(batch: WindowBatch) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "grid": batch.features["grid"].copy(),
        "clock": batch.obs_steps["clock"].copy(),
        "action": batch.action_steps["action"].copy(),
        "obs_valid": batch.obs_valid.copy(),
        "action_valid": batch.action_valid.copy(),
        "task": batch.task.copy(),
    }


def wanted(made: Any, batches: WindowBatches, windows: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    rows = batches.index.rows(windows)
    return {
        "grid": made.features["grid"][rows.obs],
        "clock": made.steps["clock"][rows.obs],
        "action": made.steps["action"][rows.action],
        "obs_valid": rows.obs_valid,
        "action_valid": rows.action_valid,
        "task": rows.task,
    }


def require_same(one: dict[str, np.ndarray[Any, Any]], two: dict[str, np.ndarray[Any, Any]]) -> None:
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_batch_holds_the_values_of_its_windows(made: Any) -> None:
    batches = batches_of(made)
    stream = batches.shuffled(seed=3)
    for number in range(12):
        require_same(copied(next(stream)), wanted(made, batches, batches.windows_of_batch(3, number)))
    stream.close()


@given(count=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_every_window_comes_once_in_each_permutation(count: int, size: int, seed: int, epochs: int) -> None:
    batches = WindowBatches.__new__(WindowBatches)
    batches.index, batches.batch_size = range(count), size  # type: ignore[assignment]
    numbers = -(-count * epochs // size)
    stream = np.concatenate([batches.windows_of_batch(seed, number) for number in range(numbers)])
    assert len(stream) == numbers * size
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = WindowBatches.__new__(WindowBatches)
    again.index, again.batch_size = batches.index, size
    for number in reversed(range(numbers)):  # no batch depends on which were asked for before it
        np.testing.assert_array_equal(again.windows_of_batch(seed, number), stream[number * size :][:size])


def test_permutations_differ_by_epoch_and_by_seed(made: Any) -> None:
    batches = batches_of(made, batch_size=23)
    orders = {tuple(batches.windows_of_batch(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_resuming_at_any_batch_repeats_the_rest(made: Any) -> None:
    batches = batches_of(made, batch_size=5)
    stream = batches.shuffled(seed=1)
    whole = [copied(batch) for batch in itertools.islice(stream, 14)]
    stream.close()
    for start in range(14):
        resumed = batches_of(made, batch_size=5).shuffled(seed=1, start=start)
        for number in range(start, min(start + 3, 14)):
            require_same(copied(next(resumed)), whole[number])
        resumed.close()


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_stride_gives_every_so_many_th_batch_and_reads_no_other(
    made: Any, shuffle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = batches_of(made, batch_size=5, shuffle=shuffle).shuffled(seed=1)
    whole = [copied(batch) for batch in itertools.islice(stream, 12)]
    stream.close()
    batches, filled, fill = batches_of(made, batch_size=5, shuffle=shuffle), [], WindowBatches._fill

    def spy(self: WindowBatches, draw: Any, *rest: Any) -> WindowBatch:
        filled.append(tuple(draw[0]))
        return fill(self, draw, *rest)

    monkeypatch.setattr(WindowBatches, "_fill", spy)
    for number, batch in zip((1, 4, 7, 10), batches.shuffled(seed=1, start=1, stop=12, stride=3), strict=True):
        require_same(copied(batch), whole[number])
    assert filled == [tuple(batches.windows_of_batch(1, number)) for number in (1, 4, 7, 10)]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_in_order_covers_every_window_once(made: Any, batch_size: int) -> None:
    batches = batches_of(made, batch_size)
    parts = [copied(batch) for batch in batches.in_order()]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    require_same(joined, wanted(made, batches, np.arange(23)))
    assert len(parts) == -(-23 // batch_size)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_batch_stays_whole_while_it_is_held(made: Any, depth: int) -> None:
    batches = batches_of(made)
    stream = batches.shuffled(seed=0, depth=depth)
    for number in range(20):
        batch = next(stream)
        time.sleep(0.003)  # the reader fills every buffer that it may
        require_same(copied(batch), wanted(made, batches, batches.windows_of_batch(0, number)))
    stream.close()


def test_the_rings_buffers_are_made_once(made: Any) -> None:
    allocated = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        allocated.append(shape)
        return np.empty(shape, dtype)

    batches = batches_of(made, allocate=allocate)
    stream = batches.shuffled(seed=0, depth=2)
    for _ in range(30):
        next(stream)
    stream.close()
    assert allocated == [(8, 1, 3, 4)] * 4


def test_damage_met_by_the_reader_is_raised_to_the_consumer(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s")
    shard = tmp_path / "s" / "frames" / "grid" / "c.1.0.0.0"
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CorruptionError, match=r"frames/grid/c\.1\.0\.0\.0 differs from its commit in row 8"):
        for _ in itertools.islice(batches_of(made).shuffled(seed=0), 20):
            pass


def test_stopping_early_ends_the_thread_and_closes_the_files(made: Any) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    stream = batches_of(made).shuffled(seed=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "vla-ahead"]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_the_training_and_the_validation_stream_may_run_side_by_side(made: Any) -> None:
    batches = batches_of(made, batch_size=6)
    one, two = batches.shuffled(seed=0), batches.shuffled(seed=1)
    pairs: list[tuple[int, Iterator[WindowBatch]]] = [(0, one), (1, two)]
    for number in range(8):
        for seed, stream in pairs:
            require_same(copied(next(stream)), wanted(made, batches, batches.windows_of_batch(seed, number)))
    one.close()  # type: ignore[attr-defined]
    two.close()  # type: ignore[attr-defined]
