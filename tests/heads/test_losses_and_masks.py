"""Losses: the published formulas, averaged over real steps and real dimensions and over nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.dp import noise_schedule
from vla.heads.flow import draw_time
from vla.heads.model import HeadModel, repeat_edges
from vla.stores.errors import DataError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


class Spy(torch.nn.Module):
    """Stands in for a head's net: keeps what it is given, and answers with a learned constant."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.randn_like(like))
        self.given: tuple[Tensor, ...] = ()

    def forward(self, *given: Tensor) -> Tensor:
        self.given = given
        return self.answer

    def read(self, context: Tensor, valid: Tensor) -> Tensor:
        """Stand in for the action expert's."""
        return context


def padded(batch: Batch, filler: float = 0.0) -> tuple[Batch, Tensor]:
    """Pad the last step of every window, three more of the first, and the second dimension of all but the last two.

    `filler` goes where nothing is real. Returns the batch and the mask [B, H, A] of what is.
    """
    assert batch.action is not None
    valid = torch.ones(batch.action.shape[:2], dtype=torch.bool)
    valid[:, -1] = False
    valid[0, :] = torch.tensor([True, False, False, False])
    dims = torch.ones(len(batch), 2, dtype=torch.bool)
    dims[:-2, 1] = False
    real = valid[..., None] & dims[:, None]
    action = torch.where(real, batch.action, filler)
    return dataclasses.replace(batch, action=action, action_valid=valid, action_dims=dims), real


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def test_padded_predictions_get_exactly_zero_gradient_and_all_others_some(
    every: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head(every)
    batch, real = padded(toy_batch(model))
    predictions: list[Tensor] = []

    def keep(_: object, __: object, out: Tensor) -> None:
        out.retain_grad()
        predictions.append(out)

    model.net.register_forward_hook(keep)  # type: ignore[union-attr, operator]
    backward(model.loss(batch)[0])
    (prediction,) = predictions
    assert prediction.grad is not None
    assert (prediction.grad[~real] == 0).all()
    assert (prediction.grad[real] != 0).all()


@pytest.mark.parametrize("filler", [1e6, math.nan, math.inf])
def test_what_stands_in_padded_steps_and_dimensions_changes_nothing(
    every: str, filler: float, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Neither the loss nor one weight's gradient, to the last bit, although convolutions mix steps."""
    model = awake_head(every)
    results = []
    for value in (0.0, filler):
        batch, _ = padded(toy_batch(model), value)
        model.zero_grad()
        torch.manual_seed(5)
        loss, _ = model.loss(batch)
        backward(loss)
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_loss_is_the_mean_over_real_entries(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("mlp")
    batch, real = padded(toy_batch(model))
    assert batch.action is not None
    model.net = Spy(batch.action)
    loss, metrics = model.loss(batch)
    squared = (model.net.answer - model.action(batch.action)).detach().numpy().astype(np.float64) ** 2
    assert loss.item() == pytest.approx(squared[real.numpy()].mean(), rel=1e-5)
    assert metrics["mask_share"].item() == pytest.approx(real.float().mean().item())


def test_a_batch_of_padding_alone_costs_nothing(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every)
    batch = toy_batch(model)
    assert batch.action_valid is not None
    loss, _ = model.loss(dataclasses.replace(batch, action_valid=torch.zeros_like(batch.action_valid)))
    backward(loss)
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_a_window_without_one_valid_step_may_hold_anything(
    every: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Its NaN labels made every gradient NaN, through the mask of the loss, which stayed finite."""
    model = toy_head(every)
    batch = toy_batch(model)
    assert batch.action is not None
    assert batch.action_valid is not None
    action, valid = batch.action.clone(), batch.action_valid.clone()
    action[0], valid[0] = torch.nan, False
    loss, _ = model.loss(dataclasses.replace(batch, action=action, action_valid=valid))
    backward(loss)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_windows_without_masks_count_in_full(every: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(every)
    batch = toy_batch(model)
    bare = dataclasses.replace(batch, action_valid=None)
    losses = []
    for form in (batch, bare):
        torch.manual_seed(1)
        losses.append(model.loss(form)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["fm-mlp", "spatial-net"])
def test_flow_matching_trains_on_the_convention_of_pi0(name: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """x_t = t noise + (1 - t) action, u = noise - action."""
    model = toy_head(name)
    batch = toy_batch(model)
    assert batch.action is not None
    action = model.action(batch.action)
    spy = model.net = Spy(action)
    torch.manual_seed(3)
    noise = torch.randn_like(action)
    torch.manual_seed(3)
    errors = model.errors(batch, action)
    x_t, t = spy.given[0], spy.given[1][:, None, None]
    torch.testing.assert_close(x_t, t * noise + (1 - t) * action)
    torch.testing.assert_close(errors, (spy.answer - (noise - action)) ** 2)


@pytest.mark.parametrize(("time", "mean"), [("beta", 0.999 * 1.5 / 2.5 + 0.001), ("uniform", 0.5)])
def test_flow_times_have_the_mean_of_their_distribution(time: Any, mean: float) -> None:
    """The mean of Beta(1.5, 1) is 1.5 / 2.5."""
    t = draw_time(time, 40_000, torch.zeros(1))
    assert t.mean().item() == pytest.approx(mean, abs=0.006)  # four standard errors
    assert 0 <= t.min() < 0.02
    assert 0.98 < t.max() <= 1


def test_diffusion_trains_on_noise_added_by_the_squared_cosine_schedule(
    toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head("dp-mlp")
    batch = toy_batch(model)
    assert batch.action is not None
    action = model.action(batch.action)
    spy = model.net = Spy(action)
    torch.manual_seed(3)
    eps = torch.randn_like(action)
    torch.manual_seed(3)
    errors = model.errors(batch, action)
    noisy, k = spy.given[0], spy.given[1]
    abar = torch.tensor(squared_cosine(100))[k].float()[:, None, None]
    torch.testing.assert_close(noisy, abar.sqrt() * action + (1 - abar).sqrt() * eps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(errors, (spy.answer - eps) ** 2)
    assert k.unique().numel() > 1


def squared_cosine(steps: int) -> list[float]:
    """Products of 1 - beta_k = max(f(k + 1) / f(k), 0.001), f(k) = cos^2((k / K + 0.008) / 1.008 pi / 2).

    Equation 17 of Nichol and Dhariwal 2021 (https://arxiv.org/abs/2102.09672).
    """
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    products: list[float] = np.cumprod(np.maximum(f[1:] / f[:-1], 0.001)).tolist()
    return products


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_the_noise_schedule_is_the_squared_cosine(steps: int) -> None:
    assert noise_schedule(steps).alphas_cumprod.tolist() == pytest.approx(squared_cosine(steps), rel=1e-4)


def test_padded_steps_repeat_the_nearest_step_before_or_else_after() -> None:
    action = torch.tensor([[10.0, 11, 12, 13]] * 4)[..., None]
    T, F = True, False
    valid = torch.tensor([[T, T, F, F], [F, F, T, T], [F, T, F, T], [T, T, T, T]])
    wanted = [[10, 11, 11, 11], [12, 12, 12, 13], [11, 11, 11, 13], [10, 11, 12, 13]]
    assert repeat_edges(action, valid)[..., 0].tolist() == wanted


def test_actions_are_zero_in_padded_dimensions(every: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(every)
    batch, _ = padded(toy_batch(model))
    assert batch.action_dims is not None
    chunk = model.act(batch, whole=True)
    padding = ~batch.action_dims[:, None].expand_as(chunk)
    assert (chunk[padding] == 0).all()
    assert (chunk[~padding] != 0).all()


def test_a_batch_without_actions_has_no_loss(every: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head(every)
    with pytest.raises(DataError, match="no action"):
        model.loss(dataclasses.replace(toy_batch(model), action=None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": None}, "no state"),
        ({"features": {}}, "no feature 'grid'"),
        ({"state": torch.zeros(8, 1, 4)}, "state has shape"),
        ({"features": {"grid": torch.zeros(8, 1, 1, 4, 4, 3)}}, "feature 'grid' has shape"),
        ({"action": torch.zeros(8, 5, 2)}, "action has shape"),
        ({"action_valid": torch.ones(8, 5, dtype=torch.bool)}, "action_valid has shape"),
        ({"action_dims": torch.ones(8, 3, dtype=torch.bool)}, "action_dims has shape"),
        ({"obs_valid": torch.ones(8, 2, dtype=torch.bool)}, "obs_valid has shape"),
    ],
)
def test_a_batch_of_other_shapes_is_refused_by_name(
    change: dict[str, Any], says: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head("mlp")
    with pytest.raises(DataError, match=says):
        model.loss(dataclasses.replace(toy_batch(model), **change))
