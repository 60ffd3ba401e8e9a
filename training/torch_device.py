"""Which device a name means: one rule for featurizing, training, evaluating and acting."""

from __future__ import annotations

import re

import torch

from vla.stores.errors import MachineError, UsageError
from vla.stores.settings import nearest

DEVICE = r"auto|cpu|(cuda|xpu)(:[0-9]{1,2})?|mps"
"""What a device may be called: torch's own names of what it computes on."""


def choose_device(name: str, setting: str = "device") -> torch.device:
    """Return the device of a name; of "auto" a GPU of CUDA where there is one, else the CPU.

    Raises `UsageError` for a name that torch has not, `MachineError` where this machine lacks the device; `setting` is
    what a user types it as.
    """
    if not re.fullmatch(DEVICE, name):
        hint = nearest(name, ("auto", "cpu", "cuda", "mps", "xpu"))
        raise UsageError(f"{setting} {name!r}{hint}", expected="auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = 1 if name == "cpu" else torch.get_device_module(device.type).device_count()
    if (device.index or 0) >= count:
        there = f"{count} of {device.type}" if count else f"no {device.type}"
        raise MachineError(f"device {name!r} is not there: torch sees {there}", fix=f"--set {setting}=cpu")
    return device
