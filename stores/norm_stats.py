"""openpi's `norm_stats.json`: mean, standard deviation, 1st and 99th percentile of states and actions.

    {"norm_stats": {"state": {"mean": [D], "std": [D], "q01": [D], "q99": [D]}, "actions": {…}}}

The layout of `src/openpi/shared/normalize.py` in https://github.com/Physical-Intelligence/openpi, where q01 and q99 may
be null. openpi estimates its percentiles from histograms of 5000 bins; these are exact. It also computes them over
what its transforms make of the actions (differences to the state, say); these are over the actions as stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.documents import read_json_file
from vla.stores.errors import DataError, UsageError
from vla.stores.filesystem import explaining
from vla.stores.store import Store

NAMES = {"state": "state", "action": "actions"}
"""Our names of the columns to openpi's."""


@dataclass(frozen=True)
class NormStats:
    """Statistics of D components, float64 [D] each; `std` is the population's."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    q01: NDArray[np.float64] | None = None
    q99: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, values: NDArray[Any]) -> NormStats:
        """Compute from values [N, D], N >= 1, finite. Raises `DataError`."""
        if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
            raise DataError(f"statistics over values of shape {values.shape}", expected="finite [N >= 1, D]")
        # Contiguous: the order of a sum follows the memory, and equal numbers should give equal statistics.
        values = np.ascontiguousarray(values, np.float64)
        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(values.mean(axis=0), values.std(axis=0), q01, q99)


def norm_stats_of(store: Store) -> dict[str, NormStats]:
    """Return openpi's names to statistics, over the usable episodes of a store.

    Raises `DataError` where no episode is usable; a store without a state has "actions" alone.
    """
    rows = np.repeat(store.usable, store.episodes.length)
    return {
        theirs: NormStats.of(store.steps(ours)[rows]) for ours, theirs in NAMES.items() if ours in store.manifest.steps
    }


def write_norm_stats(path: Path | str, stats: Mapping[str, NormStats]) -> None:
    """Write the file; an existing one is refused with `UsageError`."""
    path = Path(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: refuse to replace it", expected="a new file")
    entries = {
        name: {key: None if value is None else value.tolist() for key, value in vars(entry).items()}
        for name, entry in stats.items()
    }
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"norm_stats": entries}, indent=2) + "\n", encoding="utf-8")


def read_norm_stats(path: Path | str) -> dict[str, NormStats]:
    """Read the file, or `norm_stats.json` in a folder. Raises `DataError` naming what does not hold."""
    path = Path(path)
    path = path / "norm_stats.json" if path.is_dir() else path
    try:
        found = read_json_file(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not read ({type(error).__name__})", expected="openpi's norm_stats.json") from None
    entries = found.get("norm_stats") if isinstance(found, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path} has no table norm_stats", expected='{"norm_stats": {"state": …, "actions": …}}')
    return {name: _entry(entry, f"{path}, {name}") for name, entry in entries.items()}


def _entry(entry: Any, where: str) -> NormStats:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no table", expected="mean, std, q01, q99")
    columns = {key: _numbers(entry.get(key), f"{where}.{key}") for key in ("mean", "std", "q01", "q99")}
    mean, std, q01, q99 = columns.values()
    if mean is None or std is None or (q01 is None) != (q99 is None):
        lacking = ", ".join(key for key, value in columns.items() if value is None)
        raise DataError(f"{where} lacks {lacking}", expected="mean, std, and both of q01 and q99 or neither")
    lengths = {key: len(value) for key, value in columns.items() if value is not None}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where} has lengths {lengths}", expected="one length")
    if (std < 0).any() or (q01 is not None and q99 is not None and (q01 > q99).any()):
        raise DataError(f"{where} has std below 0 or q01 above q99", expected="statistics of numbers")
    return NormStats(mean, std, q01, q99)


def _numbers(value: Any, where: str) -> NDArray[np.float64] | None:
    if value is None:
        return None
    plain = isinstance(value, list) and value and all(type(x) in (int, float) for x in value)
    numbers = np.array(value if plain else [np.nan], np.float64)
    if not np.isfinite(numbers).all():
        raise DataError(f"{where} is {str(value)[:60]}", expected="a list of finite numbers")
    return numbers
