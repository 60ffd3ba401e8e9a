"""A small transformer expert: noisy actions attend to each other and to the context tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.heads.nets.unet1d import SinusoidalPosEmb
from vla.stores.errors import UsageError


class ActionExpert(nn.Module):
    """(sample [B, H, A], time [B], context [B, L, D], context_valid bool [B, L]) -> [B, H, A].

    One sequence [context | time | actions], pre-norm, attention in both directions among all of it (as pi0's expert
    over its prefix, here in one stack). Padded context tokens are never attended to.
    """

    def __init__(
        self, horizon: int, action_dim: int, dim: int, layers: int, heads: int, dropout: float, time_scale: float
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time = nn.Sequential(SinusoidalPosEmb(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.input = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(torch.randn(1, horizon, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        last = nn.Linear(dim, action_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(nn.LayerNorm(dim), last)

    def forward(self, sample: Tensor, time: Tensor, context: Tensor, context_valid: Tensor) -> Tensor:
        H = sample.shape[1]
        actions = self.input(sample) + self.position
        when = self.time(time * self.time_scale)[:, None]
        sequence = torch.cat([context, when, actions], dim=1)
        padded = torch.cat([~context_valid, context_valid.new_zeros(len(sample), 1 + H)], dim=1)
        out: Tensor = self.output(self.layers(sequence, src_key_padding_mask=padded)[:, -H:])
        return out


def check_width(width: int, heads: int) -> None:
    """Raise `UsageError` where a transformer of this width cannot have as many heads, or sines and cosines."""
    if width % heads or width % 2:
        raise UsageError(f"width {width} with {heads} heads", expected="an even multiple of the heads")
