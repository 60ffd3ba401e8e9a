"""Flow matching in pi0's convention (Black et al. 2024, https://arxiv.org/abs/2410.24164), given a velocity.

x_t = t * noise + (1 - t) * action, u = noise - action, error = (v(x_t, t, obs) - u)^2; sampling integrates dx/dt = v
from t = 1 (noise) to t = 0 (action): x <- x + dt * v, dt = -1 / steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.model import HeadConfig, HeadModel, noise_like, real_dims

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, H, A], t [B] in [0, 1]) -> v [B, H, A]."""


class FlowSettings(HeadConfig):
    """What every head that matches flows can be told.

    `time`: "beta" draws t = 0.999 Beta(1.5, 1) + 0.001 as pi0 does, "uniform" U(0, 1). `sampler`: Euler, or Heun
    (second order, two evaluations a step); `sample_steps` of it.
    """

    time: Literal["beta", "uniform"] = "beta"
    sampler: Literal["euler", "heun"] = "euler"
    sample_steps: int = Field(10, ge=1)


class FlowMatching(HeadModel):
    """Errors and sampler of a head, given the velocity that its networks see in an observation."""

    config: FlowSettings
    adjustable: ClassVar[frozenset[str]] = HeadModel.adjustable | {"sampler", "sample_steps"}

    def velocity(self, batch: Batch) -> Velocity:
        """Return the velocity for the observations of a batch. What depends on those alone is computed here, once."""
        raise NotImplementedError

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity."""
        noise = real_dims(batch, torch.randn_like(action))
        t = self._draw_time(len(batch), action)
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
        v = self.velocity(batch)(x_t, t)
        return (v - (noise - action)) ** 2

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Integrate from noise."""
        field = self.velocity(batch)
        shape = (len(batch), self.config.horizon, self.io.action_dim)
        x = real_dims(batch, noise_like(shape, self.action.centre, generator))

        def velocity(x: Tensor, t: float) -> Tensor:
            return real_dims(batch, field(x, torch.full((len(x),), t, device=x.device)))

        return integrate(velocity, x, self.config.sample_steps, self.config.sampler)

    def _draw_time(self, count: int, like: Tensor) -> Tensor:
        if self.config.time == "uniform":
            return torch.rand(count, device=like.device)
        # Beta(1.5, 1) by its inverse distribution function: F(t) = t^1.5.
        return 0.999 * torch.rand(count, device=like.device) ** (1 / 1.5) + 0.001


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, sampler: str) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to t = 0 in equal steps, by Euler's or Heun's method."""
    dt = -1.0 / steps
    for step in range(steps):
        t = 1.0 + step * dt
        v = velocity(x, t)
        if sampler == "heun":
            v = (v + velocity(x + dt * v, t + dt)) / 2
        x = x + dt * v
    return x
