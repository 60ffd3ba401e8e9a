"""Features between the store's dtype and torch: views of what was read, and live features sent the same way.

A live int8 feature has no unit of its own to take scales from. It is rounded to the coarsest grid of the store that
the head was trained on (the largest scale of each channel over all units), without clipping: live and cached then
differ by at most half a step of each, and not at all where the store has one unit.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.stores.dtypes import DtypeName
from vla.stores.store import Store


def as_tensor(stored: NDArray[Any], dtype: DtypeName) -> Tensor:
    """Return stored rows as a tensor on the same memory: uint16 is viewed as bfloat16, int8 stays int8."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def through_storage(values: Tensor, dtype: DtypeName, scales: Sequence[float] | None = None) -> Tensor:
    """Return live features [..., C] float32 as they would come back from a store of `dtype`, on the same device.

    int8 gives float32 on the grid of `scales` [C]; a channel whose scale is 0 was 0 in the whole store, and gives 0.
    """
    if dtype != "int8":
        kind: torch.dtype = getattr(torch, dtype)
        return values.to(kind)
    step = torch.tensor(scales, dtype=torch.float32, device=values.device)
    return torch.where(step > 0, torch.round(values / step) * step, 0.0)


def largest_scales(store: Store, features: Container[str]) -> dict[str, tuple[float, ...]]:
    """Return the largest scale over the units of each channel, for those `features` of a store that are int8."""
    scales = {name: store.scales(name) for name in store.manifest.features if name in features}
    return {name: tuple(map(float, of.max(axis=0))) for name, of in scales.items() if of is not None}
