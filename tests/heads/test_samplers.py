"""Samplers: closed forms, formulas written out a second time, seeds, and independence of batch mates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vla.heads import dp, flow
from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.dp import noise_schedule, sampling_steps
from vla.heads.flow import integrate
from vla.heads.model import HeadModel
from vla.heads.registry import head_class
from vla.stores.errors import UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
RowsOf = Callable[[Batch, Tensor], Batch]
SHAPE = (8, 4, 2)


class Formula(torch.nn.Module):
    """Stands in for a head's net: (x, time, condition) -> `formula(x, time)`, and counts its calls."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.times = formula, list[float]()

    def forward(self, x: Tensor, time: Tensor, *_: Tensor) -> Tensor:
        assert time.shape == (len(x),)
        assert (time == time[0]).all()
        self.times.append(time[0].item())
        return self.formula(x, time[:, None, None])

    def read(self, context: Tensor, valid: Tensor) -> Tensor:
        """Stand in for the action expert's."""
        return context


def alphas(train_steps: int = 100) -> list[float]:
    abar: list[float] = noise_schedule(train_steps).alphas_cumprod.double().tolist()
    return abar


def true_noise(action: Tensor) -> Formula:
    """The eps that leads from `action` to x at step k."""
    abar = noise_schedule(100).alphas_cumprod

    def eps(x: Tensor, k: Tensor) -> Tensor:
        return (x - abar[k].sqrt() * action) / (1 - abar[k]).sqrt()

    return Formula(eps)


