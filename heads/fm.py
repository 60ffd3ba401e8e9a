"""`fm`: flow matching over whatever features there are (flow.py has the formulas)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import EncodedConfig, EncodedHead
from vla.heads.flow import FlowMatching, FlowSettings, Velocity
from vla.heads.model import MAX_LAYERS, SMALL_NET, HeadConfig
from vla.heads.nets.action_expert import ActionExpert
from vla.heads.nets.residual_mlp import ResidualMLP
from vla.stores.errors import UsageError

TIME_SCALE = 1000.0
"""t in [0, 1] is embedded as 1000 t: the sinusoid's slowest rate is 1/10000 radian a unit."""


class FlowConfig(FlowSettings, EncodedConfig):
    """Settings of the flow-matching head, beside those of every such head.

    `net`: "expert", a small transformer over feature tokens, proprioception and noisy actions; or "mlp", a residual
    MLP over the whole chunk, which is faster on a CPU. `width`, `layers`, `heads`, `dropout`: its size (`heads` is the
    expert's alone).
    """

    net: Literal["expert", "mlp"] = "mlp"
    width: int = Field(512, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class FlowHead(FlowMatching, EncodedHead):
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
            self.to_width = nn.Linear(config.encoder.dim, width)
            self.net: nn.Module = ActionExpert(H, A, width, config.layers, config.heads, config.dropout, TIME_SCALE)
        else:
            cond = config.n_obs * config.encoder.dim
            self.net = ResidualMLP(H, A, cond, width, config.layers, config.dropout, TIME_SCALE)

    def velocity(self, batch: Batch) -> Velocity:
        """See `FlowMatching.velocity`."""
        context = self._context(batch)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            v: Tensor = self.net(x_t, t, *context)
            return v

        return velocity

    def _context(self, batch: Batch) -> tuple[Tensor, ...]:
        if self.config.net == "mlp":
            return (self.encoder.frames(batch).flatten(1),)
        tokens, valid = self.encoder.tokens(batch)
        return self.to_width(tokens), valid
