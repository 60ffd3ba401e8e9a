"""The numerical mode in which every frozen network runs, whoever calls it: full float32, no gradient, eval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def freeze(network: nn.Module) -> nn.Module:
    """Switch a network to evaluation and its parameters to constants, in place."""
    return network.eval().requires_grad_(False)


def count_parameters(*networks: nn.Module) -> int:
    """Count the parameters of networks, shared ones once."""
    return sum({id(p): p.numel() for network in networks for p in network.parameters()}.values())


@contextmanager
def frozen_inference(device: torch.device) -> Iterator[None]:
    """Run the body in full float32, whatever the caller has switched on.

    A live policy often runs under autocast, and CUDA computes float32 convolutions in TF32 unless told otherwise
    (10 bits of mantissa, as few as the float16 we store): either would make live features differ from cached ones.
    cuDNN's deterministic kernels make a resumed run equal an uninterrupted one. No gradient is recorded;
    `no_grad` rather than `inference_mode`, because heads may train on what comes out.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
