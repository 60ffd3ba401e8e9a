"""How the tokens of M backbones at one place become one token: fixed weights, or a gate that chooses for each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightedFusion(nn.Module):
    """The softmax of M learned numbers, the same for every token. All backbones count alike before training."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(members))

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn [..., M, D] into [..., D]."""
        return (tokens * self.logits.softmax(0)[:, None]).sum(-2)


class MixtureFusion(nn.Module):
    """A gate over the concatenated tokens; the `top_k` highest share the weight, the others get none.

    Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, equation 4), with one learned deviation a backbone. The
    noise is there in training alone: it keeps a backbone that is losing from never being tried again.
    """

    NOISE_LOG_STD = -2.0
    """Where the logarithm of the deviation starts: exp(-2) = 0.14, beside gate logits of about 1."""

    def __init__(self, members: int, dim: int, hidden: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Sequential(nn.Linear(members * dim, hidden), nn.GELU(), nn.Linear(hidden, members))
        self.noise_log_std = nn.Parameter(torch.full((members,), self.NOISE_LOG_STD))

    def weights(self, tokens: Tensor) -> Tensor:
        """Return the weights [..., M] of tokens [..., M, D]: they sum to 1, and at most `top_k` are above 0."""
        logits = self.gate(tokens.flatten(-2))
        if self.training:
            logits = logits + torch.randn_like(logits) * self.noise_log_std.exp()
        return top_k_softmax(logits, self.top_k)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn [..., M, D] into [..., D]."""
        return (tokens * self.weights(tokens)[..., None]).sum(-2)


def top_k_softmax(logits: Tensor, k: int) -> Tensor:
    """Return the softmax over the k largest of the last axis, 0 elsewhere. Of equal ones the first counts as larger."""
    # Stable, because which of two equal logits topk takes is the kernel's own choice.
    chosen = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :k]
    kept = torch.full_like(logits, -torch.inf).scatter(-1, chosen, logits.gather(-1, chosen))
    return F.softmax(kept, dim=-1)
