"""The language model of PaliGemma over prefix embeddings: image tokens from a store, words, geometry tokens.

It starts from embeddings [B, L, D], so no vision tower is loaded or run, and gives what an action expert attends to:
each layer's keys and values. Positions count real tokens alone (as openpi's `cumsum(pad_mask) - 1` does), and padding
is never attended to: where padding stands, and how much of it, changes no prediction.

Which tokens see each other follows big_vision and openpi (`make_attn_mask`): `starts` is 1 where a new block begins;
a token sees all tokens of its own block and of those before. All 0: everything sees everything (images, prompt and
geometry). All 1 on a span: that span is causal (an answer that is being spoken).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaModel
from transformers.cache_utils import DynamicCache


@dataclass(frozen=True)
class PrefixCache:
    """What a language model made of L tokens, D wide, in each of its layers.

    `keys` (rotated) and `values`: one [B, K, L, head_dim] a layer. `valid` bool [B, L]. `hidden` [B, M, D]: the last
    hidden states of the tokens that came last (all L of them, where nothing was continued).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Tensor
    hidden: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, K, L + Q, head_dim] of prefix and Q more tokens; the prefix itself stays.

        This is what transformers' attention asks of a cache.
        """
        return torch.cat([self.keys[layer], key], dim=2), torch.cat([self.values[layer], value], dim=2)

    def detach(self) -> PrefixCache:
        """Return the same without a way back for gradients."""
        keys, values = (tuple(t.detach() for t in tensors) for tensors in (self.keys, self.values))
        return replace(self, keys=keys, values=values, hidden=self.hidden.detach())

    @property
    def counts(self) -> Tensor:
        """How many real tokens there are, int64 [B]: the next token's position."""
        return self.valid.sum(dim=1)


class PrefixModel(nn.Module):
    """Gemma without a vision tower: `language`, given or made with random weights. `width` is D."""

    def __init__(self, config: GemmaConfig, language: nn.Module | None = None) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.language: Any = GemmaModel(config) if language is None else language

    def train_for_its_cache(self) -> PrefixModel:
        """Leave out of training what no key or value depends on, and return the model.

        That is the last layer behind its keys and values: training over several processes refuses such parameters.
        """
        last = self.language.layers[-1]
        attention = last.self_attn
        for part in (attention.q_proj, attention.o_proj, last.mlp, last.post_attention_layernorm, self.language.norm):
            part.requires_grad_(False)
        return self

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, L, D] of ids int64 [B, L], times sqrt(D) as Gemma has them."""
        embeddings: Tensor = self.language.embed_tokens(ids)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores [..., words] of the next token; Gemma's output matrix is its table of embeddings."""
        scores: Tensor = hidden @ self.language.embed_tokens.weight.T
        return scores

    def forward(
        self, embeddings: Tensor, valid: Tensor, starts: Tensor | None = None, past: PrefixCache | None = None
    ) -> PrefixCache:
        """Run embeddings [B, L, D], real where `valid` bool [B, L]; `starts` [B, L] is where blocks begin (None: none).

        `past`: go on behind it; its tokens are seen by all new ones, and see none of them. `hidden` of the result is
        of the new tokens, keys and values are of all.
        """
        seen = block_mask(valid, starts)
        positions = valid.long().cumsum(dim=1) - 1
        cache = DynamicCache(config=self.config)
        if past is not None:
            for layer, (key, value) in enumerate(zip(past.keys, past.values, strict=True)):
                cache.update(key, value, layer)
            seen = torch.cat([past.valid[:, None].expand(-1, valid.shape[1], -1), seen], dim=2)
            positions = positions + past.counts[:, None]
            valid = torch.cat([past.valid, valid], dim=1)
        out = self.language(
            inputs_embeds=embeddings,
            attention_mask=seen[:, None],
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        keys, values = zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
        return PrefixCache(keys, values, valid, out.last_hidden_state)


def block_mask(valid: Tensor, starts: Tensor | None) -> Tensor:
    """Return who sees whom, bool [B, L, L] (row: who looks), of `valid` bool [B, L] and `starts` [B, L] or None.

    A padded token sees itself alone, so that no row is empty.
    """
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    seen = valid[:, None] & valid[:, :, None]
    if starts is not None:
        block = starts.long().cumsum(dim=1)
        seen = seen & (block[:, None] <= block[:, :, None])
    return seen | itself
