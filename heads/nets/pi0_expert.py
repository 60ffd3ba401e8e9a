"""Velocity nets of pi0 and pi0.5: what goes into the action expert, and what comes out.

pi0 (openpi, `embed_suffix`): one token for the state; for each noisy action a token from [action, time] through an MLP.
pi0.5: no token for the state (it is in the prompt); the time conditions the norms of the expert instead.
Actions and states are padded with zeros to the width that the projections have; what comes out of padding is dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig

from vla.heads.nets.gemma_expert import GemmaExpert
from vla.heads.nets.prefix import PrefixCache

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Of the sinusoids that times in [0, 1] are embedded in (openpi, `posemb_sincos`)."""


def embed_time(t: Tensor, dim: int) -> Tensor:
    """Return sines and then cosines [B, dim] of t [B], their periods spread geometrically from 0.004 to 4."""
    fraction = torch.linspace(0.0, 1.0, dim // 2, device=t.device)
    rate = 2 * math.pi / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction)
    angle = t[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Pi0Net(nn.Module):
    """(x_t [B, H, A], t [B], prefix, state [B, S]) -> velocity [B, H, A]; S may be 0."""

    def __init__(self, config: GemmaConfig, action_dim: int, max_action: int, max_state: int) -> None:
        super().__init__()
        self.action_dim, self.width = action_dim, config.hidden_size
        self.expert = GemmaExpert(config)
        self.state_proj = nn.Linear(max_state, self.width)
        self.action_in_proj = nn.Linear(max_action, self.width)
        self.action_time_mlp_in = nn.Linear(2 * self.width, self.width)
        self.action_time_mlp_out = nn.Linear(self.width, self.width)
        self.action_out_proj = nn.Linear(self.width, max_action)

    def forward(self, x_t: Tensor, t: Tensor, prefix: PrefixCache, state: Tensor) -> Tensor:
        """See the class."""
        actions = self.action_in_proj(widen(x_t, self.action_in_proj))
        times = embed_time(t, self.width)[:, None].expand_as(actions)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([actions, times], dim=2))))
        tokens = torch.cat([self.state_proj(widen(state, self.state_proj))[:, None], actions], dim=1)
        starts = first_tokens(tokens, 2)
        out: Tensor = self.action_out_proj(self.expert(tokens, prefix, starts)[:, 1:])
        return out[..., : self.action_dim]


class Pi05Net(nn.Module):
    """(x_t [B, H, A], t [B], prefix) -> velocity [B, H, A]."""

    def __init__(self, config: GemmaConfig, action_dim: int, max_action: int) -> None:
        super().__init__()
        self.action_dim, self.width = action_dim, config.hidden_size
        self.expert = GemmaExpert(config, cond=self.width)
        self.action_in_proj = nn.Linear(max_action, self.width)
        self.time_mlp_in = nn.Linear(self.width, self.width)
        self.time_mlp_out = nn.Linear(self.width, self.width)
        self.action_out_proj = nn.Linear(self.width, max_action)

    def forward(self, x_t: Tensor, t: Tensor, prefix: PrefixCache) -> Tensor:
        """See the class."""
        tokens = self.action_in_proj(widen(x_t, self.action_in_proj))
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embed_time(t, self.width)))))
        out: Tensor = self.action_out_proj(self.expert(tokens, prefix, first_tokens(tokens, 1), condition))
        return out[..., : self.action_dim]


def widen(x: Tensor, projection: nn.Linear) -> Tensor:
    """Pad the last axis of x with zeros to what a projection takes."""
    return F.pad(x, (0, projection.in_features - x.shape[-1]))


def first_tokens(tokens: Tensor, count: int) -> Tensor:
    """Return starts of blocks [Q]: each of the first `count` tokens begins one."""
    return (torch.arange(tokens.shape[1], device=tokens.device) < count).long()
