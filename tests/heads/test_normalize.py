"""Normalisation: exactly invertible, safe on degenerate data, refused on unusable data, carried by the checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from vla.heads.normalize import ChannelScaler, Mode, Normalizer
from vla.stores.errors import CheckpointError, DataError

MODES: tuple[Mode, ...] = ("limits", "quantile", "zscore", "none")


def fitted(values: NDArray[Any], mode: Mode = "limits", **options: Any) -> Normalizer:
    normalizer = Normalizer(values.shape[1])
    normalizer.fit(values, mode, **options)
    return normalizer


def assert_round_trip(normalizer: Normalizer, values: NDArray[Any]) -> None:
    x = torch.as_tensor(values).to(torch.float32)
    y = normalizer(x)
    assert torch.isfinite(y).all()
    # Two roundings of float32 relative to the largest value and the scale.
    limit = 4e-7 * (x.abs().max(0).values + normalizer.scale)
    assert ((normalizer.inverse(y) - x).abs() <= limit).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal([0, 50, -3], [1, 9, 1e-2], (200, 3)),
        np.array([[1.5, -2.0, 0.0]]),
        np.full((5, 3), 7.25),
        np.array([[1e30, -1e30, 0.0], [-1e30, 3e30, 1e-30]]),
        np.arange(12).reshape(4, 3),
        np.array([[True, False, True], [False, False, True]]),
        np.array([[1e6, 0.0, 0.0], [1e6 + 1, 1e-9, 0.5]], np.float32),
        np.array([[0, 255, 7], [128, 3, 9]], np.uint8),
    ],
    ids=["ordinary", "one sample", "constant", "1e30", "int", "bool", "large offset", "uint8"],
)
def test_values_come_back_as_they_went_in(values: NDArray[Any], mode: Mode) -> None:
    assert_round_trip(fitted(values, mode), values)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0.0, math.nan]]),
        np.array([[0.0, math.inf]]),
        np.array([[0.0, 2e37]]),
        np.zeros((3, 3)),
        np.zeros((0, 2)),
        np.zeros(2),
    ],
    ids=["NaN", "infinite", "overflowing", "too wide", "no sample", "one axis"],
)
def test_unusable_values_are_refused(values: NDArray[Any]) -> None:
    with pytest.raises(DataError):
        Normalizer(2).fit(values, "limits")


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match="shape"):
        Normalizer(0).fit(np.zeros((4, 0)), "limits")


def test_the_refusal_names_row_and_dimension() -> None:
    values = np.zeros((5, 3))
    values[4, 2] = math.nan
    with pytest.raises(DataError, match="row 4, dimension 2"):
        Normalizer(3).fit(values, "limits")


def test_limits_map_the_range_to_one() -> None:
    values = np.array([[-3.0, 10.0], [1.0, 30.0], [0.0, 12.0]])
    y = fitted(values)(torch.tensor(values))
    torch.testing.assert_close(y.amin(0), -torch.ones(2))
    torch.testing.assert_close(y.amax(0), torch.ones(2))


def test_quantiles_map_the_first_and_ninety_ninth_percentile_to_one() -> None:
    values = np.random.default_rng(0).normal(size=(5000, 1))
    normalizer = fitted(values, "quantile")
    ends = torch.tensor(np.quantile(values, [[0.01], [0.99]], axis=0)[:, 0])
    torch.testing.assert_close(normalizer(ends), torch.tensor([[-1.0], [1.0]]))


def test_a_dimension_that_rarely_moves_uses_its_limits_where_quantiles_coincide() -> None:
    gripper = np.zeros((1000, 1))
    gripper[:3] = 1.0
    y = fitted(gripper, "quantile")(torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]))


def test_zscore_gives_zero_mean_and_unit_deviation() -> None:
    values = np.random.default_rng(0).normal(4, 3, (500, 2))
    y = fitted(values, "zscore")(torch.tensor(values))
    torch.testing.assert_close(y.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_constant_dimensions_become_zero_and_are_listed() -> None:
    values = np.array([[2.0, 0.0, 5.0], [2.0, 1.0, 5.0 + 5e-7]])
    normalizer = fitted(values)
    assert normalizer.constant.tolist() == [True, False, True]
    assert normalizer(torch.tensor(values))[:, 0].tolist() == [0.0, 0.0]
    assert normalizer.inverse(torch.zeros(1, 3))[0, 0] == 2.0


def test_padded_values_do_not_count() -> None:
    values = np.array([[0.0, 999.0], [1.0, math.nan], [4.0, 2.0], [4.0, 6.0]])
    valid = np.array([[True, False], [True, False], [True, True], [True, True]])
    normalizer = fitted(values, valid=valid)
    assert normalizer.centre.tolist() == [2.0, 4.0]
    assert normalizer.scale.tolist() == [2.0, 2.0]


def test_a_dimension_that_is_always_padded_stays_unchanged() -> None:
    normalizer = fitted(np.full((3, 1), math.nan), valid=np.zeros((3, 1), bool))
    assert normalizer(torch.tensor([[3.0]])).item() == 3.0


def test_a_wrong_width_is_refused_when_used() -> None:
    normalizer = fitted(np.random.default_rng(0).normal(size=(9, 3)))
    for use in (normalizer, normalizer.inverse):
        with pytest.raises(DataError, match="2 dimensions"):
            use(torch.zeros(4, 2))


def test_an_unfitted_normaliser_refuses_to_work() -> None:
    with pytest.raises(CheckpointError, match="missing"):
        Normalizer(2)(torch.zeros(1, 2))
    with pytest.raises(CheckpointError, match="missing"):
        ChannelScaler(2)(torch.zeros(1, 2))


def test_statistics_of_nothing_loaded_over_good_ones_are_noticed() -> None:
    normalizer = fitted(np.random.default_rng(0).normal(size=(9, 2)))
    normalizer(torch.zeros(1, 2))
    normalizer.load_state_dict(Normalizer(2).state_dict())
    with pytest.raises(CheckpointError, match="missing"):
        normalizer(torch.zeros(1, 2))


def test_statistics_travel_in_the_state_dict() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    first, second = fitted(values), Normalizer(2)
    second.load_state_dict(first.state_dict())
    x = torch.tensor(values)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.inverse(x.float()), second.inverse(x.float()))


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 4)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    st.sampled_from(MODES),
)
def test_any_finite_values_round_trip(values: NDArray[np.float32], mode: Mode) -> None:
    assert_round_trip(fitted(values, mode), values)


def test_channels_are_standardised_into_a_new_tensor() -> None:
    values = np.random.default_rng(0).normal([5, -2], [3, 0.1], (4000, 2)).astype(np.float32)
    scaler = ChannelScaler(2)
    scaler.fit(values.mean(0), values.std(0))
    x = torch.from_numpy(values)
    y = scaler(x)
    torch.testing.assert_close(y, torch.from_numpy((values - values.mean(0)) / values.std(0)), atol=1e-4, rtol=0)
    assert torch.equal(x, torch.from_numpy(values)), "the store's memory is not ours to change"
    assert scaler(x.half()).dtype == torch.float32


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (3.0, 0.0), (1000.0, 1e-3)])
def test_channels_that_never_vary_become_exactly_zero(mean: float, std: float) -> None:
    scaler = ChannelScaler(1)
    scaler.fit(np.array([mean]), np.array([std]))
    assert scaler(torch.tensor([[mean], [mean + 1.0]])).abs().max() == 0


@pytest.mark.parametrize(
    ("mean", "std"), [(np.zeros(3), np.ones(3)), (np.array([0, math.nan]), np.ones(2)), (np.zeros(2), np.zeros(1))]
)
def test_feature_statistics_that_do_not_fit_are_refused(mean: NDArray[Any], std: NDArray[Any]) -> None:
    with pytest.raises(DataError, match="feature statistics"):
        ChannelScaler(2).fit(mean, std)


@pytest.mark.parametrize("which", ["centre", "scale"])
def test_statistics_beyond_float32_are_refused_by_their_dimension(which: str) -> None:
    values = {"centre": np.zeros(3), "scale": np.ones(3)}
    values[which][1] = 1e300
    with pytest.raises(DataError, match="dimension 1"):
        Normalizer(3).set(values["centre"], values["scale"], np.zeros(3, bool))
