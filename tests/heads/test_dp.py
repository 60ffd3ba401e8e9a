"""Diffusion: our sampler against diffusers' where that is right, and against the exact score where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.dp import DiffusionConfig, ddim_step, noise_schedule, sampling_steps
from vla.heads.model import HeadModel
from vla.stores.errors import UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
SETTINGS: dict[str, Any] = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


def gaussian_eps(x: Tensor, abar: float, mean: float = 0.3, deviation: float = 0.2) -> Tensor:
    """Exact noise prediction where actions are N(mean, deviation^2)."""
    return (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / (abar * deviation**2 + 1 - abar)


def ddim(x: Tensor, steps: list[int], *, clip: bool = False) -> Tensor:
    abar = noise_schedule(100).alphas_cumprod.tolist()
    for k, previous in zip(steps, [*steps[1:], None], strict=True):
        x = ddim_step(gaussian_eps(x, abar[k]), x, abar[k], 1.0 if previous is None else abar[previous], clip=clip)
    return x


def diffusers_chain(scheduler: Any, x: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    scheduler.set_timesteps(steps)
    return stepped(scheduler, x, generator)


def stepped(scheduler: Any, x: Tensor, generator: torch.Generator | None) -> Tensor:
    for k in scheduler.timesteps.tolist():
        eps = gaussian_eps(x, float(scheduler.alphas_cumprod[k]))
        x = scheduler.step(eps, k, x, generator=generator).prev_sample
    return x


class Exact(torch.nn.Module):
    """The net that a head trained on a Gaussian for ever would become."""

    def forward(self, x: Tensor, k: Tensor, cond: Tensor) -> Tensor:
        return gaussian_eps(x, float(noise_schedule(100).alphas_cumprod[int(k[0])]))


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 25, 50, 100])
@pytest.mark.parametrize("clip", [False, True])
def test_a_chain_of_ddim_steps_equals_diffusers_where_the_steps_divide(steps: int, clip: bool) -> None:
    x = torch.randn(4, 3, 2) * 2
    scheduler = DDIMScheduler(**{**SETTINGS, "clip_sample": clip}, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs = diffusers_chain(scheduler, x, steps)
    torch.testing.assert_close(ddim(x, sampling_steps(100, steps), clip=clip), theirs, atol=1e-5, rtol=1e-5)


def test_sixteen_of_a_hundred_ddim_steps_keep_a_gaussians_mean_where_those_of_diffusers_shift_it() -> None:
    """With the exact score every first-order step keeps the mean; a step taken to the wrong noise level does not."""
    x = torch.randn(2000, 1, dtype=torch.float64)
    x -= x.mean()
    ours = ddim(x, sampling_steps(100, 16)).mean().item()
    scheduler = DDIMScheduler(**{**SETTINGS, "clip_sample": False}, timestep_spacing="trailing")
    theirs = diffusers_chain(scheduler, x, 16).mean().item()
    assert ours == pytest.approx(0.3, abs=3e-4)
    assert abs(theirs - 0.3) > 2e-3


def test_more_ddim_steps_come_nearer_to_the_gaussian() -> None:
    x = torch.randn(2000, 1, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    errors = [abs(ddim(x, sampling_steps(100, steps)).std().item() - 0.2) for steps in (5, 10, 20, 50, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 16, 100])
def test_a_heads_ddpm_chain_equals_diffusers_to_the_bit(
    steps: int, clip: bool, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """The same draws too: a policy takes one generator through an episode, so that each decision depends on them."""
    model = toy_head("dp-mlp", sampler="ddpm", sample_steps=steps, clip_sample=clip)
    model.net = Exact()
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    ours = model.sample(toy_batch(model, 6), generators[0])
    scheduler = DDPMScheduler(**{**SETTINGS, "clip_sample": clip}, variance_type="fixed_small")
    start = torch.randn(ours.shape, generator=generators[1])
    scheduler.set_timesteps(timesteps=sampling_steps(100, steps))
    assert torch.equal(ours, stepped(scheduler, start, generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_heads_ddim_chain_is_the_chain_of_steps(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("dp-mlp", sample_steps=7)
    model.net = Exact()
    ours = model.sample(toy_batch(model, 6), torch.Generator().manual_seed(4))
    start = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours, ddim(start, sampling_steps(100, 7), clip=True), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 16), ({"sampler": "ddpm"}, 100), ({"train_steps": 8}, 8), ({"sampler": "ddpm", "sample_steps": 20}, 20)],
)
def test_ddim_takes_few_steps_and_ddpm_all_unless_told(settings: dict[str, Any], steps: int) -> None:
    assert DiffusionConfig.build(settings).steps == steps


@pytest.mark.parametrize("norm", ["zscore", "quantile", "none"])
def test_clipping_is_refused_where_actions_leave_the_range(norm: str, toy_head: MakeHead) -> None:
    with pytest.raises(UsageError, match="clip_sample"):
        toy_head("dp-mlp", action_norm=norm)
    toy_head("dp-mlp", action_norm=norm, clip_sample=False)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match="sample_steps"):
        DiffusionConfig.build({"sample_steps": steps})


@pytest.mark.parametrize("n_obs", [1, 2, 3])
def test_executed_actions_begin_with_the_present(n_obs: int, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The predicted horizon begins with the first observed frame: n_obs - 1 actions are past."""
    model = toy_head("dp-mlp", n_obs=n_obs, n_action=1)
    batch = toy_batch(model)
    whole = model.act(batch, torch.Generator().manual_seed(0), whole=True)
    acted = model.act(batch, torch.Generator().manual_seed(0))
    assert model.config.window.action_offset == 1 - n_obs
    assert torch.equal(acted, whole[:, n_obs - 1 :])
