"""Geometry as tokens of a language model's prefix: DA3's ray map, resized, projected, scaled by a learnt factor.

ray [B, S, h, w, 6] -> bilinear -> [B, S, Ht, Wt, 6] -> [B, S * Ht * Wt, 6] -> Linear -> * alpha -> tokens
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.stores.errors import DataError


class GeometryTokenAdapter(nn.Module):
    """`geom_dim` channels to `hidden_dim`, on a grid of `target_hw` rows and columns a view.

    `init_alpha`: the scale that tokens begin with. `warmup`: optimiser steps over which it is ramped up linearly
    from 0, on top of what is learnt; `seen` counts them and is part of the state, so that a resumed run goes on where
    it was (0: no ramp). `modality`: add a learnt vector to every token, which begins at zero.
    """

    seen: Tensor

    def __init__(
        self,
        geom_dim: int = 6,
        target_hw: tuple[int, int] = (14, 14),
        hidden_dim: int = 2048,
        init_alpha: float = 0.1,
        warmup: int = 0,
        *,
        modality: bool = False,
    ) -> None:
        super().__init__()
        self.target_hw, self.warmup = target_hw, warmup
        self.project = nn.Linear(geom_dim, hidden_dim)
        self.alpha = nn.Parameter(torch.tensor(init_alpha))
        if modality:
            self.modality = nn.Parameter(torch.zeros(hidden_dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn ray [B, S, h, w, geom_dim] into (tokens [B, S * Ht * Wt, hidden_dim], pad_masks, att_masks).

        The masks are bool [B, S * Ht * Wt], as openpi and LeRobot have them: pad_masks all True (every token is
        real), att_masks all False (no token begins a block: geometry, images and words see each other). Tokens of a
        view stand together, row by row. Raises `DataError` for another shape.
        """
        channels = self.project.in_features
        if ray.dim() != 5 or ray.shape[-1] != channels:
            raise DataError(f"rays of shape {tuple(ray.shape)}", expected=f"[B, S, h, w, {channels}], channels last")
        B = len(ray)
        grid = F.interpolate(
            ray.flatten(0, 1).permute(0, 3, 1, 2).to(self.alpha.dtype),
            size=self.target_hw,
            mode="bilinear",
            align_corners=False,
        )
        cells = grid.permute(0, 2, 3, 1).reshape(B, -1, channels)
        tokens = self.project(cells) * self.alpha * self._ramp()
        if hasattr(self, "modality"):
            tokens = tokens + self.modality
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, real, torch.zeros_like(real)

    def _ramp(self) -> Tensor | float:
        if not self.warmup:
            return 1.0
        factor: Tensor = (self.seen / self.warmup).clamp(max=1.0)
        return factor

    def advance(self) -> None:
        """Count one optimiser step of the ramp: micro-batches of one step share its factor."""
        if self.warmup:
            self.seen += 1
