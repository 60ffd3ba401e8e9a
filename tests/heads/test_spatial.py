"""`spatial`: what trains, what it attends to, and each of the origin's faults that concerns the head."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.flow import TIME_GRID
from vla.heads.model import HeadModel
from vla.heads.train import HeadTrainConfig, with_head_defaults
from vla.stores.errors import DataError, UsageError
from vla.training.config import TrainConfig
from vla.training.devices import accelerated
from vla.training.state import TrainState

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


def acted(model: HeadModel, batch: Batch) -> torch.Tensor:
    return model.act(batch, torch.Generator().manual_seed(0))


def test_only_the_connector_and_the_expert_train_each_at_its_own_rate(toy_head: MakeHead) -> None:
    """Nothing upstream of the cached tokens is there to be unfrozen (the origin trains its projectors there)."""
    model = toy_head("spatial-net")
    defaults = with_head_defaults(HeadTrainConfig.build({"head": "spatial", "data": {"stores": ()}})).train
    groups = model.param_groups(defaults.lr)
    assert groups is not None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    connector, expert = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["lr"] for group in groups] == [1e-3, 1e-4]
    assert connector == ["connector.0.weight", "connector.0.bias", "connector.2.weight", "connector.2.bias"]
    assert [name for name in expert if not name.startswith("net.")] == [
        "identity",
        "frame",
        "positions.weight",
        "positions.bias",
        "state_token.weight",
        "state_token.bias",
        "task.weight",
    ]
    assert sorted(connector + expert) == sorted(names.values())
    assert model.frozen == {}


def test_the_schedule_scales_both_rates_alike(toy_head: MakeHead, tmp_path: Path) -> None:
    model = toy_head("spatial-net")
    config = TrainConfig(steps=10, warmup_steps=0, device="cpu", lr=1e-4)
    with accelerated(config, tmp_path) as accelerator:
        state = TrainState(accelerator, model, config, model.param_groups(config.lr))
        for _ in range(7):
            state.optimizer.step()
            state.schedule.step()
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert 0 < rates[0] < 1e-3
    assert rates[0] == pytest.approx(10 * rates[1])


def test_the_loss_runs_under_bfloat16_with_float32_weights(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("spatial-net").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(toy_batch(model))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("filler", [7.0, float("nan"), float("inf")])
def test_padding_tokens_are_never_attended_to(filler: float, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin never passes its context mask. Here not one bit of the action depends on a padded token."""
    model = awake_head("spatial-net")
    batch = toy_batch(model)
    valid = torch.ones(8, 1, 2, 16, dtype=torch.bool)
    valid[:, :, 0, 10:] = False
    valid[:4, :, 1] = False
    masked = dataclasses.replace(batch, feature_valid={"spatial": valid})
    whole = acted(model, batch)
    filled = {name: torch.where(valid[..., None], v, filler) for name, v in batch.features.items()}
    clean, dirty = acted(model, masked), acted(model, dataclasses.replace(masked, features=filled))
    assert torch.equal(clean, dirty)
    assert not torch.equal(clean, whole)


