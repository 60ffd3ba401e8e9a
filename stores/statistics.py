"""Mean, variance and range of each channel, gathered unit by unit while writing and merged exactly.

Merging follows Chan, Golub and LeVeque (1979): the merged M2 is the sum of both plus delta^2 * n_a * n_b / n, which
loses no precision on features with a large mean. One unit's statistics are one chunk of the array
`stats/<feature>` [units, 5, C], float64, rows: count, mean, M2, min, max.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOMENTS = ("count", "mean", "m2", "min", "max")


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


def of_rows(rows: Iterable[NDArray[Any]], channels: int) -> ChannelStatistics:
    """Statistics of rows [..., C], one row in memory at a time; sums in float64 of float32 values."""
    total = ChannelStatistics.empty(channels)
    for row in rows:
        values = row.reshape(-1, channels).astype(np.float32)
        mean = values.mean(axis=0, dtype=np.float64)
        centred = values - mean.astype(np.float32)
        # The rounding of `mean` to float32 shifts the centre by up to half an ulp; subtracting its square undoes it.
        shift = mean - mean.astype(np.float32)
        m2 = np.square(centred).sum(axis=0, dtype=np.float64) - len(values) * shift**2
        total = total.merge(
            ChannelStatistics(
                len(values),
                mean,
                np.maximum(m2, 0.0),
                values.min(axis=0).astype(np.float64),
                values.max(axis=0).astype(np.float64),
            )
        )
    return total
