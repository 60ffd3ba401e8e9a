"""`mlp`: the plain baseline: a masked mean squared error on the whole chunk of actions, no sampling."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoded import EncodedConfig, EncodedHead
from vla.heads.model import MAX_LAYERS, SMALL_NET, HeadConfig
from vla.heads.nets.residual_mlp import ResidualMLP


class MlpConfig(EncodedConfig):
    """Settings of the planner: `hidden`, `layers` and `dropout` of its residual MLP."""

    hidden: int = Field(512, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    dropout: float = Field(0.0, ge=0, lt=1)


class MlpHead(EncodedHead):
    """Observation -> chunk, in one pass. Where demonstrations differ it predicts their mean: see `dp` and `fm`."""

    Config: ClassVar[type[HeadConfig]] = MlpConfig
    train_defaults: ClassVar[dict[str, Any]] = SMALL_NET
    config: MlpConfig

    def __init__(self, config: MlpConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        cond = config.n_obs * config.encoder.dim
        self.net = ResidualMLP(config.horizon, io.action_dim, cond, config.hidden, config.layers, config.dropout, 1.0)

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the predicted actions."""
        return (self._predict(batch) - action) ** 2

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Return the prediction; `generator` is not needed."""
        return self._predict(batch)

    def _predict(self, batch: Batch) -> Tensor:
        cond = self.encoder.frames(batch).flatten(1)
        start = cond.new_zeros(len(batch), self.config.horizon, self.io.action_dim)
        out: Tensor = self.net(start, cond.new_zeros(len(batch)), cond)
        return out
