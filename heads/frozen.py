"""Networks that a head runs and never trains: outside its weights, loaded once, named by their digest.

A language model of gigabytes in every checkpoint would fill the disk with copies of what the user already has. A
checkpoint keeps where the weights came from and their digest instead, and refuses others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vla.pretrained.weights import digest_tensors


class Frozen:
    """A module that is no submodule: neither parameters nor state of the head that holds it. Loaded on first use.

    `load` returns the module, its weights final. A copy of the head (the moving average of its weights) shares it.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load, self._module, self._device = load, None, torch.device("cpu")

    _module: nn.Module | None

    @property
    def module(self) -> Any:
        """The network, in evaluation mode, without gradients for its weights."""
        if self._module is None:
            # A head may act first and train later: weights made in inference mode never allow a gradient through them.
            with torch.inference_mode(False):
                self._module = self._load().requires_grad_(False).eval().to(self._device)
        return self._module

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights."""
        return digest_tensors(self.module.state_dict())

    def to(self, device: torch.device) -> None:
        """Go to a device, now or when loaded."""
        self._device = device
        if self._module is not None:
            self._module.to(device)

    def __deepcopy__(self, _: object) -> Frozen:
        return self
