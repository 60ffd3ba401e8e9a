"""A dimension that never moves comes back as it was, exactly; what is constant does not depend on the user's unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.checkpoint import TrainedHead
from vla.heads.export import export_head
from vla.heads.model import HeadModel
from vla.heads.normalize import ChannelScaler, Mode, Normalizer
from vla.heads.notes import moved_constants
from vla.stores.errors import UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
CONSTANTS = (0.25, 0.1, -3.0, 1e6, 1e-7, 0.0)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_head_returns_a_constant_dimension_exactly(
    every: str, constant: float, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head(every)
    rng = np.random.default_rng(0)
    actions = np.stack([rng.normal(size=64), np.full(64, constant)], axis=1).astype(np.float32)
    model.fit_normalisers(actions, rng.normal(size=(64, model.io.state_dim)).astype(np.float32))
    chunk = model.act(toy_batch(model), whole=True)
    assert (chunk[..., 1] == np.float32(constant)).all()
    assert chunk[..., 0].std() > 0


def test_waypoints_that_never_turn_come_back_without_a_turn(awake_head: MakeHead) -> None:
    io = awake_head("track-light").io.model_copy(
        update={"action_dim": 3, "action_names": ("x", "y", "theta"), "chunk": 4}
    )
    model = awake_head("track-light", io=io, fitted=False, waypoints=True)
    straight = np.stack([np.linspace(0, 2, 50), np.zeros(50), np.zeros(50)], axis=1).astype(np.float32)
    model.fit_normalisers(straight, np.zeros((50, 3), np.float32))
    back = model.action.inverse(torch.randn(2, 4, 3))
    assert (back[..., 1:] == 0).all()
    assert back[..., 0].std() > 0


@pytest.mark.parametrize("name", ["mlp", "dp-mlp", "fm-mlp", "spatial-net", "track-light"])
def test_an_exported_program_returns_a_constant_dimension_exactly(
    name: str, awake_head: MakeHead, as_trained: Callable[[HeadModel, str], TrainedHead], tmp_path: Path
) -> None:
    sampled = name not in ("mlp", "track-light")
    model = awake_head(name, **({"sample_steps": 2} if sampled else {}))  # torch.export unrolls every step
    rng = np.random.default_rng(0)
    actions = np.stack([rng.normal(size=64), np.full(64, 0.1)], axis=1).astype(np.float32)
    model.fit_normalisers(actions, rng.normal(size=(64, 3)).astype(np.float32))
    described = export_head(as_trained(model, name.partition("-")[0]), tmp_path / "head.pt2")
    program = torch.export.load(tmp_path / "head.pt2").module()
    inputs = {
        key: torch.randn(each["shape"]).to(getattr(torch, each["dtype"]))
        if each["dtype"].startswith("float")
        else torch.ones(each["shape"], dtype=getattr(torch, each["dtype"]))
        for key, each in described["inputs"].items()
    }
    with torch.no_grad():
        assert (program(**inputs)[..., 1] == np.float32(0.1)).all()


MODES: tuple[Mode, ...] = ("limits", "quantile", "zscore")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", [1e-6, 1e-9, 1.0, 1e3, 1e9])
def test_the_unit_of_a_dimension_does_not_change_what_a_head_sees(mode: Mode, unit: float) -> None:
    metres = np.random.default_rng(0).normal(0.5, 0.2, (300, 2))
    wanted, found = Normalizer(2), Normalizer(2)
    wanted.fit(metres, mode), found.fit(metres * unit, mode)
    assert not found.constant.any()
    normalised = found(torch.as_tensor(metres * unit).float())
    torch.testing.assert_close(normalised, wanted(torch.as_tensor(metres).float()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.inverse(normalised).numpy(), metres * unit, rtol=1e-5, atol=1e-6 * unit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
def test_a_constant_that_moves_after_training_normalises_to_0_in_every_unit(mode: Mode, unit: float) -> None:
    normaliser = Normalizer(2)
    normaliser.fit(np.stack([np.arange(9.0), np.full(9, 0.25)], axis=1) * unit, mode)
    moved = normaliser(torch.tensor([[3.0, 0.25], [3.0, 7.0]]) * unit)
    assert (moved[:, 1] == 0).all()
    assert (moved[:, 0] == moved[0, 0]).all()


def test_a_state_that_the_statistics_hold_constant_and_that_moves_is_named(toy_head: MakeHead) -> None:
    model = toy_head("mlp")
    still = np.zeros((9, 3))
    model.fit_normalisers(np.arange(18.0).reshape(9, 2), still)
    moving = np.where(np.arange(3) == 1, np.arange(9.0)[:, None], 0.0)
    read = np.ones((9, 3), bool)
    assert model.state is not None
    (line,) = moved_constants("state", model.state, moving, ("a", "b", "c"), read)
    assert "b" in line.partition(":")[2].split()
    assert moved_constants("state", model.state, still, ("a", "b", "c"), read) == []
    assert moved_constants("state", model.state, moving, ("a", "b", "c"), ~read) == []


@pytest.mark.parametrize("mode", MODES)
def test_small_ranges_far_from_zero_are_no_constants(mode: Mode) -> None:
    """Positions of 1e6 in steps of 1/16, float32's spacing there, over a range of 4."""
    values = (1e6 + np.random.default_rng(0).integers(0, 65, (300, 1)) / 16).astype(np.float32)
    normaliser = Normalizer(1)
    normaliser.fit(values, mode)
    y = normaliser(torch.from_numpy(values))
    assert not normaliser.constant.any()
    assert torch.equal(normaliser.inverse(y), torch.from_numpy(values))
    if mode == "limits":
        assert y.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_a_range_within_the_rounding_of_float32_is_a_constant(mode: Mode) -> None:
    values = np.array([[0.25, 1e6], [np.nextafter(np.float32(0.25), np.float32(1)), 1e6 + 0.0625]], np.float32)
    normaliser = Normalizer(2)
    normaliser.fit(values, mode)
    assert normaliser.constant.all()
    np.testing.assert_allclose(normaliser.inverse(torch.randn(3, 2)).numpy(), np.tile(values[:1], (3, 1)), rtol=3e-7)


