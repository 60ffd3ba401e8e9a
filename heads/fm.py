"""`fm`: flow matching, in pi0's convention (Black et al. 2024, https://arxiv.org/abs/2410.24164).

x_t = t * noise + (1 - t) * action, u = noise - action, error = (v(x_t, t, obs) - u)^2; sampling integrates dx/dt = v
from t = 1 (noise) to t = 0 (action): x <- x + dt * v, dt = -1 / steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import EncodedConfig, EncodedHead
from vla.heads.model import MAX_LAYERS, SMALL_NET, HeadConfig, noise_like, real_dims
from vla.heads.nets.action_expert import ActionExpert
from vla.heads.nets.residual_mlp import ResidualMLP
from vla.stores.errors import UsageError

TIME_SCALE = 1000.0
"""t in [0, 1] is embedded as 1000 t: the sinusoid's slowest rate is 1/10000 radian a unit."""


class FlowConfig(EncodedConfig):
    """Settings of the flow-matching head.

    `net`: "expert", a small transformer over feature tokens, proprioception and noisy actions; or "mlp", a residual
    MLP over the whole chunk, which is faster on a CPU. `width`, `layers`, `heads`, `dropout`: its size (`heads` is the
    expert's alone). `time`: "beta" draws t = 0.999 Beta(1.5, 1) + 0.001 as pi0 does, "uniform" U(0, 1). `sampler`:
    Euler, or Heun (second order, two evaluations a step). `sample_steps`: steps that it takes.
    """

    net: Literal["expert", "mlp"] = "mlp"
    width: int = Field(512, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    time: Literal["beta", "uniform"] = "beta"
    sampler: Literal["euler", "heun"] = "euler"
    sample_steps: int = Field(10, ge=1)


class FlowHead(EncodedHead):
    """Velocity net over [B, H, A]; see the module."""

    Config: ClassVar[type[HeadConfig]] = FlowConfig
    train_defaults: ClassVar[dict[str, Any]] = SMALL_NET
    config: FlowConfig

    def __init__(self, config: FlowConfig, io: HeadIO) -> None:
        super().__init__(config, io, tokens=config.net == "expert")
        H, A, width = config.horizon, io.action_dim, config.width
        if config.net == "expert":
            if width % config.heads or width % 2:
                raise UsageError(f"width {width} with {config.heads} heads", expected="an even multiple of the heads")
            self.to_width = torch.nn.Linear(config.encoder.dim, width)
            self.net: torch.nn.Module = ActionExpert(
                H, A, width, config.layers, config.heads, config.dropout, TIME_SCALE
            )
        else:
            cond = config.n_obs * config.encoder.dim
            self.net = ResidualMLP(H, A, cond, width, config.layers, config.dropout, TIME_SCALE)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity."""
        noise = real_dims(batch, torch.randn_like(action))
        t = self._draw_time(len(batch), action)
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
        v: Tensor = self.net(x_t, t, *self._context(batch))
        return (v - (noise - action)) ** 2

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Integrate from noise."""
        context = self._context(batch)
        shape = (len(batch), self.config.horizon, self.io.action_dim)
        x = real_dims(batch, noise_like(shape, context[0], generator))

        def velocity(x: Tensor, t: float) -> Tensor:
            return real_dims(batch, self.net(x, torch.full((len(x),), t, device=x.device), *context))

        return integrate(velocity, x, self.config.sample_steps, self.config.sampler)

    def _context(self, batch: Batch) -> tuple[Tensor, ...]:
        if self.config.net == "mlp":
            return (self.encoder.frames(batch).flatten(1),)
        tokens, valid = self.encoder.tokens(batch)
        return self.to_width(tokens), valid

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
