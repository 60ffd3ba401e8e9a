"""Batches of windows: a thread fills a ring of reused buffers from the store while the consumer works.

Which windows make up batch k is a function of (seed, k) alone: the stream of windows is one seeded order of all of them
after another, cut into batches of equal size, so that training resumes at any batch and repeats exactly. The order is a
permutation, or, where a store exceeds memory, a block shuffle (shuffle.py).

Rows are announced to the kernel a batch or a pool of blocks ahead, so that the disk works while this thread copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.stores.background import iterate_ahead
from vla.stores.join import JoinedReader, JoinedStores
from vla.stores.readahead import Readahead
from vla.stores.reader import Verify
from vla.stores.shuffle import BlockOrder, Blocks
from vla.stores.windows import WindowIndex

Shuffle = Literal["global", "blocks"]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
_Choice = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The windows [B] of a batch, and the rows [n] to announce before they are read."""


@dataclass(frozen=True)
class WindowBatch:
    """B windows in memory that is reused: valid until the next batch is asked for.

    `features[name]` `[B, n_obs, *row shape]`, `obs_steps[name]` `[B, n_obs, *shape]` and `action_steps[name]`
    `[B, H, *shape]` with their masks `obs_valid` [B, n_obs], `action_valid` [B, H]; `task` int64 [B]. Features are as
    stored (uint16 is bfloat16); `scales[name]` float32 `[B, n_obs, C]` is what int8 ones are to be multiplied with.
    """

    features: dict[str, NDArray[Any]]
    obs_steps: dict[str, NDArray[Any]]
    obs_valid: NDArray[np.bool_]
    action_steps: dict[str, NDArray[Any]]
    action_valid: NDArray[np.bool_]
    task: NDArray[np.int64]
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class WindowBatches:
    """Batches over an index of windows of one or several stores.

    `obs_steps` and `action_steps` name the step arrays to gather; they are held in memory (a million frames of a
    14-d action are 56 MB), features are read from disk. `allocate` makes the ring's buffers (pinned, for a GPU).
    `shuffle`: "blocks" for stores that exceed memory, see shuffle.py.
    """

    _blocks: Blocks | None = None
    _cached: tuple[int, int, NDArray[np.int64] | BlockOrder] | None = None

    def __init__(
        self,
        stores: JoinedStores,
        index: WindowIndex,
        *,
        features: tuple[str, ...],
        obs_steps: tuple[str, ...] = (),
        action_steps: tuple[str, ...] = (),
        batch_size: int,
        verify: Verify = "first",
        allocate: Allocate = np.empty,
        shuffle: Shuffle = "global",
    ) -> None:
        self._stores, self.index, self.batch_size = stores, index, batch_size
        self._features, self._verify, self._allocate = features, verify, allocate
        self._obs_steps = {name: stores.first.steps(name) for name in obs_steps}
        self._action_steps = {name: stores.first.steps(name) for name in action_steps}
        if shuffle == "blocks":
            row_bytes = sum(stores.feature_info(name).row_bytes for name in features)
            self._blocks = Blocks(index.row, stores.first.manifest.unit_rows, row_bytes)

    def shuffled(self, seed: int, start: int = 0, depth: int = 3, stop: int | None = None) -> Iterator[WindowBatch]:
        """Yield batches start, start+1, ... (to `stop`, or for ever), shuffled, `depth` of them in flight."""
        chosen = self._choose_blocks(seed, start) if self._blocks is not None else self._choose(seed, start)
        return self._prefetched(itertools.islice(chosen, None if stop is None else stop - start), depth)

    def in_order(self, depth: int = 3) -> Iterator[WindowBatch]:
        """Yield every window once, in order; the last batch may be smaller."""
        count = len(self.index)
        parts = (np.arange(at, min(at + self.batch_size, count)) for at in range(0, count, self.batch_size))
        # The kernel sees by itself that a file is read from end to end.
        chosen = ((windows, np.empty(0, np.int64)) for windows in parts)
        return self._prefetched(chosen, depth)

    def windows_of_batch(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the windows [B] of batch `number` of the shuffled stream."""
        count, first = len(self.index), number * self.batch_size
        parts = []
        for epoch in range(first // count, (first + self.batch_size - 1) // count + 1):
            at = first - epoch * count
            parts.append(self._epoch(seed, epoch)[max(at, 0) : at + self.batch_size])
        return np.concatenate(parts)

    def _epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        order = self._order(seed, epoch)
        return order.windows if isinstance(order, BlockOrder) else order

    def _order(self, seed: int, epoch: int) -> NDArray[np.int64] | BlockOrder:
        cached = self._cached
        if cached is None or cached[:2] != (seed, epoch):
            order: NDArray[np.int64] | BlockOrder
            if self._blocks is not None:
                order = self._blocks.order(seed, epoch)
            else:
                order = np.random.default_rng([seed, epoch]).permutation(len(self.index))
            cached = self._cached = (seed, epoch, order)
        return cached[2]

    def _choose(self, seed: int, start: int) -> Iterator[_Choice]:
        """Yield batches from `start` on, each with the rows of the next one."""
        windows = self.windows_of_batch(seed, start)
        soon = self._observed(windows)
        for number in itertools.count(start + 1):
            following = self.windows_of_batch(seed, number)
            yield windows, np.concatenate([soon, self._observed(following)])
            windows, soon = following, np.empty(0, np.int64)

    def _choose_blocks(self, seed: int, start: int) -> Iterator[_Choice]:
        """Yield batches from `start` on, each with the rows of the blocks that fall due."""
        assert self._blocks is not None
        reached, done = -1, None
        for number in itertools.count(start):
            windows = self.windows_of_batch(seed, number)
            epoch, at = divmod(number * self.batch_size, len(self.index))
            order = self._order(seed, epoch)
            assert isinstance(order, BlockOrder)
            blocks, done = order.due(at, self.batch_size, done if epoch == reached else None)
            reached = epoch
            yield windows, self._observed(self._blocks.windows(blocks))

    def _observed(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.index.rows(windows).obs.reshape(-1)

    def _prefetched(self, chosen: Iterator[_Choice], depth: int) -> Iterator[WindowBatch]:
        return iterate_ahead(self._batches(chosen, depth + 2), depth)

    def _batches(self, chosen: Iterator[_Choice], buffers: int) -> Iterator[WindowBatch]:
        # One buffer is being filled, `depth` wait in the queue, one is in the consumer's hands: depth + 2 suffice.
        ring = itertools.cycle([self._buffers() for _ in range(buffers)])
        readers = {name: self._stores.reader(name, self._verify) for name in self._features}
        rows = self._stores.first.manifest.rows
        readahead = Readahead(readers.values(), rows, again=self._blocks is not None)
        try:
            for windows, soon in chosen:
                readahead.announce(soon)
                yield self._fill(windows, next(ring), readers)
        finally:
            readahead.close()
            for reader in readers.values():
                reader.close()

    def _buffers(self) -> dict[str, NDArray[Any]]:
        size, spec = self.batch_size, self.index.spec
        buffers = {}
        for name in self._features:
            info = self._stores.feature_info(name)
            buffers[name] = self._allocate((size * spec.n_obs, *info.shape), info.stored)
        return buffers

    def _fill(
        self, windows: NDArray[np.int64], buffers: dict[str, NDArray[Any]], readers: dict[str, JoinedReader]
    ) -> WindowBatch:
        rows = self.index.rows(windows)
        count, n_obs = rows.obs.shape
        features, scales = {}, {}
        for name, reader in readers.items():
            out = buffers[name][: count * n_obs]
            reader.read(rows.obs.reshape(-1), out)
            features[name] = out.reshape(count, n_obs, *out.shape[1:])
            factors = reader.scales(rows.obs.reshape(-1))
            if factors is not None:
                scales[name] = factors.reshape(count, n_obs, -1)
        return WindowBatch(
            features,
            {name: values[rows.obs] for name, values in self._obs_steps.items()},
            rows.obs_valid,
            {name: values[rows.action] for name, values in self._action_steps.items()},
            rows.action_valid,
            rows.task,
            scales,
        )
