"""Mean, variance and range of each channel, gathered unit by unit while writing and merged exactly.

Merging follows Chan, Golub and LeVeque (1979): the merged M2 is the sum of both plus delta^2 * n_a * n_b / n, which
loses no precision on features with a large mean. One unit's statistics are one chunk of the array
`stats/<feature>` [units, 5, C], float64, rows: count, mean, M2, min, max.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOMENTS = ("count", "mean", "m2", "min", "max")
BLOCK_VALUES = 1 << 17
"""Values summed at once: few enough to stay in a core's cache, enough to hide the cost of a numpy call."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics over rows, views and positions: `count` values a channel; the rest float64 [C]."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]

    @property
    def std(self) -> NDArray[np.float64]:
        """Population standard deviation [C]."""
        return np.sqrt(self.m2 / max(self.count, 1))

    def to_array(self) -> NDArray[np.float64]:
        """Return [5, C] in the order of `MOMENTS`."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.m2, self.min, self.max])

    @classmethod
    def from_array(cls, values: NDArray[np.float64]) -> ChannelStatistics:
        """Invert `to_array`."""
        return cls(int(values[0, 0]), values[1], values[2], values[3], values[4])

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        """Return the neutral element of merging."""
        zeros = np.zeros(channels)
        return cls(0, zeros, zeros, np.full(channels, np.inf), np.full(channels, -np.inf))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the statistics of both samples together."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return ChannelStatistics(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
        )


def of_rows(
    rows: NDArray[Any], channels: int, decode: Callable[[NDArray[Any]], NDArray[Any]] = lambda rows: rows
) -> ChannelStatistics:
    """Statistics of rows [n, ..., C], in float64, about a megabyte of them in memory at a time.

    `decode` turns stored rows into the values that they stand for.
    """
    total = ChannelStatistics.empty(channels)
    step = max(1, BLOCK_VALUES // max(math.prod(rows.shape[1:]), 1))
    for at in range(0, len(rows), step):
        values = decode(rows[at : at + step]).astype(np.float64).reshape(-1, channels)
        low, high, mean = values.min(axis=0), values.max(axis=0), values.mean(axis=0)
        values -= mean
        m2 = np.einsum("ij,ij->j", values, values)
        total = total.merge(ChannelStatistics(len(values), mean, m2, low, high))
    return total
