"""Depth Anything 3's own resizing of pictures: the longest side to a bound, then each side to whole patches.

The published processor calls OpenCV: INTER_AREA where a picture shrinks and INTER_CUBIC where it grows, each step
rounded to uint8. Both filters are restated here from their definitions, so that nothing but numpy is needed:
- area: an output cell is the average of the input it covers, cells covered in part counted in part;
- cubic: Keys' kernel with a = -0.75 over 4 neighbours (Pillow's bicubic has a = -0.5), the border repeated.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.stores.errors import DataError

PATCH = 14
"""Pixels a side of a DINOv2 patch."""

CUBIC_A = -0.75
"""Slope of Keys' kernel (1981) at distance 1: OpenCV's value."""

Taps = tuple[NDArray[np.intp], NDArray[np.float32]]
"""For each output cell, the input cells that it reads and their weights: [cells, taps] each."""


def upper_bound_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return (h, w) of the network's input for a picture: longest side `size`, both multiples of 14, the nearest ones.

    Raises `DataError` for a picture so narrow that a side would be less than half a patch.
    """
    h, w = (_nearest_multiple(side) for side in _bounded(height, width, size))
    if min(h, w) == 0:
        found = f"a picture of {height}x{width} has no {PATCH} px patch along its short side at size {size}"
        raise DataError(found, expected=f"sides in a ratio of at most {2 * size // PATCH}")
    return h, w


def resize_upper_bound(image: Image, size: int) -> Image:
    """Resize [H, W, 3] uint8 to `upper_bound_shape`, uint8.

    Raises `DataError` for anything but an RGB uint8 picture, or one that is too narrow.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise DataError(f"a picture of shape {image.shape}, {image.dtype}", expected="[H, W, 3] uint8, RGB")
    height, width = image.shape[:2]
    target = upper_bound_shape(height, width, size)
    bounded = _bounded(height, width, size)
    image = _resize(image, bounded, cubic=max(height, width) < size)
    # One side may grow by some pixels and the other shrink: the published processor then uses the cubic for both.
    return _resize(image, target, cubic=target[0] > bounded[0] or target[1] > bounded[1])


def _bounded(height: int, width: int, size: int) -> tuple[int, int]:
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _nearest_multiple(side: int) -> int:
    """Round to a multiple of the patch, halves up."""
    return (side + PATCH // 2) // PATCH * PATCH


def _resize(image: Image, target: tuple[int, int], *, cubic: bool) -> Image:
    if image.shape[:2] == target:
        return image
    values = image.astype(np.float32)
    for count in target:  # rows first; each pass swaps the axes, so that it always reads whole rows
        if count != len(values):
            values = _combine(values, (_cubic_taps if cubic else _area_taps)(len(values), count))
        values = np.ascontiguousarray(values.swapaxes(0, 1))
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _combine(values: NDArray[np.float32], taps: Taps) -> NDArray[np.float32]:
    """Weighted sums of the rows of [rows, ...]."""
    total = np.zeros((len(taps[0]), *values.shape[1:]), np.float32)
    part = np.empty_like(total)
    for cells, weights in zip(taps[0].T, taps[1].T, strict=True):
        np.take(values, cells, axis=0, out=part, mode="clip")  # any mode but "raise" writes without a copy
        part *= weights[:, None, None]
        total += part
    return total


def _area_taps(before: int, after: int) -> Taps:
    scale = before / after
    begin = np.arange(after)[:, None] * scale
    cells = np.floor(begin) + np.arange(math.ceil(scale) + 1)
    covered = np.minimum(cells + 1, begin + scale) - np.maximum(cells, begin)
    return cells.clip(0, before - 1).astype(np.intp), (covered.clip(0, None) / scale).astype(np.float32)


def _cubic_taps(before: int, after: int) -> Taps:
    centre = (np.arange(after)[:, None] + 0.5) * (before / after) - 0.5
    cells = np.floor(centre) + np.arange(-1, 3)
    x, a = np.abs(centre - cells), CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return cells.clip(0, before - 1).astype(np.intp), np.where(x <= 1, near, far).astype(np.float32)
