"""Batches of windows: a thread fills a ring of reused buffers from the store while the consumer works.

Which windows make up batch k is a function of (seed, k) alone: the stream of windows is one seeded permutation after
another, cut into batches of equal size, so that training resumes at any batch and repeats exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.background import iterate_ahead
from vla.stores.join import JoinedReader, JoinedStores
from vla.stores.reader import Verify
from vla.stores.windows import WindowIndex

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]


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
    """

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
    ) -> None:
        self._stores, self.index, self.batch_size = stores, index, batch_size
        self._features, self._verify, self._allocate = features, verify, allocate
        self._obs_steps = {name: stores.first.steps(name) for name in obs_steps}
        self._action_steps = {name: stores.first.steps(name) for name in action_steps}

    def shuffled(self, seed: int, start: int = 0, depth: int = 3) -> Iterator[WindowBatch]:
        """Yield batches start, start+1, ... for ever, shuffled, `depth` of them in flight."""
        chosen = (self.windows_of_batch(seed, number) for number in itertools.count(start))
        return self._prefetched(chosen, depth)

    def in_order(self, depth: int = 3) -> Iterator[WindowBatch]:
        """Yield every window once, in order; the last batch may be smaller."""
        count = len(self.index)
        chosen = (np.arange(at, min(at + self.batch_size, count)) for at in range(0, count, self.batch_size))
        return self._prefetched(chosen, depth)

    def windows_of_batch(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the windows [B] of batch `number` of the shuffled stream."""
        count, first = len(self.index), number * self.batch_size
        parts = []
        for epoch in range(first // count, (first + self.batch_size - 1) // count + 1):
            at = first - epoch * count
            parts.append(self._permutation(seed, epoch)[max(at, 0) : at + self.batch_size])
        return np.concatenate(parts)

    _cached: tuple[int, int, NDArray[np.int64]] | None = None

    def _permutation(self, seed: int, epoch: int) -> NDArray[np.int64]:
        cached = self._cached
        if cached is None or cached[:2] != (seed, epoch):
            permutation = np.random.default_rng([seed, epoch]).permutation(len(self.index))
            cached = self._cached = (seed, epoch, permutation)
        return cached[2]

    def _prefetched(self, chosen: Iterator[NDArray[np.int64]], depth: int) -> Iterator[WindowBatch]:
        return iterate_ahead(self._batches(chosen, depth + 2), depth)

    def _batches(self, chosen: Iterator[NDArray[np.int64]], buffers: int) -> Iterator[WindowBatch]:
        # One buffer is being filled, `depth` wait in the queue, one is in the consumer's hands: depth + 2 suffice.
        ring = itertools.cycle([self._buffers() for _ in range(buffers)])
        readers = {name: self._stores.reader(name, self._verify) for name in self._features}
        try:
            for windows in chosen:
                yield self._fill(windows, next(ring), readers)
        finally:
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
