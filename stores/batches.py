"""Batches of windows: a thread fills a ring of reused buffers from the store while the consumer works.

Which windows make up batch k is a function of (seed, k) alone: the stream of windows is one seeded order of all of them
after another, cut into batches of equal size, so that training resumes at any batch and repeats exactly. The order is a
permutation, or, where a store exceeds memory, a block shuffle (shuffle.py).

Where augmented copies are drawn, each window takes one of copies 0 (the plain feature) to K, uniformly, the same for
all of its frames and features, by a generator that is a function of (seed, epoch); under a block shuffle the windows of
a block share the draw of an epoch, so that a block is still read from end to end. The windows of a batch stand in the
order of their copies: each array is read by one call, straight into the batch.

Rows are announced to the kernel a batch or a pool of blocks ahead, so that the disk works while this thread copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.stores.background import iterate_ahead
from vla.stores.copies import RowReader
from vla.stores.errors import UsageError
from vla.stores.join import JoinedStores
from vla.stores.readahead import Readahead
from vla.stores.reader import Verify
from vla.stores.shuffle import BlockOrder, Blocks
from vla.stores.windows import WindowIndex

Shuffle = Literal["global", "blocks"]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
_Draw = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""The windows [B] of a batch, and the copy of each [B]; 0 is the plain feature."""

_Choice = tuple[_Draw, NDArray[np.int64]]
"""A batch, and the places [n] (see copies.py) to announce before they are read."""


