"""Flow matching in pi0's convention (Black et al. 2024, https://arxiv.org/abs/2410.24164): times, errors, sampling.

x_t = t * noise + (1 - t) * action, u = noise - action, error = (v(x_t, t) - u)^2; sampling integrates dx/dt = v from
t = 1 (noise) to t = 0 (action): x <- x + dt * v, dt = -1 / steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.model import masked_elements, noise_like, real_dims

TimeDistribution = Literal["beta", "uniform"]
Sampler = Literal["euler", "heun"]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], t [B]) -> v [B, H, A]."""

TIME_SCALE = 1000.0
"""t in [0, 1] is embedded as 1000 t: the sinusoid's slowest rate is 1/10000 radian a unit."""

TIME_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where `velocity_mse` compares velocities: the same times for every checkpoint, so that figures compare."""

NOISE_SEED = 0


def draw_time(distribution: TimeDistribution, count: int, like: Tensor) -> Tensor:
    """Draw t [count] in [0, 1] on the device of `like`: "beta" is 0.999 Beta(1.5, 1) + 0.001, as pi0 draws it."""
    if distribution == "uniform":
        return torch.rand(count, device=like.device)
    # Beta(1.5, 1) by its inverse distribution function: F(t) = t^1.5.
    return 0.999 * torch.rand(count, device=like.device) ** (1 / 1.5) + 0.001


def flow_errors(velocity: Velocity, batch: Batch, action: Tensor, distribution: TimeDistribution) -> Tensor:
    """Return the squared errors [B, H, A] of the velocity for normalised actions, at noise and times drawn here."""
    noise = real_dims(batch, torch.randn_like(action))
    return velocity_errors(velocity, action, noise, draw_time(distribution, len(batch), action))


def velocity_errors(velocity: Velocity, action: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return (v(x_t, t) - (noise - action))^2 for noise like the action [B, H, A] and times t [B]."""
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
    return (velocity(x_t, t) - (noise - action)) ** 2


def flow_sample(
    velocity: Velocity,
    batch: Batch,
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | None,
    *,
    steps: int,
    sampler: Sampler,
) -> Tensor:
    """Integrate from noise of `shape` [B, H, A] on the device of `like`; padded dimensions stay 0 in every step."""
    x = real_dims(batch, noise_like(shape, like, generator))
    return integrate(lambda x, t: real_dims(batch, velocity(x, x.new_full((len(x),), t))), x, steps, sampler)


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, sampler: Sampler) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to t = 0 in equal steps, by Euler's or Heun's method."""
    dt = -1.0 / steps
    for step in range(steps):
        t = 1.0 + step * dt
        v = velocity(x, t)
        if sampler == "heun":
            v = (v + velocity(x + dt * v, t + dt)) / 2
        x = x + dt * v
    return x


@torch.no_grad()
def velocity_mse(velocity: Velocity, batch: Batch, action: Tensor) -> dict[str, Tensor]:
    """Return the velocity's squared errors [n] at each time of `TIME_GRID`, and their mean over the times.

    n counts the valid steps in real dimensions of normalised actions [B, H, A]. The noise is the same in every call of
    the same shape, so that two checkpoints differ by their weights alone.
    """
    noise = torch.randn(action.shape, generator=torch.Generator().manual_seed(NOISE_SEED)).to(action)
    noise = real_dims(batch, noise)
    at = {
        t: masked_elements(velocity_errors(velocity, action, noise, action.new_full((len(action),), t)), batch)
        for t in TIME_GRID
    }
    every = {f"velocity_mse_t{t:g}": errors for t, errors in at.items()}
    return {"velocity_mse": torch.stack(list(at.values())).mean(0), **every}
