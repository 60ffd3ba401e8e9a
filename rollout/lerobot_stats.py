"""The statistics that LeRobot v3.0 keeps for every feature: min, max, mean, std, count and five quantiles.

LeRobot estimates quantiles and samples images; these are exact, images included, because a picture's values are
256 levels and a histogram of them adds up over episodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
LEVELS = 256

Stats = dict[str, Any]
"""Statistic to nested lists: [D] for a vector, [1] for a scalar, [3][1][1] in [0, 1] for images; `count` is [1]."""


def column_stats(values: NDArray[np.generic]) -> Stats:
    """Statistics over the first axis of `values` [T] or [T, D]; std is the population's."""
    table = values.astype(np.float64).reshape(len(values), -1)
    quantiles = np.quantile(table, list(QUANTILES.values()), axis=0)
    return {
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
        "mean": table.mean(axis=0).tolist(),
        "std": table.std(axis=0).tolist(),
        "count": [len(table)],
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    }


def image_histogram(images: list[Image]) -> NDArray[np.int64]:
    """Count the levels of each colour over all pixels of `images` (uint8 [H, W, 3]): int64 [3, 256]."""
    pixels = np.stack(images).reshape(-1, 3)
    return np.stack([np.bincount(pixels[:, channel], minlength=LEVELS) for channel in range(3)])


def image_stats(histogram: NDArray[np.int64], frames: int) -> Stats:
    """Statistics of pictures in [0, 1] from their histogram [3, 256]; `frames` is what `count` reports."""
    levels = np.arange(LEVELS) / (LEVELS - 1)
    pixels = histogram.sum(axis=1)
    mean = histogram @ levels / pixels
    variance = (histogram * (levels[None, :] - mean[:, None]) ** 2).sum(axis=1) / pixels
    seen = histogram > 0
    values = {
        "min": levels[seen.argmax(axis=1)],
        "max": levels[LEVELS - 1 - seen[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(variance),
        **{name: _quantile(histogram, share) for name, share in QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()} | {"count": [frames]}


def _quantile(histogram: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """The linearly interpolated quantile (numpy's default) of the pixels behind a histogram: float64 [3]."""
    position = share * (histogram.sum(axis=1) - 1)
    below = np.floor(position)
    cumulative = histogram.cumsum(axis=1)
    # The k-th smallest pixel (from 0) is the first level with more than k pixels at or below it.
    low = (cumulative <= below[:, None]).sum(axis=1)
    high = (cumulative <= np.ceil(position)[:, None]).sum(axis=1)
    result: NDArray[np.float64] = (low + (position - below) * (high - low)) / (LEVELS - 1)
    return result
