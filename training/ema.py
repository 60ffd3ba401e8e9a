"""Exponential moving average of the weights, with Diffusion Policy's warm-up."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn


def ema_decay(update: int, power: float, maximum: float) -> float:
    """Return the decay of update k = 0, 1, …: min(maximum, 1 - (1 + k)^-power). It is 0 for k = 0: a copy.

    Source: the EMA of Diffusion Policy (Chi et al. 2023), power 0.75, maximum 0.9999. (Its code starts to count one
    update later, so that its first two are copies.)
    """
    decay: float = min(maximum, 1 - (1 + update) ** -power)
    return decay


class WarmAverage(AveragedModel):
    """Average of a model's weights: avg <- d * avg + (1 - d) * weights, d = `ema_decay(k)`, after each step.

    Buffers are copied: they are statistics, not weights. `updates` counts on the host, because reading torch's own
    `n_averaged` would wait for the GPU in every step.
    """

    def __init__(self, model: torch.nn.Module, power: float, maximum: float) -> None:
        def average(averaged: PARAM_LIST, weights: PARAM_LIST, _: torch.Tensor | int) -> None:
            decay = ema_decay(self.updates, power, maximum)
            get_ema_multi_avg_fn(decay)(averaged, weights, _)  # type: ignore[no-untyped-call]

        super().__init__(model, multi_avg_fn=average)
        self.updates = 0

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take the weights of one more step into the average."""
        super().update_parameters(model)
        self.updates += 1

    def resume(self, updates: int) -> None:
        """Go on after `updates` updates; the weights are loaded into `averaged` by the caller."""
        self.updates = updates
        self.n_averaged.fill_(updates)

    @property
    def averaged(self) -> torch.nn.Module:
        """The model that carries the averaged weights."""
        module: torch.nn.Module = self.module
        return module
