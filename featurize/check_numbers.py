"""Columns that stand still, or are 0, in single episodes while they move in the others: a sensor that died."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.base import SourceIndex

MOST = 0.9
"""Share of the episodes in which a column has to move, for standing still to be a fault in the others: a gripper that
some demonstrations never close is none."""

HALF = 0.5
"""Share of neighbouring rows that are equal in every column, from which a vector counts as stuck part of the time."""

Rows = Mapping[str, Mapping[int, NDArray[np.generic]]]
"""{column: {episode's position: [T, D]}}."""


def ranges(rows: Mapping[int, NDArray[np.generic]]) -> NDArray[np.float64]:
    """Return max - min of each component over all episodes, float64 [D]."""
    lows = np.min([values.min(axis=0) for values in rows.values()], axis=0).astype(np.float64)
    highs = np.max([values.max(axis=0) for values in rows.values()], axis=0).astype(np.float64)
    spread: NDArray[np.float64] = highs - lows
    return spread


def stuck_columns(index: SourceIndex, rows: Rows) -> list[str]:
    """Return one line for each episode and column whose components stand still there and move in most others."""
    lines: list[str] = []
    for column, episodes in rows.items():
        long = {number: values for number, values in episodes.items() if len(values) > 1}
        if len(long) < 3:  # of two, nothing tells which is the fault
            continue
        still = np.array([(values.max(axis=0) == values.min(axis=0)) for values in long.values()])
        usual = (~still).mean(axis=0) >= MOST
        # With few episodes one that stands still is already more than a tenth.
        usual |= (~still).sum(axis=0) >= len(long) - 1
        names = index.steps[column].names or tuple(f"{column}_{i}" for i in range(still.shape[1]))
        for (number, values), fault in zip(long.items(), still & usual, strict=True):
            if fault.any():
                episode = index.episodes[number].id
                which = "every component" if fault.all() else ", ".join(np.array(names)[fault])
                value = " at 0" if not values[:, fault].any() else ""
                lines.append(f"{episode}: {column} stands still{value} in {which}; it moves in the other episodes")
        lines += _partly_stuck(index, column, long, np.all(still, axis=1))
    return lines


def _partly_stuck(
    index: SourceIndex, column: str, rows: Mapping[int, NDArray[np.generic]], whole: NDArray[np.bool_]
) -> list[str]:
    """Name the episodes in which a whole vector repeats its last row for half of the time, where others do not."""
    shares = np.array([(values[1:] == values[:-1]).all(axis=1).mean() for values in rows.values()])
    if np.median(shares) > HALF / 2:
        return []
    return [
        f"{index.episodes[number].id}: {column} repeats the row before in {share:.0%} of its rows"
        for number, share, is_whole in zip(rows, shares, whole, strict=True)
        if share >= HALF and not is_whole
    ]
