"""Which arrays of the stores are labels, which are features, and which say what of them is real."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vla.heads.batch import FeatureIO
from vla.stores.errors import DataError, UsageError
from vla.stores.join import JoinedStores
from vla.stores.manifest import StepInfo
from vla.stores.store import Store


def target_info(name: str, store: Store) -> StepInfo:
    """Return the column that heads learn to predict. Raises `UsageError` where there is none of that name and form."""
    steps = store.manifest.steps
    if name not in steps:
        found = f"{store.place} has no {name!r}, only {', '.join(steps) or 'no step columns'}"
        raise UsageError(found, expected="a store of demonstrations", fix="--set data.target=NAME for another column")
    info = steps[name]
    valid = steps.get(f"{name}_valid")
    if not 1 <= len(info.shape) <= 2 or info.dtype not in ("float32", "float64"):
        raise UsageError(f"{name!r} is {info.dtype} {info.shape}", expected="numbers, [A] or [H, A] a row")
    if len(info.shape) == 2 and valid is None:
        raise UsageError(f"{name!r} {info.shape} without its mask", expected=f"a bool column {name}_valid [H]")
    if valid is not None and (valid.shape != info.shape[:-1] or valid.dtype != "bool"):
        raise UsageError(f"{name}_valid is {valid.dtype} {valid.shape}", expected=f"bool {info.shape[:-1]}")
    dims = steps.get(f"{name}_dims")
    if dims is not None and (dims.shape != info.shape[-1:] or dims.dtype != "bool"):
        raise UsageError(f"{name}_dims is {dims.dtype} {dims.shape}", expected=f"bool {info.shape[-1:]}")
    return info


def label_columns(target: str, steps: Mapping[str, StepInfo]) -> tuple[str, ...]:
    """Return the label's column and those that say what of it is real."""
    return tuple(name for name in (target, f"{target}_valid", f"{target}_dims") if name in steps)


def feature_io(stores: JoinedStores, name: str) -> FeatureIO:
    """Describe a feature. A uint8 feature `<name>_mask` over its tokens says which are real."""
    info = stores.feature_info(name)
    mask = stores.feature_info(f"{name}_mask") if f"{name}_mask" in stores.owner else None
    masked = mask is not None and mask.dtype == "uint8" and mask.shape == info.shape[:-1]
    return FeatureIO(shape=info.shape, dims=info.dims[1:], masked=masked)


def episode_dims(target: str, store: Store, usable: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return which dimensions of the label each episode has, bool [episodes, A]; None where all have all.

    Rows of episodes that are not `usable` [episodes] say nothing. Raises `DataError` where they change within one that
    is.
    """
    name = f"{target}_dims"
    if name not in store.manifest.steps:
        return None
    dims = store.steps(name).astype(np.bool_)
    table = store.episodes
    first = np.repeat(table.row_start, table.length)
    changed = (dims[: len(first)] != dims[first]).any(axis=1)
    if (changed & np.repeat(usable, table.length)).any():
        raise DataError(f"{store.place}: {name} changes within an episode", expected="one answer an episode")
    return dims[table.row_start]


def task_dims(dims: NDArray[np.bool_], tasks: NDArray[np.int64], count: int) -> tuple[tuple[bool, ...], ...]:
    """Return the dimensions [A] of each of `count` tasks, from those of episodes [E, A] and their tasks [E]; () for a
    task whose episodes differ, or that has none."""
    of_task = [np.unique(dims[tasks == task], axis=0) for task in range(count)]
    return tuple(tuple(map(bool, rows[0])) if len(rows) == 1 else () for rows in of_task)
