"""What is constant, and what a normalisation takes far out of range: rules that hold in every unit of measurement.

No threshold here is a number in the user's units. Numbers travel as float32, so a range is zero where float32's
rounding alone could have made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

CONSTANT_STEPS = 4
"""A range of at most four float32 steps at the value's magnitude (5e-7 of it) is what a few rounded sums leave."""

LEAST_RANGE = 1e-35
"""A smaller range has no reciprocal in float32, whose smallest normal number is 1.2e-38."""

LARGEST_NORMALISED = 10.0
"""Beyond this a normalised number is reported. Limits give 1, a Gaussian's largest of 1e6 samples is 5."""

SHOWN_PLACES = 3
"""Places of large numbers that are named; the others are counted."""

Norm = Literal["quantile", "zscore"]


def is_constant(low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where the range from `low` to `high` (any shape, finite, in any unit) is zero but for rounding."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    magnitude = np.maximum(np.abs(low), np.abs(high)).astype(np.float32)
    constant: NDArray[np.bool_] = high - low <= np.maximum(CONSTANT_STEPS * np.spacing(magnitude), LEAST_RANGE)
    return constant


def constant_columns(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Return which columns of values [N, D] are constant over the entries `valid` [N, D]; False without entries."""
    use = np.ones(values.shape, bool) if valid is None else valid
    low = np.where(use, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(use, values, -np.inf).max(axis=0, initial=-np.inf)
    some = low <= high
    constant: NDArray[np.bool_] = some & is_constant(np.where(some, low, 0.0), np.where(some, high, 0.0))
    return constant


@dataclass(frozen=True)
class LargeNumbers:
    """A column whose normalised numbers exceed `LARGEST_NORMALISED`: `count` of them, the largest magnitude `largest`.

    `value` is the number behind it, in the data's units. `rows`: positions [count] in the values, the largest first.
    """

    column: int
    largest: float
    value: float
    rows: NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many rows hold such a number."""
        return len(self.rows)


def large_numbers(
    values: NDArray[Any],
    centre: NDArray[Any],
    scale: NDArray[Any],
    valid: NDArray[np.bool_] | None = None,
) -> list[LargeNumbers]:
    """Return the columns of values [N, D] where |(x - centre) / scale| exceeds `LARGEST_NORMALISED`, most first.

    `centre`, `scale` [D], scale above 0. Entries that are not `valid` [N, D] do not count.
    """
    found = []
    for d in range(values.shape[1]):
        normalised = np.abs((values[:, d].astype(np.float64) - float(centre[d])) / float(scale[d]))
        if valid is not None:
            normalised[~valid[:, d]] = 0.0
        rows = np.flatnonzero(normalised > LARGEST_NORMALISED)
        if len(rows):
            rows = rows[np.argsort(-normalised[rows], kind="stable")]
            found.append(LargeNumbers(d, float(normalised[rows[0]]), float(values[rows[0], d]), rows))
    return sorted(found, key=lambda each: -each.largest)


def normalisation_of(
    values: NDArray[Any], norm: Norm, valid: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centre and scale [D] of values [N, D]: of the 1st and 99th percentile, or of mean and deviation.

    Constant columns, and those whose percentiles coincide, get scale infinity: their normalised numbers are 0.
    """
    D = values.shape[1]
    centre, scale = np.zeros(D), np.full(D, np.inf)
    for d in range(D):
        column = values[:, d] if valid is None else values[valid[:, d], d]
        column = column.astype(np.float64)
        if not len(column) or is_constant(column.min(), column.max()):
            continue
        if norm == "zscore":
            centre[d], scale[d] = column.mean(), column.std()
            continue
        low, high = np.quantile(column, (0.01, 0.99))
        if not is_constant(low, high):
            centre[d], scale[d] = (low + high) / 2, (high - low) / 2
    return centre, scale
