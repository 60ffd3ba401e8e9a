"""pi0.5's velocity: noisy actions through the adaptive-RMS expert, over a prefix's keys and values.

The time reaches the expert as the condition of its norms alone (openpi, `embed_suffix` with `pi05`): sines and cosines
of periods from 4e-3 to 4, two linear layers, each followed by SiLU. Parameters are named as openpi's conversion has
them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig

from vla.heads.nets.gemma_expert import GemmaExpert
from vla.heads.nets.prefix import PrefixCache

PERIODS = (4e-3, 4.0)


class Pi05Velocity(nn.Module):
    """(x_t [B, H, A], t [B], prefix) -> velocity [B, H, A]. Actions are padded with zeros to `padded` dimensions."""

    def __init__(self, config: GemmaConfig, padded: int) -> None:
        super().__init__()
        width = int(config.hidden_size)
        self.padded = padded
        self.expert = GemmaExpert(config, cond=width)
        self.action_in_proj, self.action_out_proj = nn.Linear(padded, width), nn.Linear(width, padded)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, prefix: PrefixCache) -> Tensor:
        """See the class."""
        A = x.shape[-1]
        tokens = self.action_in_proj(F.pad(x, (0, self.padded - A)))
        embedded = time_embedding(t, tokens.shape[-1]).to(tokens.dtype)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        starts = torch.arange(x.shape[1], device=x.device) == 0  # one block, which the prefix does not see
        velocity: Tensor = self.action_out_proj(self.expert(tokens, prefix, starts, condition))
        return velocity[..., :A]


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Return [sin, cos](2 pi t / period) [B, width], periods from 4e-3 to 4 in equal ratios (`posemb_sincos`)."""
    low, high = PERIODS
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
    angle = t.double()[:, None] * (2 * math.pi / (low * (high / low) ** fraction))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(t.dtype)
