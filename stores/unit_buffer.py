"""One unit in memory while it is being filled: rows checked, encoded in the store's dtype, marked as present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.dtypes import (
    INT8_MAX,
    INTEGERS,
    LIMIT,
    MAX_ERASED_CHANNELS,
    MAX_ROUNDING_ERROR,
    Rounding,
    channel_scales,
    decode,
    encode_bfloat16,
    quantise,
    row_error,
)
from vla.stores.errors import DataError
from vla.stores.manifest import FeatureInfo, Manifest
from vla.stores.shard import ShardBuffer
from vla.stores.statistics import ChannelStatistics, of_rows

SMALL_FLOAT16 = 1e-3
"""A float16 row whose largest magnitude is below this may lose more than 1 % to the steps of 6e-8 around zero."""


class FeatureBuffer:
    """The rows of one feature in one unit. int8 rows wait as float32: their scales are known when all are there.

    `rounding`: what int8 cost, once finished; None for other dtypes.
    """

    def __init__(self, name: str, info: FeatureInfo, rows: int, slots: int) -> None:
        self.name, self.info = name, info
        self.shard = ShardBuffer.allocate(info, rows, slots)
        self.scales: NDArray[np.float32] | None = None
        self.rounding: Rounding | None = None
        self._lost = np.zeros(rows)  # relative error of float16 rows of tiny numbers
        self._waiting = np.zeros((rows, *info.shape), np.float32) if info.dtype == "int8" else None

    def put(self, at: int, values: NDArray[Any], row: int) -> None:
        """Take values [k, *shape] for the unit's rows from `at` on; `row` is the store row, for messages.

        Raises `DataError` on another shape, on NaN or infinity, and on values that the dtype cannot hold.
        """
        target = self.shard.rows if self._waiting is None else self._waiting
        if values.shape != (len(values), *target.shape[1:]):
            wanted = (len(values), *target.shape[1:])
            raise DataError(f"feature {self.name!r} has shape {values.shape}", expected=f"{wanted}")
        largest = _require_representable(self.name, values, self.info, row)
        encoded = encode_bfloat16(values) if self.info.dtype == "bfloat16" else values
        target[at : at + len(values)] = encoded
        if self.info.dtype == "float16" and values.dtype != np.float16:
            for small in np.flatnonzero((largest > 0) & (largest < SMALL_FLOAT16)).tolist():
                self._lost[at + small] = row_error(values[small], target[at + small].astype(np.float32))

    def put_stored(self, at: int, stored: NDArray[Any], scales: NDArray[np.float32] | None) -> None:
        """Take rows [k, *shape] as another store holds them, with the scales [C] of their unit."""
        self._waiting, self.scales = None, scales
        self.shard.rows[at : at + len(stored)] = stored

    def finish(self, present: NDArray[np.bool_]) -> ChannelStatistics:
        """Encode what waits, and return the statistics of the values that the rows present [n] stand for.

        Raises `DataError` where the dtype loses more than `MAX_ROUNDING_ERROR` of the rows, or more than
        `MAX_ERASED_CHANNELS` of the channels.
        """
        if self._waiting is not None:
            self.rounding = self._quantise(self._waiting, np.flatnonzero(present))
            self._waiting = None
        error = self.rounding.error if self.rounding is not None else float(self._lost[present].sum())
        error = error if self.rounding is not None else error / max(int(present.sum()), 1)
        fix = "--dtype float16 or float32" if self.info.dtype == "int8" else "--dtype bfloat16 or float32"
        if error > MAX_ROUNDING_ERROR:
            found = f"feature {self.name!r} loses {error:.0%} of its rows to {self.info.dtype}"
            raise DataError(found, expected=f"at most {MAX_ROUNDING_ERROR:.0%} a unit", fix=fix)
        erased = (self.rounding.erased or 0.0) if self.rounding is not None else 0.0
        if erased > MAX_ERASED_CHANNELS:
            found = f"feature {self.name!r} loses {erased:.0%} of its channels to int8"
            raise DataError(found, expected=f"at most {MAX_ERASED_CHANNELS:.0%} a unit", fix=fix)
        stored = self.shard.rows if present.all() else self.shard.rows[present]
        return of_rows(stored, self.info.shape[-1], lambda rows: decode(self.info.dtype, rows, self.scales))

    def _quantise(self, waiting: NDArray[np.float32], kept: NDArray[np.int64]) -> Rounding:
        """Encode the rows `kept` as int8; return what that costs."""
        self.scales = channel_scales(waiting if len(kept) == len(waiting) else waiting[kept])
        edge = self.scales * np.float32(INT8_MAX + 0.5)
        error, saturated = 0.0, 0
        used, zeroed = np.zeros((2, len(self.scales)), np.int64)  # rows of each channel
        for row in kept:
            values, stored = waiting[row], quantise(waiting[row], self.scales)
            self.shard.rows[row] = stored
            error += row_error(values, decode("int8", stored, self.scales))
            saturated += int(np.count_nonzero(np.abs(values) > edge))
            before, after = (each.reshape(-1, len(self.scales)).any(axis=0) for each in (values, stored))
            used += before
            zeroed += before & ~after
        count = max(len(kept), 1)
        return Rounding(error / count, saturated / (count * waiting[0].size), float((2 * zeroed > used).mean()))


@dataclass
class UnitBuffer:
    """The rows of one unit being filled, in memory.

    `steps[name]` is `[n, *shape]`; features come in through `put`; rows not marked in `present` [n] stay empty.
    `skipped` names episodes left out and why. `statistics` and `rounding` overrule what would be computed (a converted
    unit's).
    """

    unit: int
    rows: range
    features: dict[str, FeatureBuffer]
    steps: dict[str, NDArray[Any]]
    present: NDArray[np.bool_]
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[range] = field(default_factory=list)
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def leave_out(self, episode: str, rows: range, reason: str) -> None:
        """Leave an episode out of the store; `rows` are those of its rows that lie in this unit."""
        self.skipped[episode] = reason
        self.dropped.append(rows)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which rows are to be committed, bool [n]: all but those of episodes left out."""
        rows = np.ones(len(self.rows), bool)
        for dropped in self.dropped:
            rows[dropped.start - self.rows.start : dropped.stop - self.rows.start] = False
        return rows

    def put(self, start: int, features: Mapping[str, NDArray[Any]]) -> None:
        """Store every feature `{name: [k, *shape]}` of k rows from store row `start` on.

        Raises `DataError` on names, shapes or rows that are not this unit's, and on NaN or infinity, also where
        float32 values overflow the store's dtype.
        """
        at, count = self._place(start, features)
        for name, values in features.items():
            if len(values) != count:
                raise DataError(f"feature {name!r} has shape {values.shape}", expected=f"{count} rows")
            self.features[name].put(at, values, start)
        self.present[at : at + count] = True

    def put_stored(
        self, start: int, features: Mapping[str, NDArray[Any]], scales: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Store rows as another store of the same manifest holds them, bit for bit; `scales` of the int8 ones [C]."""
        at, count = self._place(start, features)
        for name, stored in features.items():
            self.features[name].put_stored(at, stored, scales.get(name))
        self.present[at : at + count] = True

    def _place(self, start: int, features: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
        at = start - self.rows.start
        count = len(next(iter(features.values()), ()))
        if features.keys() != self.features.keys() or not 0 <= at <= at + count <= len(self.rows):
            raise DataError(
                f"features {sorted(features)} for rows {start}..{start + count - 1}",
                expected=f"{sorted(self.features)} in rows {self.rows.start}..{self.rows.stop - 1}",
            )
        return at, count


def unit_buffer(manifest: Manifest, unit: int) -> UnitBuffer:
    """Allocate the buffers of a unit."""
    rows, slots = manifest.unit_range(unit), manifest.unit_rows
    features = {name: FeatureBuffer(name, info, len(rows), slots) for name, info in manifest.features.items()}
    steps = {name: _blank(slots, info.shape, info.dtype) for name, info in manifest.steps.items()}
    return UnitBuffer(unit, rows, features, steps, np.zeros(len(rows), bool))


def empty_value(dtype: np.dtype[Any]) -> float:
    """What stands in rows that hold nothing."""
    return np.nan if np.issubdtype(dtype, np.floating) else 0


def _blank(rows: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.full((rows, *shape), empty_value(np.dtype(dtype)), np.dtype(dtype).newbyteorder("<"))


def _require_representable(name: str, values: NDArray[Any], info: FeatureInfo, start: int) -> NDArray[np.float64]:
    """Return the largest magnitude of each row [k]; 0 for whole numbers. Raises `DataError` naming a bad row."""
    limit = LIMIT[info.dtype]
    if info.dtype in INTEGERS:
        lowest = np.iinfo(info.stored).min
        fits = lowest <= float(values.min(initial=0.0)) and float(values.max(initial=0.0)) <= limit
        if not fits or not np.array_equal(values, np.rint(values)):
            raise DataError(f"feature {name!r} is not all {info.dtype} from row {start} on", expected="whole numbers")
        return np.zeros(len(values))
    flat = values.reshape(len(values), values[:1].size) if len(values) else values.reshape(0, 1)
    # Two passes and no copy; NaN passes through min and max, and every comparison with it is false.
    largest: NDArray[np.float64] = np.maximum(-flat.min(axis=1, initial=0.0), flat.max(axis=1, initial=0.0)).astype(
        np.float64
    )
    if (largest <= limit).all():
        return largest
    finite = np.isfinite(flat).all(axis=1)
    if not finite.all():
        raise DataError(f"feature {name!r} is not finite in row {start + int(finite.argmin())}")
    row = start + int((np.abs(flat).max(axis=1) > limit).argmax())
    raise DataError(
        f"feature {name!r} exceeds {info.dtype} in row {row}", expected=f"|x| <= {limit:.6g}", fix="--dtype float32"
    )
