"""Exponential moving average of the weights, with Diffusion Policy's warm-up."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


class WarmAverage(AveragedModel):
    """Average of a model's parameters: avg <- d * avg + (1 - d) * weights, d = min(maximum, 1 - (1 + k)^-power).

    k counts updates from 0, so that the first update copies the weights. Buffers are copied (they are statistics, not
    weights). Source: the EMA schedule of Diffusion Policy (Chi et al. 2023), power 0.75.
    """

    def __init__(self, model: torch.nn.Module, power: float, maximum: float) -> None:
        def average(averaged: Tensors, weights: Tensors, updates: torch.Tensor | int) -> None:
            decay = min(maximum, 1 - (1 + float(updates)) ** -power)
            torch._foreach_lerp_(averaged, weights, 1 - decay)

        super().__init__(model, multi_avg_fn=average)
        self.update_parameters(model)  # k = 0: a copy

    @property
    def averaged(self) -> torch.nn.Module:
        """The model that carries the averaged weights."""
        module: torch.nn.Module = self.module
        return module
