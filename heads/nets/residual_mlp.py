"""A small denoiser or velocity net: the whole chunk as one vector, a few residual layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.heads.nets.unet1d import SinusoidalPosEmb


class ResidualMLP(nn.Module):
    """(sample [B, H, A], time [B], cond [B, D]) -> [B, H, A]. `time` is scaled by `time_scale` before its embedding.

    Layer norm before each residual layer keeps it trainable at any depth; the last layer starts at zero, so that the
    untrained net predicts 0.
    """

    def __init__(
        self, horizon: int, action_dim: int, cond_dim: int, hidden: int, layers: int, dropout: float, time_scale: float
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time = nn.Sequential(SinusoidalPosEmb(64), nn.Linear(64, hidden), nn.SiLU())
        self.input = nn.Linear(horizon * action_dim + cond_dim, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden, hidden),
            )
            for _ in range(layers)
        )
        last = nn.Linear(hidden, horizon * action_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(nn.LayerNorm(hidden), last)

    def forward(self, sample: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        x = self.input(torch.cat([sample.flatten(1), cond], dim=1)) + self.time(time * self.time_scale)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.output(x)
        return out.view_as(sample)
