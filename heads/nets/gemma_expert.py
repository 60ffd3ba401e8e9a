"""The action expert of pi0 and pi0.5: a second, narrower Gemma whose tokens attend to a prefix's keys and values.

Layer by layer the expert's queries see [keys of the prefix | keys of its own tokens], which is what running both
networks side by side with one attention gives, and lets the prefix be computed once for all steps of a sampler.

pi0.5 tells the expert the time through adaptive RMSNorm (openpi, `RMSNorm` of gemma.py): a linear layer makes scale,
shift and gate of the condition; y = norm(x) (1 + scale) + shift goes into attention or MLP, and what comes out is
multiplied by the gate before it is added to the residual. With a gate of zero, as such layers begin, a layer is the
identity. Parameters carry the names that openpi's conversion to PyTorch and LeRobot give them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP, GemmaRotaryEmbedding

from vla.heads.nets.prefix import PrefixCache, block_mask


class ConditionalRMSNorm(nn.Module):
    """x [B, Q, W], condition [B, cond] or None -> (normalised [B, Q, W], gate [B, 1, W] or None).

    `cond`: width of the condition; None for Gemma's own norm, x / rms(x) (1 + weight). The linear layer begins at zero,
    as openpi's does.
    """

    def __init__(self, dim: int, eps: float, cond: int | None) -> None:
        super().__init__()
        self.eps = eps
        if cond is None:
            self.weight = nn.Parameter(torch.zeros(dim))
        else:
            self.dense = nn.Linear(cond, 3 * dim)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See the class."""
        exact = x.float()
        normed = exact * torch.rsqrt(exact.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        if condition is None:
            return (normed * (1 + self.weight.float())).type_as(x), None
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        return (normed * (1 + scale.float()) + shift.float()).type_as(x), gate.type_as(x)


class ExpertLayer(nn.Module):
    """One layer: attention over prefix and own tokens, then the MLP, each behind a norm and within a residual."""

    def __init__(self, config: GemmaConfig, index: int, cond: int | None) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn: Any = GemmaAttention(config, index)
        self.mlp: Any = GemmaMLP(config)
        self.input_layernorm = ConditionalRMSNorm(width, eps, cond)
        self.post_attention_layernorm = ConditionalRMSNorm(width, eps, cond)

    def forward(self, x: Tensor, condition: Tensor | None, **attention: Any) -> Tensor:
        """Return [B, Q, W] of [B, Q, W]."""
        normed, gate = self.input_layernorm(x, condition)
        out, _ = self.self_attn(normed, **attention)
        x = x + (out if gate is None else out * gate)
        normed, gate = self.post_attention_layernorm(x, condition)
        out = self.mlp(normed)
        added: Tensor = x + (out if gate is None else out * gate)
        return added


class GemmaExpert(nn.Module):
    """(tokens [B, Q, W], prefix, starts [Q], condition [B, cond] or None) -> [B, Q, W].

    `config` has the layers, heads and head_dim of the prefix's network, and a width and MLP of its own. `starts`: 1
    where a block of tokens begins that those before do not see (prefix.py). All tokens are real.
    """

    def __init__(self, config: GemmaConfig, cond: int | None = None) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.layers = nn.ModuleList(ExpertLayer(config, index, cond) for index in range(config.num_hidden_layers))
        self.norm = ConditionalRMSNorm(config.hidden_size, config.rms_norm_eps, cond)
        self.rotary_emb: Any = GemmaRotaryEmbedding(config)
        for module in self.modules():
            if getattr(module, "bias", 0) is None:  # all but the adaptive norms' layers, which begin at zero
                nn.init.normal_(cast("nn.Linear", module).weight, std=config.initializer_range)

    def forward(self, tokens: Tensor, prefix: PrefixCache, starts: Tensor, condition: Tensor | None = None) -> Tensor:
        """See the class."""
        B, Q = tokens.shape[:2]
        own = block_mask(torch.ones(B, Q, dtype=torch.bool, device=tokens.device), starts.expand(B, Q))
        seen = torch.cat([prefix.valid[:, None].expand(B, Q, -1), own], dim=2)[:, None]
        positions = prefix.counts[:, None] + torch.arange(Q, device=tokens.device)
        rotation = self.rotary_emb(tokens, position_ids=positions)
        for layer in self.layers:
            tokens = layer(tokens, condition, position_embeddings=rotation, attention_mask=seen, past_key_values=prefix)
        out: Tensor = self.norm(tokens, condition)[0]
        return out
