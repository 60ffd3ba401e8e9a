"""Statistics merged unit by unit against numpy on everything at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vla.stores.statistics import ChannelStatistics, of_rows


def reference(values: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    flat = values.astype(np.float64).reshape(-1, values.shape[-1])
    return flat.mean(0), flat.std(0), flat.min(0), flat.max(0)


def require_close(found: ChannelStatistics, values: NDArray[Any], rtol: float = 1e-9) -> None:
    mean, std, low, high = reference(values)
    assert found.count == values.size // values.shape[-1]
    scale = np.abs(values.astype(np.float64)).max(initial=1e-300)
    np.testing.assert_allclose(found.mean, mean, rtol=rtol, atol=1e-14 * scale)
    np.testing.assert_allclose(found.std, std, rtol=rtol, atol=1e-14 * scale)
    np.testing.assert_array_equal(found.min, low)
    np.testing.assert_array_equal(found.max, high)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_merged_units_equal_numpy_on_everything(
    sizes: list[int], mean: float, spread: float, dtype: str, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(mean, spread, size=(sum(sizes), 2, 3, 5))
    values = np.clip(values, -6e4, 6e4).astype(dtype)
    total = ChannelStatistics.empty(5)
    for unit in np.split(values, np.cumsum(sizes)[:-1]):
        total = total.merge(of_rows(unit, 5))
    require_close(total, values)


def test_merging_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    units = [of_rows(rng.normal(rng.uniform(-50, 50), 3, size=(n, 4, 6)).astype("f4"), 6) for n in range(1, 30)]
    forward, backward = ChannelStatistics.empty(6), ChannelStatistics.empty(6)
    for unit in units:
        forward = forward.merge(unit)
    for unit in reversed(units):
        backward = unit.merge(backward)
    np.testing.assert_allclose(forward.to_array(), backward.to_array(), rtol=1e-12)


@pytest.mark.parametrize("mean", [1.0, 1e4, 1e7])
def test_a_large_mean_does_not_swallow_a_small_variance(mean: float) -> None:
    values = (mean + np.random.default_rng(0).integers(-2, 3, size=(64, 16, 3))).astype(np.float32)
    require_close(of_rows(values, 3), values, rtol=1e-10)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3e4, 6.55e4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_constant_channel_has_exactly_no_spread(constant: float, dtype: str) -> None:
    values = np.full((37, 5, 2), constant, np.float32).astype(dtype)
    total = of_rows(values[:11], 2).merge(of_rows(values[11:], 2))
    np.testing.assert_array_equal(total.std, 0.0)
    np.testing.assert_array_equal(total.mean, values[0, 0].astype(np.float64))
    np.testing.assert_array_equal(total.min, total.max)


def test_the_largest_and_the_smallest_numbers_neither_overflow_nor_vanish() -> None:
    for scale in (1e30, 1e-25):
        values = (np.random.default_rng(0).normal(size=(8, 4, 3)) * scale).astype(np.float32)
        require_close(of_rows(values, 3), values)


def test_rows_that_are_many_or_large_are_counted_once_each() -> None:
    values = np.random.default_rng(0).normal(size=(300, 40, 64)).astype(np.float16)
    require_close(of_rows(values, 64), values)


def test_nothing_merged_with_something_is_something() -> None:
    some = of_rows(np.ones((2, 3), np.float32), 3)
    for merged in (some.merge(ChannelStatistics.empty(3)), ChannelStatistics.empty(3).merge(some)):
        np.testing.assert_array_equal(merged.to_array(), some.to_array())
    assert of_rows(np.zeros((0, 2, 3), np.float32), 3).count == 0


def test_statistics_survive_their_array(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", lengths=(30, 40), unit_rows=16)
    require_close(made.open().statistics("grid"), made.features["grid"])


def test_rows_never_committed_do_not_count(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0, 2])
    rows = np.r_[0:8, 16:20]
    require_close(made.open(allow_partial=True).statistics("grid"), made.features["grid"][rows])
