"""Block shuffle: complete, seeded, resumable, read about once, and how well it mixes; and what is announced."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.stores import shuffle
from vla.stores.batches import WindowBatches
from vla.stores.join import join_stores
from vla.stores.memory import memory_limit
from vla.stores.readahead import CHUNK_BYTES, Readahead
from vla.stores.shuffle import BLOCK_BYTES, POOL_BLOCKS, Blocks
from vla.stores.windows import WindowIndex, WindowSpec

ROW = 3 * 4 * 2  # bytes of a row of the small stores below


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Any:
    return make_store(tmp_path_factory.mktemp("blocks") / "s", lengths=(17, 9, 30, 3, 21), unit_rows=8)


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows and pools of four blocks, for stores of a few rows."""
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 3 * ROW)
    monkeypatch.setattr(shuffle, "POOL_BLOCKS", 4)


def batches_of(made: Any, batch_size: int = 6, **options: Any) -> WindowBatches:
    stores = join_stores([made.open()])
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), WindowSpec(n_obs=2, horizon=2))
    return WindowBatches(stores, index, features=("grid",), batch_size=batch_size, shuffle="blocks", **options)


@given(
    rows=st.lists(st.integers(0, 400), min_size=1, max_size=200, unique=True),
    unit=st.integers(1, 50),
    row_bytes=st.sampled_from([1, BLOCK_BYTES // 7, BLOCK_BYTES * 2]),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_every_window_once(rows: list[int], unit: int, row_bytes: int, seed: int) -> None:
    blocks = Blocks(np.asarray(rows), unit, row_bytes)
    order = blocks.order(seed, 0)
    assert sorted(order.windows) == list(range(len(rows)))
    assert sorted(blocks.windows(order.blocks)) == list(range(len(rows)))
    assert order.before.tolist() == [len(blocks.windows(order.blocks[:k])) for k in range(len(blocks))]


@given(rows=st.integers(1, 500), unit=st.integers(1, 60), per_block=st.integers(1, 60))
def test_a_block_is_a_run_of_rows_of_one_unit_and_no_larger_than_asked(rows: int, unit: int, per_block: int) -> None:
    row = np.arange(rows)
    blocks = Blocks(row, unit, BLOCK_BYTES // per_block)
    for block in range(len(blocks)):
        inside = np.sort(row[blocks.windows(np.asarray([block]))])
        assert (np.diff(inside) == 1).all()
        assert len(inside) <= min(BLOCK_BYTES // (BLOCK_BYTES // per_block), unit)
        assert inside[0] // unit == inside[-1] // unit


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    row = np.arange(3000)
    orders = {
        (seed, epoch): Blocks(row, 100, BLOCK_BYTES // 4).order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)
    }
    again = Blocks(row, 100, BLOCK_BYTES // 4)
    for (seed, epoch), order in reversed(orders.items()):
        np.testing.assert_array_equal(again.order(seed, epoch).windows, order.windows)
    assert len({tuple(order.windows) for order in orders.values()}) == 4


@pytest.mark.usefixtures("small_pools")
def test_the_windows_of_a_pool_come_from_its_blocks_alone() -> None:
    blocks = Blocks(np.arange(100), 20, ROW)
    order = blocks.order(0, 0)
    for first in range(0, len(blocks), 4):
        pool = blocks.windows(order.blocks[first : first + 4])
        at = int(order.before[first])
        assert sorted(order.windows[at : at + len(pool)]) == sorted(pool)


def test_a_batch_mixes_as_its_docstring_says() -> None:
    # A quantity that varies between blocks alone is the worst case; its batch mean under a global shuffle has variance
    # 1 / B, under a block shuffle at most about (1 + B / POOL_BLOCKS) / B.
    per_block, count, B = 20, 64 * POOL_BLOCKS, 64
    blocks = Blocks(np.arange(count * per_block), 1 << 20, BLOCK_BYTES // per_block)
    scene = np.random.default_rng(0).standard_normal(count)
    windows = blocks.order(0, 0).windows
    means = scene[windows // per_block][: len(windows) // B * B].reshape(-1, B).mean(axis=1)
    ratio = float(means.var() * B / scene.var())
    assert 1.5 < ratio < 1.1 * (1 + B / POOL_BLOCKS)
    places = [len(set((windows[at : at + B] // per_block).tolist())) for at in range(0, len(windows), B)]
    assert np.median(places) > 0.6 * POOL_BLOCKS  # 64 draws from 64 places reach 63 % of them


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("batch_size", [1, 6, 80, 170])
def test_batches_hold_their_windows_and_resume_anywhere(made: Any, batch_size: int) -> None:
    batches = batches_of(made, batch_size)
    stream = batches.shuffled(seed=2)
    taken = []
    for number, batch in enumerate(itertools.islice(stream, 2 * 80 // batch_size + 1)):
        rows = batches.index.rows(batches.windows_of_batch(2, number)).obs
        np.testing.assert_array_equal(batch.features["grid"], made.features["grid"][rows])
        taken.append(batch.features["grid"].copy())
    stream.close()  # type: ignore[attr-defined]
    for start in {0, 1, len(taken) // 2, len(taken) - 1} & set(range(len(taken))):
        resumed = batches_of(made, batch_size).shuffled(seed=2, start=start)
        np.testing.assert_array_equal(next(resumed).features["grid"], taken[start])
        resumed.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small_pools")
def test_two_epochs_give_every_window_twice(made: Any) -> None:
    batches = batches_of(made, 8)
    count = len(batches.index)
    stream = np.concatenate([batches.windows_of_batch(0, number) for number in range(2 * count // 8)])
    assert np.bincount(stream, minlength=count).tolist() == [2] * count


class Rows:
    """A reader that remembers which rows it was asked for; all of them lie in one file."""

    def __init__(self, file: Path) -> None:
        self.rows: list[int] = []
        self._file = file

    def extents(self, rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
        assert (np.diff(rows) > 0).all()
        self.rows += rows.tolist()
        descriptor = os.open(self._file, os.O_RDONLY)
        for row in rows.tolist():
            yield descriptor, row, 1
        os.close(descriptor)


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("start", [0, 1, 5, 9, 12])
def test_blocks_are_announced_before_they_are_needed_and_once_an_epoch(made: Any, start: int) -> None:
    batches = batches_of(made, 6)
    ahead, announced = [], set()
    chosen = itertools.islice(batches._choose_blocks(0, itertools.count(start)), 13 - start)
    for number, ((windows, _), soon) in enumerate(chosen, start):
        np.testing.assert_array_equal(windows, batches.windows_of_batch(0, number))
        announced |= set(soon.tolist())
        assert set(batches.index.rows(windows).obs.reshape(-1).tolist()) <= announced
        ahead.append(len(soon))
    assert sum(ahead) <= 2 * len(batches.index)  # two rows a window, no block twice


def test_rows_are_announced_one_batch_ahead_and_only_once_where_memory_suffices(made: Any, tmp_path: Path) -> None:
    stores = join_stores([made.open()])
    index = WindowIndex(stores.first.episodes, np.arange(5), WindowSpec(n_obs=2, horizon=2))
    batches = WindowBatches(stores, index, features=("grid",), batch_size=8)
    (tmp_path / "file").write_bytes(b"x")
    reader = Rows(tmp_path / "file")
    readahead = Readahead([reader], made.manifest.rows, again=False)
    known: set[int] = set()
    for number, ((windows, _), soon) in enumerate(itertools.islice(batches._choose(0, itertools.count()), 30)):
        readahead.announce(soon)
        known = set(reader.rows)
        np.testing.assert_array_equal(windows, batches.windows_of_batch(0, number))
        for near in (number, number + 1):
            assert set(index.rows(batches.windows_of_batch(0, near)).obs.reshape(-1).tolist()) <= known
    readahead.close()
    assert len(reader.rows) == len(known) == made.manifest.rows


def test_rows_are_announced_again_where_memory_does_not_suffice(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    reader = Rows(tmp_path / "file")
    readahead = Readahead([reader], 10, again=True)
    for _ in range(2):
        readahead.announce(np.asarray([4, 2, 4]))
    readahead.close()
    assert reader.rows == [2, 4, 2, 4]


def test_the_kernel_is_advised_of_exactly_the_bytes_of_the_rows(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[str, int, int]] = []

    def note(descriptor: int, offset: int, size: int, advice: int) -> None:
        advised.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    store = made.open()  # holds its own folder open
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    reader = store.reader("grid")
    readahead = Readahead([reader], made.manifest.rows, again=False)
    readahead.announce(np.asarray([15, 0, 1, 2, 6, 8, 7]))
    readahead.close()
    reader.close()
    stride = ROW + 4
    assert sorted(advised) == [
        ("c.0.0.0.0", 0, 3 * stride),
        ("c.0.0.0.0", 6 * stride, 2 * stride),
        ("c.1.0.0.0", 0, stride),
        ("c.1.0.0.0", 7 * stride, stride),
    ]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_advice_is_given_in_pieces_that_the_kernel_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class One:
        def extents(self, rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
            with (tmp_path / "file").open("w+b") as file:
                yield file.fileno(), 1000, 2 * CHUNK_BYTES + 5

    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, offset, size, advice: pieces.append((offset, size)))
    readahead = Readahead([One()], 1, again=False)
    readahead.announce(np.asarray([0]))
    readahead.close()
    assert pieces == [(1000, CHUNK_BYTES), (1000 + CHUNK_BYTES, CHUNK_BYTES), (1000 + 2 * CHUNK_BYTES, 5)]


@pytest.mark.parametrize(
    ("group", "file"),
    [("0::/a/b", "a/memory.max"), ("7:memory:/a", "memory/a/memory.limit_in_bytes"), ("0::/elsewhere", "memory.max")],
)
def test_the_memory_limit_is_that_of_the_cgroup_or_of_its_parents(tmp_path: Path, group: str, file: str) -> None:
    (tmp_path / "cgroup").write_text(f"3:cpu:/x\n{group}\n")
    limit = tmp_path / "fs" / file
    limit.parent.mkdir(parents=True)
    machine = memory_limit(tmp_path / "none")
    limit.write_text("max\n")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "fs") == machine
    limit.write_text("104857600\n")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "fs") == 100 << 20
