"""What draws the student's projection to the teacher's embedding of the same step, and away from those of others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 0.07
"""Temperature of CLIP (Radford et al. 2021, arXiv:2103.00020), where it starts; here it stays."""


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cosines [B, B] of student [B, E] (rows) and teacher [B, E] (columns), float32."""
    return F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).T


def info_nce(cosine: Tensor, same: Tensor | None = None, tau: float = TAU) -> Tensor:
    """Return the symmetric InfoNCE loss 1/2 (CE(S / tau, I) + CE(S^T / tau, I)) of cosines S [B, B].

    `same` bool [B, B]: pairs of one and the same step, which are no negatives of each other (the diagonal is ignored).
    """
    if same is not None:
        twins = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        cosine = cosine.masked_fill(twins, -torch.inf)
    target = torch.arange(len(cosine), device=cosine.device)
    logits = cosine / tau
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the L2-normalised embeddings [B, E]: (2 - 2 cos) / E on average."""
    return F.mse_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1))


def agreement(cosine: Tensor, same: Tensor) -> dict[str, Tensor]:
    """Return `pos_sim`, the mean cosine of pairs, `neg_sim`, that of different steps, and their gap `sim_gap`.

    `same` bool [B, B] marks pairs of one step, the diagonal among them.
    """
    others = ~same
    positive = cosine.diagonal().mean()
    negative = (cosine * others).sum() / others.sum().clamp(min=1)
    return {"pos_sim": positive, "neg_sim": negative, "sim_gap": positive - negative}