# Diffusion.


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", 1), ("ddim", 16), ("ddim", 33), ("ddim", 100), ("ddpm", 100), ("ddpm", 16)]
)
def test_diffusion_with_the_true_noise_recovers_the_action(
    sampler: str, steps: int, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head("dp-mlp", sampler=sampler, sample_steps=steps)
    action = torch.rand(SHAPE) * 1.8 - 0.9
    net = model.net = true_noise(action)
    sampled = model.sample(toy_batch(model), torch.Generator().manual_seed(0))
    # In the first step roundings of x (6e-8) are divided by sqrt(abar) = 5e-4; later ones correct that.
    torch.testing.assert_close(sampled, action, atol=2e-3 if steps == 1 else 1e-4, rtol=0)
    assert net.times == sampling_steps(100, steps)


@pytest.mark.parametrize("steps", [1, 7, 16, 100])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_diffusion_keeps_a_gaussian_s_mean_at_any_number_of_steps(
    sampler: str, steps: int, toy_head: MakeHead, toy_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For data N(mu, s^2) the best eps is linear in x, and from x_T = 0 the mean of the samples follows exactly.

    A step that lands elsewhere than where the next one starts, as diffusers' DDIM does at 7 or 16 of 100, shifts it.
    """
    mu, s = 0.6, 0.3
    abar = noise_schedule(100).alphas_cumprod
    model = toy_head("dp-mlp", sampler=sampler, sample_steps=steps, clip_sample=False)

    def best(x: Tensor, k: Tensor) -> Tensor:
        a = abar[k]
        return (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s**2 + 1 - a)

    model.net = Formula(best)
    monkeypatch.setattr(dp, "noise_like", lambda shape, reference, generator: torch.zeros(shape))
    sampled = model.sample(toy_batch(model), None)
    torch.testing.assert_close(sampled, torch.full(SHAPE, mu), atol=1e-3, rtol=0)


def crooked(x: Tensor, k: Tensor) -> Tensor:
    """A net that is wrong in its own way at every place and step."""
    return torch.tanh(0.7 * x + k / 100) + 0.1 * torch.sin(9 * x)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [10, 16, 100])
def test_ddim_equals_its_formula(steps: int, clip: bool, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Equation 12 of Song et al. 2021 with sigma = 0, in double precision.

    Without clipping the first step divides every rounding by sqrt(abar) = 5e-4: then relative to the largest value.
    """
    model = toy_head("dp-mlp", sampler="ddim", sample_steps=steps, clip_sample=clip)
    model.net = Formula(crooked)
    sampled = model.sample(toy_batch(model), torch.Generator().manual_seed(7))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).double()
    abar, ks = alphas(), sampling_steps(100, steps)
    for i, k in enumerate(ks):
        following = abar[ks[i + 1]] if i + 1 < steps else 1.0
        eps = crooked(x, torch.tensor(float(k)))
        x_0 = (x - math.sqrt(1 - abar[k]) * eps) / math.sqrt(abar[k])
        if clip:
            x_0 = x_0.clamp(-1, 1)
        x = math.sqrt(following) * x_0 + math.sqrt(1 - following) * eps
    scale = max(1.0, x.abs().max().item())
    torch.testing.assert_close(sampled.double() / scale, x / scale, atol=1e-5 if clip else 1e-3, rtol=0)


@pytest.mark.parametrize("steps", [10, 16, 100])
def test_ddpm_equals_its_formula(steps: int, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Equations 6 and 7 of Ho et al. 2020 (https://arxiv.org/abs/2006.11239) over the steps taken, clean part clipped.

    alpha = abar_k / abar_following and beta = 1 - alpha where steps are left out.
    """
    model = toy_head("dp-mlp", sampler="ddpm", sample_steps=steps)
    model.net = Formula(crooked)
    sampled = model.sample(toy_batch(model), torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=generator).double()
    abar, ks = alphas(), sampling_steps(100, steps)
    for i, k in enumerate(ks):
        following = abar[ks[i + 1]] if i + 1 < steps else 1.0
        alpha = abar[k] / following
        eps = crooked(x, torch.tensor(float(k)))
        x_0 = ((x - math.sqrt(1 - abar[k]) * eps) / math.sqrt(abar[k])).clamp(-1, 1)
        of_x_0 = math.sqrt(following) * (1 - alpha) / (1 - abar[k])
        of_x = math.sqrt(alpha) * (1 - following) / (1 - abar[k])
        x = of_x_0 * x_0 + of_x * x
        if i + 1 < steps:
            variance = (1 - following) / (1 - abar[k]) * (1 - alpha)
            x = x + math.sqrt(variance) * torch.randn(SHAPE, generator=generator).double()
    torch.testing.assert_close(sampled.double(), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("train_steps", [1, 2, 7, 50, 100])
def test_sampling_starts_at_pure_noise_and_descends(train_steps: int) -> None:
    for count in range(1, train_steps + 1):
        steps = sampling_steps(train_steps, count)
        assert len(steps) == count
        assert steps[0] == train_steps - 1
        assert steps[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(steps))
    assert sampling_steps(train_steps, train_steps) == list(range(train_steps))[::-1]


def test_clipping_keeps_actions_within_the_demonstrated_range(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    chunks = {}
    for clip in (True, False):
        model = toy_head("dp-mlp", clip_sample=clip)
        model.net = true_noise(torch.full(SHAPE, 3.0))
        chunks[clip] = model.sample(toy_batch(model), torch.Generator().manual_seed(0))
    assert chunks[True].abs().max() <= 1
    assert chunks[False].mean() == pytest.approx(3.0, abs=1e-3)


# Flow matching.


@pytest.mark.parametrize("name", ["fm-mlp", "spatial-net"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 10])
def test_flow_with_the_true_velocity_recovers_the_action(
    name: str, sampler: str, steps: int, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head(name, sampler=sampler, sample_steps=steps)
    action = torch.randn(SHAPE)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    net = model.net = Formula(lambda x, t: noise - action)
    sampled = model.sample(toy_batch(model), torch.Generator().manual_seed(4))
    torch.testing.assert_close(sampled, action, atol=1e-5, rtol=0)
    assert len(net.times) == steps * (2 if sampler == "heun" else 1)


def test_time_runs_from_noise_to_action() -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    integrate(velocity, torch.zeros(1), 4, "euler")
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])
    times.clear()
    integrate(velocity, torch.zeros(1), 2, "heun")
    assert times == pytest.approx([1.0, 0.5, 0.5, 0.0])


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(
    ("velocity", "exact"),
    [(lambda x, t: x * t, math.exp(-0.5)), (lambda x, t: x, math.exp(-1)), (lambda x, t: torch.cos(x) ** 2, None)],
    ids=["x t", "x", "cos^2 x"],
)
def test_integration_converges_to_the_closed_form_at_its_order(
    velocity: Callable[[Tensor, float], Tensor], exact: float | None, sampler: Any, order: int
) -> None:
    """x(1) = 1. dx/dt = x t: x(0) = exp(-1/2); x: exp(-1); cos^2 x: tan x falls by 1."""
    exact = math.atan(math.tan(1.0) - 1) if exact is None else exact
    start = torch.ones((), dtype=torch.float64)
    errors = [abs(integrate(velocity, start, steps, sampler).item() - exact) for steps in (100, 200)]
    assert errors[1] < 5e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


# Every head.


def test_sampling_repeats_with_its_generator_and_leaves_the_global_one_alone(
    every: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head(every)
    batch = toy_batch(model)
    before = torch.get_rng_state()
    first, second, other = (model.act(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert torch.equal(first, other) == (every.partition("-")[0] in ("mlp", "track"))


def test_ddpm_draws_every_step_from_its_generator(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("dp-mlp", sampler="ddpm")
    batch = toy_batch(model)
    first, second = (model.act(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_an_action_does_not_depend_on_batch_mates(
    every: str, awake_head: MakeHead, toy_batch: MakeBatch, rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awake_head(every)
    batch = toy_batch(model)
    noise = torch.randn(len(batch), model.config.horizon, 2)
    window = slice(0, len(batch))
    for module in (dp, flow):
        monkeypatch.setattr(module, "noise_like", lambda shape, reference, generator: noise[window])
    together = model.act(batch)
    for row in range(3):
        window = slice(row, row + 1)
        alone = rows_of(batch, torch.tensor([row]))
        torch.testing.assert_close(model.act(alone), together[window], atol=2e-5, rtol=1e-5)


def test_an_action_never_reads_the_demonstrated_one(every: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(every)
    batch = toy_batch(model)
    blind = dataclasses.replace(batch, action=None, action_valid=None)
    seen, unseen = (model.act(b, torch.Generator().manual_seed(0)) for b in (batch, blind))
    assert torch.equal(seen, unseen)


def test_diffusion_acts_from_the_present_on(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Its horizon begins with the first observed frame."""
    model = awake_head("dp-mlp", n_obs=3)
    batch = toy_batch(model)
    acted = model.act(batch, torch.Generator().manual_seed(0))
    whole = model.act(batch, torch.Generator().manual_seed(0), whole=True)
    assert whole.shape == (8, 4, 2)
    assert torch.equal(acted, whole[:, 2:])


@pytest.mark.parametrize("name", ["mlp", "fm-expert"])
def test_heads_that_start_at_the_present_act_on_the_whole_horizon(
    name: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head(name, n_obs=3)
    batch = toy_batch(model)
    acted = model.act(batch, torch.Generator().manual_seed(0))
    assert torch.equal(acted, model.act(batch, torch.Generator().manual_seed(0), whole=True))


def test_acting_in_training_mode_has_no_dropout_and_no_noise_and_stays_in_it(
    every: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    drops = "dropout" in head_class(every.partition("-")[0]).Config.model_fields
    model = awake_head(every, encoder={"noise": 1.0, "dropout": 0.5}, **({"dropout": 0.5} if drops else {}))
    batch = toy_batch(model)
    wanted = model.act(batch, torch.Generator().manual_seed(0))
    model.train()
    assert torch.equal(model.act(batch, torch.Generator().manual_seed(0)), wanted)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("dp", {"sample_steps": 101}, "at most train_steps = 100"),
        ("dp", {"train_steps": 10, "sample_steps": 11}, "at most train_steps = 10"),
        ("dp", {"train_steps": 0}, "train_steps"),
        ("dp", {"action_norm": "zscore"}, "clip_sample"),
        ("dp", {"action_norm": "none"}, "clip_sample"),
        ("dp", {"horizon": 6, "n_action": 2, "down_dims": [16, 32, 64]}, "multiple of 4"),
        ("dp", {"horizon": 8, "n_obs": 2, "n_action": 8}, "at most 7"),
        (
            "dp",
            {"horizon": 1, "n_obs": 2, "n_action": 1},
            r"at least 2.*model\.n_obs=1, .*model\.horizon=N",
        ),
        ("mlp", {"horizon": 4, "n_action": 5}, "at most 4"),
        ("fm", {"horizon": 4, "n_action": 5}, "at most 4"),
        ("fm", {"sample_steps": 0}, "sample_steps"),
        ("fm", {"sampler": "ddim"}, "sampler"),
        ("fm", {"net": "expert", "width": 36, "heads": 8}, "even multiple of the heads"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    name: str, settings: dict[str, Any], says: str, toy_io: HeadIO
) -> None:
    with pytest.raises(UsageError, match=says):
        build_head(name, settings, toy_io)


def test_few_training_steps_bound_the_default_number_of_sampling_steps(toy_head: MakeHead) -> None:
    model: Any = toy_head("dp-mlp", train_steps=10, fitted=False)
    assert model.config.steps == 10
