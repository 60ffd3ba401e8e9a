"""What a head accepts as a batch, and how padded steps are filled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vla.heads.batch import Batch, FeatureIO, HeadIO, check_batch
from vla.heads.model import repeat_edges
from vla.stores.errors import DataError, UsageError
from vla.stores.windows import WindowSpec

IO = HeadIO(
    action_dim=2,
    state_dim=3,
    state_names=("height", "width", "depth"),
    features={"grid": FeatureIO(shape=(1, 2, 2, 4), dims=("y", "x", "channel"))},
)
WINDOW = WindowSpec(n_obs=2, horizon=5)


def good() -> Batch:
    return Batch(
        features={"grid": torch.zeros(3, 2, 1, 2, 2, 4)},
        state=torch.zeros(3, 2, 3),
        task=torch.zeros(3, dtype=torch.long),
        obs_valid=torch.ones(3, 2, dtype=torch.bool),
        action=torch.zeros(3, 5, 2),
        action_valid=torch.ones(3, 5, dtype=torch.bool),
        action_dims=torch.ones(3, 2, dtype=torch.bool),
    )


def test_a_batch_that_fits_is_accepted() -> None:
    check_batch(good(), IO, WINDOW, {"grid": 2}, state=True)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("features", {}),
        ("features", {"grid": torch.zeros(3, 2, 1, 2, 3, 4)}),
        ("features", {"grid": torch.zeros(3, 1, 1, 2, 2, 4)}),
        ("state", None),
        ("state", torch.zeros(3, 2, 4)),
        ("obs_valid", torch.ones(3, 1, dtype=torch.bool)),
        ("action", torch.zeros(3, 4, 2)),
        ("action", torch.zeros(3, 5, 7)),
        ("action_valid", torch.ones(3, 4, dtype=torch.bool)),
        ("action_dims", torch.ones(3, 3, dtype=torch.bool)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(name: str, wrong: Any) -> None:
    with pytest.raises(DataError, match="grid" if name == "features" else name):
        check_batch(replace(good(), **{name: wrong}), IO, WINDOW, {"grid": 2}, state=True)


def test_what_the_head_does_not_read_need_not_be_there() -> None:
    check_batch(replace(good(), features={}, state=None, action=None), IO, WINDOW, {}, state=False)


def test_a_batch_moves_with_everything_in_it() -> None:
    batch = replace(good(), feature_valid={"grid": torch.ones(3, 2, 1, 4, dtype=torch.bool)})
    moved = batch.to("meta")
    tensors = [*moved.features.values(), *moved.feature_valid.values()]
    tensors += [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_state_columns_are_chosen_by_name_or_index() -> None:
    assert IO.state_columns(None) == (0, 1, 2)
    assert IO.state_columns(("depth", 0)) == (2, 0)


@pytest.mark.parametrize(("column", "message"), [("dept", "did you mean 'depth'"), (3, "0 to 2"), (-1, "0 to 2")])
def test_an_unknown_state_column_is_refused(column: int | str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        IO.state_columns((column,))


@pytest.mark.parametrize(("shape", "dims"), [((2, 4), ("y", "x", "channel")), ((0, 4), ("channel",))])
def test_a_feature_whose_axes_do_not_fit_is_refused(shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        HeadIO.build({"action_dim": 1, "features": {"grid": {"shape": shape, "dims": dims}}})


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 0, 1, 1], [2, 2, 2, 3]),
        ([0, 1, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_padded_steps_repeat_the_nearest_valid_one(valid: list[int], expected: list[int]) -> None:
    action = torch.arange(4.0)[None, :, None]
    assert repeat_edges(action, torch.tensor([valid], dtype=torch.bool)).flatten().tolist() == expected
