"""The order of one epoch's windows, where the store is larger than memory: random, yet each byte read about once.

A block is a run of neighbouring rows of one unit (8 MB); a pool is 64 blocks drawn at random. The windows of a pool are
shuffled together, pool after pool. Disks give such blocks at full speed, and the page cache serves what is left.

What it costs: neighbours in the stream come from 64 places of the store instead of all. For a quantity that varies
between blocks alone (the task, the scene), the mean over a batch of B windows has about (1 + B / 64) times the variance
that it has under a global shuffle: 2 at B = 64. Measured in tests/stores/test_block_shuffle.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 8 << 20
"""Twenty rows of 256 tokens x 768 channels in float16: windows of two frames then read 5 % of all rows twice."""

POOL_BLOCKS = 64


@dataclass(frozen=True)
class BlockOrder:
    """One epoch: `windows` int64 [N] in the order of training.

    `blocks` int64 [K] in the order in which they are needed; `before` int64 [K]: windows that the blocks before hold.
    """

    windows: NDArray[np.int64]
    blocks: NDArray[np.int64]
    before: NDArray[np.int64]

    def due(self, at: int, count: int, done: int | None) -> tuple[NDArray[np.int64], int]:
        """Return which blocks to begin reading before windows at .. at+count-1 are taken, and how many that makes.

        `done` is the number returned before, None at the beginning of a stream. Blocks fall due one pool ahead, one
        by one, so that the disk is busy all the time.
        """
        ahead = -(-len(self.windows) * POOL_BLOCKS // len(self.blocks))
        stop = int(np.searchsorted(self.before, at + count + ahead))
        if done is None:
            current = int(np.searchsorted(self.before, at, side="right")) - 1
            done = current // POOL_BLOCKS * POOL_BLOCKS
        return self.blocks[done:stop], max(done, stop)


class Blocks:
    """Windows grouped by the block in which their last observed row lies."""

    def __init__(self, row: NDArray[np.int64], unit_rows: int, row_bytes: int) -> None:
        """Group windows by `row` [N], their last observed row, of `row_bytes` over all features that are read."""
        rows = min(max(BLOCK_BYTES // max(row_bytes, 1), 1), unit_rows)
        per_unit = -(-unit_rows // rows)
        found = row // unit_rows * per_unit + row % unit_rows // rows
        numbers, inverse = np.unique(found, return_inverse=True)
        self._block: NDArray[np.int64] = inverse
        self._count = np.bincount(self._block, minlength=len(numbers))
        self._by_block = np.argsort(self._block, kind="stable")
        self._start = np.cumsum(self._count) - self._count

    def __len__(self) -> int:
        return len(self._count)

    @property
    def of_window(self) -> NDArray[np.int64]:
        """The block of each window, int64 [N]."""
        return self._block

    def windows(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows of some blocks, block by block."""
        parts = [self._by_block[self._start[block] :][: self._count[block]] for block in blocks.tolist()]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def order(self, seed: int, epoch: int) -> BlockOrder:
        """Return the order of an epoch, a function of (seed, epoch) alone."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self))
        pool = np.empty(len(self), np.int64)
        pool[blocks] = np.arange(len(self)) // POOL_BLOCKS
        shuffled = rng.permutation(len(self._block))
        windows = shuffled[np.argsort(pool[self._block[shuffled]], kind="stable")]
        count = self._count[blocks]
        return BlockOrder(windows, blocks, np.cumsum(count) - count)
