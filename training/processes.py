"""What a masked loss is divided by: counts over one whole optimiser step, over all micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

Divisors = Mapping[str, Tensor]
"""For each masked sum in a loss, by name: the scalar that the sum over one micro-batch is divided by."""


def step_divisors(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return `{name: N / batches}`, float32 scalars: N is the count of a name over one optimiser step, at least 1.

    `counts`: what each micro-batch of this process counts, by name. `batches`: the micro-batches of all processes. The
    loop averages the gradients of all of them, so that sum / (N / batches) in each makes one sum over one count.
    Divided by its own count, a micro-batch that is mostly padding would weigh as much as a full one.
    Every process has to call this equally often: counts are added up over processes.
    """
    names = sorted(counts[0])
    if not names:
        return {}
    batches = len(counts)
    totals = torch.stack([torch.stack([of[name].float() for of in counts]).sum() for name in names])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(totals)
        batches *= distributed.get_world_size()
    return dict(zip(names, totals.clamp(min=1) / batches, strict=True))


def divisor(divisors: Divisors | None, name: str, count: Tensor) -> Tensor:
    """Return what a sum is divided by: `divisors[name]`, or its own count [] where there is no optimiser step."""
    return count.clamp(min=1) if divisors is None else divisors[name]
