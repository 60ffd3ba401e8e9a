"""Lines on numbers that a training meets badly: constant columns, and those that a normalisation takes far beyond 1.

`vla inspect` prints them for a store and for raw demonstrations, `vla train-head` for its training split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vla.stores.dtypes import INTEGERS
from vla.stores.ranges import (
    LARGEST_NORMALISED,
    SHOWN_PLACES,
    Norm,
    constant_columns,
    is_constant,
    large_numbers,
    normalisation_of,
)
from vla.stores.store import Store
from vla.stores.tables import EpisodeTable

Place = Callable[[int], str]
"""Position in the values [N, D] to words, such as "episode 'e1', row 5"."""


def place_in(table: EpisodeTable, rows: NDArray[np.int64]) -> Place:
    """Return the words for a position among store rows [N]."""

    def place(position: int) -> str:
        row = int(rows[position])
        episode = int(np.searchsorted(table.row_start, row, side="right")) - 1
        return f"episode {table.ids[episode]!r}, row {row - int(table.row_start[episode])}"

    return place


def column_notes(
    what: str,
    values: NDArray[Any],
    names: Sequence[str],
    place: Place,
    valid: NDArray[np.bool_] | None = None,
) -> list[str]:
    """Return lines on finite values [N, D] of a column `what`, for both normalisations of openpi.

    `names` of the dimensions; () for their numbers. `valid` [N, D]: the entries that count.
    """
    if not len(values):
        return []
    constant = constant_columns(values, valid)
    lines = constant_note(what, names, constant)
    for norm in get_args(Norm):
        lines += large_notes(what, norm, values, *normalisation_of(values, norm, valid), names, place, valid)
    return lines


def constant_note(what: str, names: Sequence[str], constant: NDArray[np.bool_]) -> list[str]:
    """Return the line that lists the constant dimensions [D] of a column; [] for none."""
    still = ", ".join(_name(names, d) for d in np.flatnonzero(constant).tolist())
    return [f"{what}: constant in every row: {still}"] if still else []


def large_notes(
    what: str,
    norm: str,
    values: NDArray[Any],
    centre: NDArray[Any],
    scale: NDArray[Any],
    names: Sequence[str],
    place: Place,
    valid: NDArray[np.bool_] | None = None,
) -> list[str]:
    """Return a line for each dimension whose normalised numbers exceed 10: the largest, and in which rows."""
    lines = []
    for found in large_numbers(values, centre, scale, valid):
        rows = "; ".join(place(row) for row in found.rows[:SHOWN_PLACES].tolist())
        more = f" and {found.count - SHOWN_PLACES} more" if found.count > SHOWN_PLACES else ""
        name = f"{what} {_name(names, found.column)}"
        lines.append(
            f"{name}: {found.largest:.3g} after {norm} normalisation (value {found.value:.6g}) in {rows}{more}"
        )
    return lines


def feature_note(store: Store, feature: str) -> list[str]:
    """Return the line on channels whose standardised numbers exceed 10, from the statistics; [] for none."""
    statistics = store.statistics(feature)
    if not statistics.count or store.feature_info(feature).dtype in INTEGERS:
        return []
    moves = ~is_constant(statistics.min, statistics.max) & (statistics.std > 0)
    std = np.where(moves, statistics.std, np.inf)
    above, below = (statistics.max - statistics.mean) / std, (statistics.mean - statistics.min) / std
    largest = np.maximum(above, below)
    if not (largest > LARGEST_NORMALISED).any():
        return []
    channel = int(largest.argmax())
    value = float(statistics.max[channel] if above[channel] >= below[channel] else statistics.min[channel])
    count = int((largest > LARGEST_NORMALISED).sum())
    where = _rows_with(store, feature, channel, value)
    return [
        f"feature {feature}: {count} of {len(largest)} channels beyond {LARGEST_NORMALISED:g} after standardising, the "
        f"largest {largest[channel]:.3g} in channel {channel} (value {value:.6g}), {where}"
    ]


def _rows_with(store: Store, feature: str, channel: int, value: float) -> str:
    """Return in which episode and row the value of a channel is. Reads the first unit whose range reaches it."""
    for unit in sorted(store.commits):
        of_unit = store.unit_statistics(feature, unit)
        if value not in (of_unit.min[channel], of_unit.max[channel]):
            continue
        rows = store.manifest.unit_range(unit)
        first, last = (place_in(store.episodes, np.array([row]))(0) for row in (rows.start, rows.stop - 1))
        return f"between {first} and {last}"
    raise AssertionError("the range of a store is that of one of its units")


def store_notes(store: Store) -> list[str]:
    """Return the lines on actions, states and features of a store, over its usable episodes."""
    lines = []
    rows = np.flatnonzero(np.repeat(store.usable, store.episodes.length))
    place = place_in(store.episodes, rows)
    for name, info in store.manifest.steps.items():
        if info.role not in ("action", "state") or not info.dtype.startswith("float") or len(info.shape) > 2:
            continue
        values = store.steps(name)[rows]
        values = values.reshape(len(rows), -1) if len(info.shape) < 2 else values
        real = _real(store, name, values.shape, rows)
        if values.ndim == 3:  # a chunk of steps in each row
            horizon = values.shape[1]
            flat, mask = values.reshape(-1, values.shape[2]), real.reshape(-1, values.shape[2])
            lines += column_notes(name, flat, info.names, lambda at, h=horizon: place(at // h), mask)  # type: ignore[misc]
        else:
            lines += column_notes(name, values, info.names, place, real)
    for feature in store.manifest.plain:
        lines += feature_note(store, feature)
    return lines


def _real(store: Store, name: str, shape: tuple[int, ...], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which entries of a step column count, bool of `shape` [N, D] or [N, H, D]."""
    real = np.ones(shape, bool)
    if f"{name}_valid" in store.manifest.steps:
        real &= store.steps(f"{name}_valid")[rows].astype(bool).reshape(*shape[:-1], 1)
    if f"{name}_dims" in store.manifest.steps:
        real &= store.steps(f"{name}_dims")[rows].astype(bool).reshape(len(rows), *(1,) * (len(shape) - 2), -1)
    return real


def _name(names: Sequence[str], column: int) -> str:
    return names[column] if names else str(column)
