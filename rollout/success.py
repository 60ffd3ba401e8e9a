"""Success rates with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution: two-sided 95 %."""


@dataclass(frozen=True)
class SuccessRate:
    """`successes` of `episodes`, with the 95 % Wilson score interval `low`..`high`, shares in [0, 1]."""

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """Share of successes."""
        return self.successes / self.episodes if self.episodes else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval (Wilson 1927): stays inside [0, 1] and is honest at 0 and at 1."""
        n, p = self.episodes, self.rate
        if n == 0:
            return 0.0, 1.0
        centre = p + Z_95**2 / (2 * n)
        spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        scale = 1 + Z_95**2 / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.successes}/{self.episodes} = {self.rate:.2f} [{low:.2f}, {high:.2f}]"
