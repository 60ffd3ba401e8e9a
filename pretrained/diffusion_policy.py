"""Diffusion Policy's published checkpoints, read without running what they carry.

A workspace's `.ckpt` (`BaseWorkspace.save_checkpoint` of https://github.com/real-stanford/diffusion_policy) is a dict
pickled by dill: {"cfg": an omegaconf tree, "state_dicts": {"model", "ema_model", "optimizer"}, "pickles": bytes}.
torch's restricted unpickler reads it: every class and function that the file names beside torch's own becomes an inert
stand-in, so nothing of them is imported or called. Only tensors are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla.pretrained.weights import DAMAGE, read_tensors
from vla.stores.errors import DataError

UNET = "model."
"""Where the policies of the repository keep their `ConditionalUnet1D`."""

MARK = "diffusion_step_encoder.1.weight"
"""A parameter that every `ConditionalUnet1D` has."""


class Inert(dict[Any, Any]):
    """What stands for anything that a file names: takes whatever it is given, does and keeps nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, _: object) -> None:
        return None


def read_unet(path: Path | str) -> dict[str, torch.Tensor]:
    """Return the state dict of the U-Net in a checkpoint, under the names of `ConditionalUnet1D` itself.

    A workspace's `.ckpt` gives its averaged weights (`ema_model`) where it has them; a `.safetensors`, `.pt` or `.pth`
    file is the state dict of a policy or of the U-Net alone. Of a policy everything but the U-Net is left out. Raises
    `DataError` where the file does not read or holds no such network.
    """
    path = Path(path)
    tensors = _of_workspace(path) if path.suffix == ".ckpt" else read_tensors(path)
    if MARK in tensors:
        return dict(tensors)
    unet = {name.removeprefix(UNET): values for name, values in tensors.items() if name.startswith(UNET)}
    if MARK not in unet:
        found = ", ".join(list(tensors)[:3]) or "nothing"
        raise DataError(f"{path} has {found}", expected=f"the parameters of a ConditionalUnet1D, such as {UNET}{MARK}")
    return unet


def _of_workspace(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the policy's state dict of a workspace's checkpoint."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in named]):
            payload = torch.load(path, "cpu", weights_only=True)
    except DAMAGE as error:
        # Of torch's restricted unpickler the last line says why; the first advises to read the file unsafely.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "weights_only" not in line and "http" not in line), "damaged"
        )
        reason = reason.removeprefix("WeightsUnpickler error:").strip()
        expected = "a workspace's .ckpt, or its ema_model saved as .safetensors"
        raise DataError(f"{path} is not a checkpoint: {reason}", expected=expected) from None
    networks = payload.get("state_dicts") if isinstance(payload, dict) else None
    if not isinstance(networks, dict):
        raise DataError(f"{path} has no state_dicts", expected="a checkpoint of a Diffusion Policy workspace")
    policy = networks.get("ema_model", networks.get("model"))
    if not isinstance(policy, dict) or not all(isinstance(value, torch.Tensor) for value in policy.values()):
        raise DataError(f"{path} has {', '.join(map(str, networks))}", expected="state dicts ema_model or model")
    return policy
