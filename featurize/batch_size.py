"""The largest batch that an accelerator holds, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vla.featurize.backbones.base import Backbone
from vla.featurize.sources.base import Source, SourceIndex
from vla.featurize.views import read_views
from vla.stores.errors import MachineError

ON_CPU = 16
"""Time steps: networks limit what they run at once on a CPU by themselves."""

LARGEST = 1024
SPARED = 2
"""The batch taken is the largest that ran, divided by this: memory fragments over hours, and other frames need more."""


def find_batch_size(backbone: Backbone, source: Source, index: SourceIndex, device: torch.device) -> int:
    """Return how many time steps to encode at once: fixed on a CPU, tried with the first frame on an accelerator.

    Raises `MachineError` where not even one fits.
    """
    if device.type == "cpu":
        return ON_CPU
    spec, episode = backbone.spec(), index.episodes[0]
    views = next(read_views(source, spec, 0, episode.task, 0, 1))
    frame = torch.stack([backbone.preprocess(view) for view in views])
    frame = frame.expand(spec.context + 1, *frame.shape) if spec.context else frame

    def run(count: int) -> None:
        backbone.encode(frame.expand(count, *frame.shape).contiguous())

    return largest_batch(run, device)


def largest_batch(run: Callable[[int], None], device: torch.device) -> int:
    """Double the batch until `run(count)` is out of memory; return half of the largest that ran, at least 1.

    Raises `MachineError` where `run(1)` is out of memory.
    """
    ran = 0
    while 2 * ran <= LARGEST:
        count = 2 * ran or 1
        try:
            run(count)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        ran = count
    if not ran:
        fix = "--set options.size=N, a smaller N, another device, or --set device=cpu"
        raise MachineError(f"one time step does not fit into the memory of {device}", fix=fix)
    return max(ran // SPARED, 1)