def test_a_padded_token_is_as_no_token_at_all(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The same weights over ten tokens a view, and over sixteen of which six are padding."""
    model = awake_head("spatial-net")
    tokens = FeatureIO(shape=(2, 10, 3), dims=("token", "channel"), masked=True)
    places = tokens.model_copy(update={"masked": False})
    io = model.io.model_copy(update={"features": {"spatial": tokens, "spatial_xyz": places}})
    short = awake_head("spatial-net", io=io, fitted=False)
    short.load_state_dict(model.state_dict())
    batch = toy_batch(model)
    valid = torch.arange(16).expand(8, 1, 2, 16) < 10
    cut = {name: values[:, :, :, :10] for name, values in batch.features.items()}
    padded = dataclasses.replace(batch, feature_valid={"spatial": valid})
    without = dataclasses.replace(batch, features=cut, feature_valid={"spatial": valid[..., :10]})
    torch.testing.assert_close(acted(model, padded), acted(short, without), atol=1e-4, rtol=1e-4)


def test_a_frame_without_any_token_still_gives_finite_actions(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("spatial-net", use_state=False, use_task=False)
    batch = toy_batch(model)
    none = {"spatial": torch.zeros(8, 1, 2, 16, dtype=torch.bool)}
    assert torch.isfinite(acted(model, dataclasses.replace(batch, feature_valid=none))).all()


def test_actions_attend_to_each_other_in_both_directions(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """A one-dimensional mask makes the origin's Gemma causal."""
    model: Any = awake_head("spatial-net")
    tokens, valid = model.context(toy_batch(model))
    x = torch.randn(8, 4, 2)
    later = x.clone()
    later[:, -1] += 1.0
    t = torch.full((8,), 0.5)
    first, second = (model.net(noisy, t, model.net.read(tokens, valid))[:, 0] for noisy in (x, later))
    assert ((first - second).abs().amax(-1) > 0).all()


def test_the_robot_state_moves_the_action(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin's signature takes a state that its data set never loads."""
    model = awake_head("spatial-net")
    batch = toy_batch(model)
    assert batch.state is not None
    moved = dataclasses.replace(batch, state=batch.state + 1.0)
    assert (acted(model, batch) != acted(model, moved)).all()
    blind = awake_head("spatial-net", use_state=False)
    assert blind.state is None
    assert torch.equal(acted(blind, batch), acted(blind, moved))


@pytest.mark.parametrize("view", [0, 1])
def test_every_view_moves_the_action(view: int, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin ignores the wrist camera."""
    model = awake_head("spatial-net")
    batch = toy_batch(model)
    tokens = batch.features["spatial"].clone()
    tokens[:, :, view] += 1.0
    changed = dataclasses.replace(batch, features={**batch.features, "spatial": tokens})
    assert (acted(model, batch) != acted(model, changed)).any(dim=(1, 2)).all()


def test_tokens_are_a_set_whose_places_count_and_whose_order_does_not(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model, without = awake_head("spatial-net"), awake_head("spatial-net", use_positions=False)
    batch = toy_batch(model)
    order = torch.randperm(16)
    shuffled = {name: values[:, :, :, order] for name, values in batch.features.items()}
    permuted = dataclasses.replace(batch, features=shuffled)
    torch.testing.assert_close(acted(model, permuted), acted(model, batch), atol=2e-4, rtol=1e-4)
    elsewhere = {**batch.features, "spatial_xyz": batch.features["spatial_xyz"] + 1.0}
    assert (acted(model, dataclasses.replace(batch, features=elsewhere)) != acted(model, batch)).all()
    assert without.reads == {"spatial": 1}


def test_stores_without_positions_need_no_switch(toy_head: MakeHead) -> None:
    io = HeadIO(action_dim=2, features={"spatial": FeatureIO(shape=(1, 9, 5), dims=("token", "channel"), masked=True)})
    model: Any = build_head("spatial", {"width": 32, "heads": 4, "layers": 1}, io)
    assert model.reads == {"spatial": 1}
    assert (model.positions, model.state, model.task) == (None, None, None)


def test_the_head_reads_no_text_and_so_no_action_tokens_in_it(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Its context is the views' tokens, one state and one instruction: 2 x 16 + 1 + 1."""
    model: Any = awake_head("spatial-net")
    tokens, valid = model.context(toy_batch(model))
    assert tokens.shape == (8, 34, 32)
    assert valid.all()
    assert set(model.reads) == {"spatial", "spatial_xyz"}


def test_frames_before_the_episode_are_not_attended_to(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("spatial-net", n_obs=2)
    batch = toy_batch(model)
    begun = dataclasses.replace(batch, obs_valid=torch.tensor([[False, True]] * 8))
    tokens = batch.features["spatial"].clone()
    tokens[:, 0] += 1.0
    other = dataclasses.replace(begun, features={**batch.features, "spatial": tokens})
    assert torch.equal(acted(model, begun), acted(model, other))


def test_openpis_nested_statistics_normalise_and_come_back_by_the_same_epsilon(
    toy_head: MakeHead, tmp_path: Path
) -> None:
    """The origin looks for `action`, openpi writes `norm_stats.actions`; and its inverse leaves the epsilon out."""
    entry = {"mean": [1.0, -2.0], "std": [0.5, 2e-4], "q01": None, "q99": None}
    state = {"mean": [0.0] * 3, "std": [1.0] * 3, "q01": None, "q99": None}
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"actions": entry, "state": state}}))
    model = toy_head("spatial-net", norm_stats=str(file))
    action = torch.tensor([[1.5, -2.0002], [0.0, 3.0]])
    wanted = (action.double() - torch.tensor(entry["mean"])) / (torch.tensor(entry["std"]).double() + 1e-6)
    torch.testing.assert_close(model.action(action).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.action.inverse(model.action(action)), action)


