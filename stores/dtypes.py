"""Storage dtypes of features: what the backbone's float32 becomes on disk, and how it comes back.

`float16`, `float32`: as numpy has them. `bfloat16`: the upper half of a float32, rounded to nearest even, kept as
`uint16` (neither numpy nor zarr-python 3.1 nor HDF5 files below 2.0 have it). `int8`: symmetric, one float32 scale a
channel and unit, `x = q * scale`, q in -127..127, the scale from the unit's own magnitudes: units stay independent. One
outlying row widens a grid at most fourfold and saturates beyond. docs/store.md states what each costs.
`uint8`, `int32`: masks and token ids, exactly as they are; a backbone asks for them, `--dtype` leaves them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatName = Literal["float16", "float32", "bfloat16", "int8"]
"""What numbers of a network may be kept as: the user's choice."""

DtypeName = Literal[FloatName, "uint8", "int32"]
STORED: dict[DtypeName, str] = {
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "uint16",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
}
"""What numpy, zarr and HDF5 call the numbers on disk."""

FILL: dict[DtypeName, float] = {
    "float16": np.nan,
    "float32": np.nan,
    "bfloat16": 0x7FC0,
    "int8": 0,
    "uint8": 0,
    "int32": 0,
}
"""What a row never written reads as in a foreign reader: NaN (0x7FC0 is bfloat16's), 0 where there is none."""

LIMIT: dict[DtypeName, float] = {
    "float16": float(np.finfo(np.float16).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
    "int8": 1e38,
    "uint8": 255,
    "int32": 2**31 - 1,
}
"""Largest magnitude kept. For int8 a third of float32's: 127 times a rounded scale must not overflow."""

SPACING: dict[DtypeName, tuple[float, float]] = {
    "float16": (2.0**-10, 2.0**-24),
    "float32": (2.0**-23, 1e-35),
    "bfloat16": (2.0**-7, 1e-35),
    "int8": (1 / 127, 1e-35),
    "uint8": (2.0**-23, 1e-35),
    "int32": (2.0**-23, 1e-35),
}
"""The largest step between neighbouring numbers, relative to their magnitude (int8: to the unit's largest), and the
smallest number that a deviation can be told from: whole numbers are as float32 has them."""

INTEGERS: tuple[DtypeName, ...] = ("uint8", "int32")
"""Kept exactly, and never another dtype's stand-in."""

INT8_MAX = 127
"""-128 is not used: the grid is symmetric."""

TINY_ROW = 1e-30
"""Below this magnitude float32 is near its smallest normal number, 1.2e-38, and ratios lose digits."""

OUTLIER_SHARE = 40
"""One row in so many may be an outlier of a channel, and one row of 20 or more."""

WIDENING = 4
"""Times that outliers may widen a grid: an ordinary row then still has 127 / 4 steps each way. Of 256 Gaussian or
Laplacian rows the largest is less than twice the seventh: their grids stay those of the largest magnitude."""

MAX_ROUNDING_ERROR = 0.1
"""A unit whose rows lose more than this to rounding, relative L2, the mean over rows, is refused. int8 costs
EfficientNet's features 0.01, log-normal ones 0.05, and Gaussian ones 0.05 where one row in forty is an outlier; an
erased row costs 1."""

MAX_ERASED_CHANNELS = 0.5
"""A unit that loses more than this share of its channels is refused: beside one channel of 1e6 the error of a row is
near 0 though the other channels are gone. Fewer are reported: a channel that rarely fires may well have an output of
next to nothing in most rows, and loses nothing by their zeros."""


def encode_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, to nearest even, as uint16 bit patterns of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def decode_bfloat16(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Invert `encode_bfloat16`, exactly."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def channel_scales(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the step of the int8 grid of each channel, float32 [C], for rows [n, ..., C].

    max |x| / 127, but at most `WIDENING` times what the rows without their outliers need: without the k largest of the
    rows that are not 0 in a channel, k one in forty, at least one of twenty. A single frame of 3e4 would otherwise
    round every other frame to 0.
    """
    largest = np.zeros((len(rows), rows.shape[-1]), np.float32)
    for place, row in enumerate(rows):  # row by row: no temporary as large as the unit
        largest[place] = np.abs(row).reshape(-1, rows.shape[-1]).max(axis=0)
    if not len(rows):
        return np.zeros(rows.shape[-1], np.float32)
    ordered = -np.sort(-largest, axis=0)
    used = np.count_nonzero(largest, axis=0)
    outliers = np.maximum(used // OUTLIER_SHARE, used >= OUTLIER_SHARE // 2)
    ordinary = np.take_along_axis(ordered, outliers[None], axis=0)[0]
    # Bounded before it is multiplied: four times the largest number leaves float32.
    widest = np.float32(WIDENING) * np.minimum(ordinary, np.float32(LIMIT["int8"] / WIDENING))
    scales: NDArray[np.float32] = np.minimum(ordered[0], widest) / np.float32(INT8_MAX)
    return scales


@dataclass(frozen=True)
class Rounding:
    """What rounding cost the rows of one feature: `error`, the relative L2 error of a row, the mean over rows, in
    0..1; `saturated`, the share of numbers beyond the grid, in 0..1; `erased`, the share of channels most of whose
    rows were rounded to 0, None in records of earlier versions."""

    error: float
    saturated: float
    erased: float | None = None


def row_error(values: NDArray[np.float32], back: NDArray[np.float32]) -> float:
    """Return the relative L2 error of one row, any shape: |back - values| / |values|, 0 for a row of zeros."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    # Divided first: squares of 1e30 leave float32. float64 only where float32 is below its normal range.
    dtype = np.dtype(np.float64 if largest < TINY_ROW else np.float32)
    wanted, found = (np.divide(row, largest, dtype=dtype) for row in (values, back))
    return float(np.linalg.norm(np.subtract(found, wanted, out=found)) / np.linalg.norm(wanted))


def quantise(values: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return the nearest points of the grid, int8, for values [..., C]; 0 in channels whose scale is 0."""
    steps = np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)
    np.rint(steps, out=steps)
    return np.clip(steps, -INT8_MAX, INT8_MAX, out=steps).astype(np.int8)


def decode(dtype: DtypeName, stored: NDArray[Any], scales: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Return the values that stored rows [n, ..., C] stand for: float16 and whole numbers as they are, else float32.

    `scales` float32 [C] or broadcastable to the rows; needed for int8.
    """
    if dtype == "bfloat16":
        return decode_bfloat16(stored)
    if dtype == "int8":
        if scales is None:
            raise ValueError("int8 rows without scales")
        return stored.astype(np.float32) * scales
    return stored
