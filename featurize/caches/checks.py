"""Checks that every kind of cache shares: numbers, orders, types, digests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.backbones.base import FeatureSpec
from vla.featurize.sources.files import digest_files as digest_files
from vla.featurize.sources.files import natural as natural
from vla.featurize.sources.usual_shape import keep_usual
from vla.stores.errors import SourceError, UsageError

SKIP = "--skip-bad leaves the episode out"

Rows = dict[str, tuple[tuple[int, ...], str]]
"""{array: (shape of a row, dtype)} of an episode."""

_STORED = {"float16": "float16", "bfloat16": "float32", "float32": "float32", "float64": "float32", "uint8": "float16"}
"""What a store keeps of each type. uint8 fits float16 exactly, bfloat16 float32; float64 is rounded to float32."""


def feature_spec(shape: Sequence[int], dtype: str, has_views: bool, name: str, where: str) -> FeatureSpec:
    """Describe rows of `shape` (with the view axis first where `has_views`) in the type that a store keeps."""
    shape = tuple(shape[1:]) if has_views else tuple(shape)
    if dtype not in _STORED:
        raise SourceError(f"{where} has dtype {dtype}", expected=f"one of {', '.join(_STORED)}")
    if not shape or min(shape) < 1:
        raise SourceError(f"{where} has {shape} numbers a frame and view", expected="at least one axis, none empty")
    return FeatureSpec(shape, (*(f"{name}_{axis}" for axis in range(1, len(shape))), "channel"), _STORED[dtype])


def as_feature(values: NDArray[Any], spec: FeatureSpec, has_views: bool, where: str, first: int) -> NDArray[Any]:
    """Return rows [n, V, *shape] in the stored type, finite; `first` is the number of the first frame."""
    with np.errstate(over="ignore"):  # a float64 above float32 becomes infinite, which is refused
        rows = np.asarray(values).astype(spec.dtype, copy=False)
    rows = rows if has_views else rows[:, None]
    require_finite(rows, where, first)
    return rows


def as_steps(values: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[np.float32]:
    """Return steps [T, *shape] float32, finite."""
    if values.dtype.kind not in "fiub" or values.shape[1:] != shape:
        raise SourceError(f"{where} is {values.dtype} {values.shape}", expected=f"numbers [T, {shape}]", fix=SKIP)
    with np.errstate(over="ignore"):
        steps = values.astype(np.float32)
    require_finite(steps, where, 0)
    return steps


def as_vectors(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Return steps [T, D] float32, finite; [T] is read as [T, 1]. Raises `SourceError` for any other shape."""
    if values.ndim not in (1, 2):
        raise SourceError(f"{where} has shape {values.shape}", expected="[T, D]", fix=SKIP)
    rows = values.reshape(len(values), 1) if values.ndim == 1 else values
    return as_steps(rows, rows.shape[1:], where)


def keep_usual_rows(
    found: dict[str, tuple[int, Rows]], where: Callable[[str], str], skipped: dict[str, str], *, skip_bad: bool
) -> Rows:
    """Leave out the episodes whose rows are not like most others'; return what most are like.

    `found` is {id: (frames, rows)} and loses them, `where` says where an episode lies, `skipped` gains the reasons.
    Raises `SourceError` naming the first of them unless `skip_bad`.
    """

    def differs(name: str, model: str) -> SourceError:
        usual = f"{found[model][1]} as most have, such as {model}"
        return SourceError(f"{where(name)} has rows {found[name][1]}", expected=usual, fix=SKIP)

    return found[keep_usual(found, lambda one: tuple(sorted(one[1].items())), differs, skipped, skip_bad=skip_bad)][1]


def require_finite(rows: NDArray[Any], where: str, first: int) -> None:
    """Raise `SourceError` naming the first row of [n, ...] that holds NaN or infinity."""
    # Two passes and no copy: NaN passes through min and max.
    if np.isfinite(rows.min(initial=0)) and np.isfinite(rows.max(initial=0)):
        return
    bad = ~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    raise SourceError(
        f"{where}, frame {first + int(bad.argmax())} is NaN or infinite", expected="finite numbers", fix=SKIP
    )


def require_views(views: Iterable[int], cameras: Sequence[str], where: str) -> None:
    """Raise `UsageError` where an array has another number of views than there are names of cameras."""
    for count in views:
        if count != len(cameras):
            raise UsageError(
                f"{where} has {count} views, and cameras are {list(cameras)}",
                expected="as many names as views",
                fix='--set options.cameras=["A","B"]',
            )
