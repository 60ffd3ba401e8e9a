"""A small transformer expert: noisy actions attend to each other and to the context tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.heads.nets.unet1d import SinusoidalPosEmb
from vla.stores.errors import UsageError


@dataclass(frozen=True)
class Seen:
    """A context, read: each layer's keys and values [B, heads, L, D / heads] of it, and which are real, bool [B, L]."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor


class ActionExpert(nn.Module):
    """(sample [B, H, A], time [B], `read` of a context [B, L, D] and its mask [B, L]) -> [B, H, A].

    One stack, pre-norm, over [context | time | actions], with pi0's blocks of attention: the context attends to itself,
    time and actions to everything. So what the context becomes does not depend on the actions, and a sampler reads it
    once for all of its steps. Padded context tokens are never attended to.
    """

    blocks: Sequence[_Block]

    def __init__(
        self, horizon: int, action_dim: int, dim: int, layers: int, heads: int, dropout: float, time_scale: float
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time = nn.Sequential(SinusoidalPosEmb(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.input = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(torch.randn(1, horizon, dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(layers))  # type: ignore[assignment]
        last = nn.Linear(dim, action_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(nn.LayerNorm(dim), last)

    def read(self, context: Tensor, valid: Tensor) -> Seen:
        """Return what the actions will attend to; of the last layer no more than that is computed."""
        # Itself too: a padded token among padded ones would otherwise attend to nothing, which is not a number.
        attend = valid[:, None, None] | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        seen = []
        for number, block in enumerate(self.blocks):
            query, key, value = block.project(context)
            seen.append((key, value))
            if number < len(self.blocks) - 1:
                context = block.attend(context, query, key, value, attend)
        return Seen(tuple(seen), valid)

    def forward(self, sample: Tensor, time: Tensor, seen: Seen) -> Tensor:
        actions = self.input(sample) + self.position
        x = torch.cat([self.time(time * self.time_scale)[:, None], actions], dim=1)
        attend = torch.cat([seen.valid, seen.valid.new_ones(x.shape[:2])], dim=1)[:, None, None]
        for block, (keys, values) in zip(self.blocks, seen.layers, strict=True):
            query, key, value = block.project(x)
            x = block.attend(x, query, torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), attend)
        out: Tensor = self.output(x[:, 1:])
        return out


class _Block(nn.Module):
    """Attention and an MLP of four times the width, each behind a norm and added to what came in."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        inner = (nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), *inner, nn.Dropout(dropout))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, heads, L, D / heads] of x [B, L, D]."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return query, key, value

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, attend: Tensor) -> Tensor:
        """Return x [B, L, D] after the block; `attend` bool, broadcast to [B, heads, L, keys]."""
        dropout = self.dropout if self.training else 0.0
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=dropout)
        x = x + F.dropout(self.out(heard.transpose(1, 2).flatten(2)), dropout)
        out: Tensor = x + self.mlp(x)
        return out


def check_width(width: int, heads: int) -> None:
    """Raise `UsageError` where a transformer of this width cannot have as many heads, or sines and cosines."""
    if width % heads or width % 2:
        raise UsageError(f"width {width} with {heads} heads", expected="an even multiple of the heads")
