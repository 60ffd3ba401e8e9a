"""`fm`: flow matching over any features, in pi0's convention (flow.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import EncodedConfig, EncodedHead
from vla.heads.flow import TIME_SCALE, Sampler, TimeDistribution, flow_errors, flow_sample
from vla.heads.model import MAX_LAYERS, SMALL_NET, HeadConfig
from vla.heads.nets.action_expert import ActionExpert, Seen, check_width
from vla.heads.nets.residual_mlp import ResidualMLP


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
    time: TimeDistribution = "beta"
    sampler: Sampler = "euler"
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
            check_width(width, config.heads)
            self.to_width = torch.nn.Linear(config.encoder.dim, width)
            self.net: torch.nn.Module = ActionExpert(
                H, A, width, config.layers, config.heads, config.dropout, TIME_SCALE
            )
        else:
            cond = config.n_obs * config.encoder.dim
            self.net = ResidualMLP(H, A, cond, width, config.layers, config.dropout, TIME_SCALE)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity."""
        return flow_errors(lambda x, t: self.net(x, t, self._context(batch)), batch, action, self.config.time)

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Integrate from noise."""
        config, context = self.config, self._context(batch)
        shape = (len(batch), config.horizon, self.io.action_dim)
        how: Any = {"steps": config.sample_steps, "sampler": config.sampler}
        return flow_sample(lambda x, t: self.net(x, t, context), batch, shape, self.action.centre, generator, **how)

    def _context(self, batch: Batch) -> Tensor | Seen:
        if self.config.net == "mlp":
            return self.encoder.frames(batch).flatten(1)
        tokens, valid = self.encoder.tokens(batch)
        seen: Seen = self.net.read(self.to_width(tokens), valid)  # type: ignore[operator]
        return seen