@dataclass(frozen=True)
class WindowBatch:
    """B windows in memory that is reused: valid until the next batch is asked for.

    `features[name]` `[B, frames, *row shape]`, `obs_steps[name]` `[B, n_obs, *shape]` and `action_steps[name]`
    `[B, H, *shape]` with their masks `obs_valid` [B, n_obs], `action_valid` [B, H]; `task` and `label` int64 [B]. Of a
    feature there are the last `frames` of the n_obs observed ones. Features are as stored (uint16 is bfloat16);
    `scales[name]` float32 `[B, frames, C]` is what int8 ones are to be multiplied with.
    """

    features: dict[str, NDArray[Any]]
    obs_steps: dict[str, NDArray[Any]]
    obs_valid: NDArray[np.bool_]
    action_steps: dict[str, NDArray[Any]]
    action_valid: NDArray[np.bool_]
    task: NDArray[np.int64]
    label: NDArray[np.int64]
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class WindowBatches:
    """Batches over an index of windows of one or several stores.

    `features` are names, or names and how many of the observed frames are read of each, the last ones (a history of
    coarse tokens and one frame of fine ones). `obs_steps` and `action_steps` name the step arrays to gather; they are
    held in memory (a million frames of a 14-d action are 56 MB), features are read from disk. `allocate` makes the
    ring's buffers (pinned, for a GPU).
    `shuffle`: "blocks" for stores that exceed memory, see shuffle.py. `copies`: K, as `stores.copies(features)` says,
    to draw augmented copies in `shuffled`; `in_order` reads plain features whatever it is.
    """

    _blocks: Blocks | None = None
    _copies = 0
    _cached: tuple[int, int, NDArray[np.int64] | BlockOrder, NDArray[np.uint8]] | None = None

    def __init__(
        self,
        stores: JoinedStores,
        index: WindowIndex,
        *,
        features: tuple[str, ...] | Mapping[str, int],
        obs_steps: tuple[str, ...] = (),
        action_steps: tuple[str, ...] = (),
        batch_size: int,
        verify: Verify = "first",
        allocate: Allocate = np.empty,
        shuffle: Shuffle = "global",
        copies: int = 0,
    ) -> None:
        self._stores, self.index, self.batch_size = stores, index, batch_size
        self._verify, self._allocate, self._copies = verify, allocate, copies
        n_obs = index.spec.n_obs
        self._features = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, n_obs)
        wrong = next((name for name, frames in self._features.items() if not 1 <= frames <= n_obs), None)
        if wrong is not None:
            raise UsageError(f"{self._features[wrong]} frames of {wrong!r}", expected=f"1 to n_obs = {n_obs}")
        self._obs_steps = {name: stores.first.steps(name) for name in obs_steps}
        self._action_steps = {name: stores.first.steps(name) for name in action_steps}
        if shuffle == "blocks":
            row_bytes = sum(stores.feature_info(name).row_bytes for name in features)
            self._blocks = Blocks(index.row, stores.first.manifest.unit_rows, row_bytes)

    def shuffled(
        self, seed: int, start: int = 0, depth: int = 3, stop: int | None = None, stride: int = 1
    ) -> Iterator[WindowBatch]:
        """Yield batches start, start+stride, ... (before `stop`, or for ever), shuffled, `depth` of them in flight.

        Of batches that are passed over nothing is read: they are those of other processes.
        """
        numbers = itertools.count(start, stride) if stop is None else iter(range(start, stop, stride))
        chosen = self._choose_blocks(seed, numbers) if self._blocks is not None else self._choose(seed, numbers)
        return self._prefetched(chosen, depth)

    def in_order(self, depth: int = 3) -> Iterator[WindowBatch]:
        """Yield every window once, in order; the last batch may be smaller."""
        count = len(self.index)
        parts = (np.arange(at, min(at + self.batch_size, count)) for at in range(0, count, self.batch_size))
        # The kernel sees by itself that a file is read from end to end.
        chosen = (((windows, np.zeros(len(windows), np.uint8)), np.empty(0, np.int64)) for windows in parts)
        return self._prefetched(chosen, depth)

    def windows_of_batch(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the windows [B] of batch `number` of the shuffled stream."""
        return self.draw_of_batch(seed, number)[0]

    def draw_of_batch(self, seed: int, number: int) -> _Draw:
        """Return the windows [B] of batch `number` and the copy that each is read from [B], in ascending order."""
        count, first = len(self.index), number * self.batch_size
        windows, copies = [], []
        for epoch in range(first // count, (first + self.batch_size - 1) // count + 1):
            at = first - epoch * count
            order, drawn = self._epoch(seed, epoch)
            every = order.windows if isinstance(order, BlockOrder) else order
            windows.append(every[max(at, 0) : at + self.batch_size])
            copies.append(drawn[windows[-1]])
        chosen, of = np.concatenate(windows), np.concatenate(copies)
        by_copy = np.argsort(of, kind="stable")
        return chosen[by_copy], of[by_copy]

    def _epoch(self, seed: int, epoch: int) -> tuple[NDArray[np.int64] | BlockOrder, NDArray[np.uint8]]:
        """Return the order of an epoch, and the copy that each window [N] is read from in it."""
        cached = self._cached
        if cached is None or cached[:2] != (seed, epoch):
            order: NDArray[np.int64] | BlockOrder
            if self._blocks is not None:
                order = self._blocks.order(seed, epoch)
            else:
                order = np.random.default_rng([seed, epoch]).permutation(len(self.index))
            cached = self._cached = (seed, epoch, order, self._drawn(seed, epoch))
        return cached[2:]

    def _drawn(self, seed: int, epoch: int) -> NDArray[np.uint8]:
        if not self._copies:
            return np.zeros(len(self.index), np.uint8)
        draws = len(self.index) if self._blocks is None else len(self._blocks)
        # The 1 tells this generator from the one that shuffles.
        drawn = np.random.default_rng([seed, epoch, 1]).integers(0, self._copies + 1, draws, np.uint8)
        return drawn if self._blocks is None else drawn[self._blocks.of_window]

    def _choose(self, seed: int, numbers: Iterator[int]) -> Iterator[_Choice]:
        """Yield batches by their numbers, each with the places of the next one."""
        first = next(numbers, None)
        if first is None:
            return
        draw = self.draw_of_batch(seed, first)
        soon = self._places(draw)
        for number in numbers:
            following = self.draw_of_batch(seed, number)
            yield draw, np.concatenate([soon, self._places(following)])
            draw, soon = following, np.empty(0, np.int64)
        yield draw, soon

    def _choose_blocks(self, seed: int, numbers: Iterator[int]) -> Iterator[_Choice]:
        """Yield batches by their numbers, each with the places of the blocks that fall due."""
        assert self._blocks is not None
        reached, done = -1, None
        for number in numbers:
            draw = self.draw_of_batch(seed, number)
            epoch, at = divmod(number * self.batch_size, len(self.index))
            order, drawn = self._epoch(seed, epoch)
            assert isinstance(order, BlockOrder)
            blocks, done = order.due(at, self.batch_size, done if epoch == reached else None)
            reached = epoch
            windows = self._blocks.windows(blocks)
            yield draw, self._places((windows, drawn[windows]))

    def _places(self, draw: _Draw) -> NDArray[np.int64]:
        """Return the places of the observations of windows [B], int64 [B * n_obs]."""
        windows, copies = draw
        offset = copies.astype(np.int64) * self._stores.first.manifest.rows
        return (self.index.rows(windows).obs + offset[:, None]).reshape(-1)

    def _prefetched(self, chosen: Iterator[_Choice], depth: int) -> Iterator[WindowBatch]:
        return iterate_ahead(self._batches(chosen, depth + 2), depth)

    def _batches(self, chosen: Iterator[_Choice], buffers: int) -> Iterator[WindowBatch]:
        # One buffer is being filled, `depth` wait in the queue, one is in the consumer's hands: depth + 2 suffice.
        ring = itertools.cycle([self._buffers() for _ in range(buffers)])
        reader_of = self._stores.place_reader if self._copies else self._stores.reader
        readers: dict[str, RowReader] = {name: reader_of(name, self._verify) for name in self._features}
        places = self._stores.first.manifest.rows * (self._copies + 1)
        readahead = Readahead(readers.values(), places, again=self._blocks is not None)
        try:
            for draw, soon in chosen:
                readahead.announce(soon)
                yield self._fill(draw, next(ring), readers)
        finally:
            readahead.close()
            for reader in readers.values():
                reader.close()

    def _buffers(self) -> dict[str, NDArray[Any]]:
        size, buffers = self.batch_size, {}
        for name, frames in self._features.items():
            info = self._stores.feature_info(name)
            buffers[name] = self._allocate((size * frames, *info.shape), info.stored)
        return buffers

    def _fill(self, draw: _Draw, buffers: dict[str, NDArray[Any]], readers: dict[str, RowReader]) -> WindowBatch:
        rows, places = self.index.rows(draw[0]), self._places(draw)
        count, n_obs = rows.obs.shape
        features, scales = {}, {}
        for name, reader in readers.items():
            frames = self._features[name]
            wanted = places.reshape(count, n_obs)[:, n_obs - frames :].reshape(-1)
            out = buffers[name][: count * frames]
            reader.read(wanted, out)
            features[name] = out.reshape(count, frames, *out.shape[1:])
            factors = reader.scales(wanted)
            if factors is not None:
                scales[name] = factors.reshape(count, frames, -1)
        return WindowBatch(
            features,
            {name: values[rows.obs] for name, values in self._obs_steps.items()},
            rows.obs_valid,
            {name: values[rows.action] for name, values in self._action_steps.items()},
            rows.action_valid,
            rows.task,
            rows.label,
            scales,
        )
