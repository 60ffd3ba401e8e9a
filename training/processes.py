"""What the processes of one data-parallel run have to agree on inside a loss."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def mean_count(count: Tensor) -> Tensor:
    """Return how many elements a process has on average, float32 scalar, never 0: what a masked sum is divided by.

    Data-parallel training averages the gradients of the processes. Divided by its own count, a process whose windows
    are mostly padding would weigh as much as any other; divided by the mean count, two processes have the gradient of
    one with both their batches. Every process has to come here equally often, as `loss` in training does. Without a
    gradient (evaluation, on one process) or with one process it is the count itself.
    """
    total, processes = count.float(), 1
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        processes = distributed.get_world_size()
    return total.clamp(min=1) / processes