def test_a_head_started_from_statistics_that_hold_a_moving_dimension_constant_is_refused(
    toy_head: MakeHead,
) -> None:
    model = toy_head("mlp")
    still = np.stack([np.arange(9.0), np.full(9, 0.25)], axis=1)
    model.fit_normalisers(still, np.zeros((9, 3)))

    class Data:
        training = np.arange(1)

        def actions(self, episodes: Any) -> Any:
            return np.stack([np.arange(9.0), np.linspace(0, 1, 9)], axis=1)

        def action_dims(self, episodes: Any) -> None:
            return None

    data: Any = Data()
    with pytest.raises(UsageError, match="y"):
        model.check_reach(data)
    data.actions = lambda episodes: still
    model.check_reach(data)


def test_a_channel_is_constant_below_the_rounding_of_its_stored_dtype_and_not_below_a_fixed_number() -> None:
    scaler = ChannelScaler(3)
    mean, std = np.array([0.0, 100.0, 1.0]), np.array([1e-9, 5e-3, 1e-4])
    varies = {}
    for dtype in ("float32", "bfloat16", "float16"):
        scaler.fit(mean, std, dtype)
        varies[dtype] = (scaler(torch.full((1, 3), 200.0))[0] != 0).tolist()
    assert varies == {
        "float32": [True, True, True],
        "bfloat16": [True, False, False],
        "float16": [False, False, False],
    }
    scaler.fit(mean, std, "float32")
    assert scaler(torch.tensor([[1e-9, 100.005, 1.0001]])).numpy() == pytest.approx(np.ones((1, 3)), rel=1e-2)