def test_gaussian_normalisation_is_the_default(toy_head: MakeHead) -> None:
    config = toy_head("spatial-net", fitted=False).config
    assert (config.action_norm, config.state_norm) == ("zscore", "zscore")


def test_the_action_has_the_data_sets_own_dimensions(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin pads to 14 or 19 with zeros that it trains on; tasks that do differ are masked (test_losses)."""
    model = toy_head("spatial-net")
    assert acted(model, toy_batch(model)).shape == (8, 4, model.io.action_dim)


def test_velocities_are_compared_at_fixed_times_over_real_entries(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("spatial-net").train()
    batch = toy_batch(model)
    assert batch.action is not None
    assert batch.action_valid is not None
    valid = batch.action_valid.clone()
    valid[:, 2:] = False
    valid[7] = False
    batch = dataclasses.replace(batch, action_valid=valid)
    beyond = torch.where(valid[..., None], batch.action, torch.nan)
    chunk = torch.zeros(8, 4, 2)
    measured = model.measure(batch, chunk)
    again = model.measure(dataclasses.replace(batch, action=beyond), chunk)
    assert measured.keys() == {"velocity_mse", *(f"velocity_mse_t{t:g}" for t in TIME_GRID)}
    assert all(values.shape == (7 * 2 * 2,) for values in measured.values())  # every valid entry counts alike
    assert all(torch.equal(measured[name], again[name]) for name in measured)
    at_times = torch.stack([measured[f"velocity_mse_t{t:g}"] for t in TIME_GRID])
    torch.testing.assert_close(measured["velocity_mse"], at_times.mean(0))
    assert model.training


def test_a_perfect_velocity_measures_zero(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("spatial-net")
    batch = toy_batch(model)
    action = model.labels(batch)

    def perfect(x: torch.Tensor, t: torch.Tensor, seen: Any) -> torch.Tensor:
        return (x - action) / t[:, None, None]  # x = t noise + (1 - t) action

    model.net.forward = perfect
    assert model.measure(batch, action)["velocity_mse"].max() < 1e-6


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ({}, "needs the feature 'spatial'.*they hold no feature.*vla featurize --backbone spatial"),
        ({"spatial": FeatureIO(shape=(1, 4, 3), dims=("token", "channel"))}, "comes without its mask"),
        ({"spatial": FeatureIO(shape=(1, 2, 2, 3), dims=("y", "x", "channel"), masked=True)}, "has the axes"),
        (
            {
                "spatial": FeatureIO(shape=(1, 4, 3), dims=("token", "channel"), masked=True),
                "spatial_xyz": FeatureIO(shape=(1, 5, 3), dims=("token", "channel")),
            },
            "spatial_xyz has shape",
        ),
    ],
)
def test_stores_that_do_not_fit_are_refused_by_name(features: dict[str, FeatureIO], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_head("spatial", {"width": 32, "heads": 4}, HeadIO(action_dim=2, features=features))


def test_a_batch_without_the_mask_is_refused(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("spatial-net")
    with pytest.raises(DataError, match="no mask of 'spatial'"):
        model.loss(dataclasses.replace(toy_batch(model), feature_valid={}))


def test_actions_at_the_episodes_end_are_masked_not_repeated(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin trains on the last action repeated: here the error there is counted by nobody."""
    model = toy_head("spatial-net")
    batch = toy_batch(model)
    assert batch.action_valid is not None
    ending = batch.action_valid.clone()
    ending[:, 1:] = False
    torch.manual_seed(0)
    _, metrics = model.loss(dataclasses.replace(batch, action_valid=ending))
    assert metrics["mask_share"].item() == pytest.approx(0.25)


def test_statistics_of_a_wrong_size_are_refused(toy_head: MakeHead) -> None:
    model: Any = toy_head("spatial-net")
    with pytest.raises(DataError, match="feature statistics of shape"):
        model.scaler.fit(np.zeros(4), np.ones(4))
