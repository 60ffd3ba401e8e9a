"""Features between the store's dtype and torch: views of what was read, and live features sent the same way.

A live int8 feature has no unit of its own to take scales from: it is rounded to the live grid of the store that a head
was trained on (`Store.live_scales`), and saturates at its end as cached features do. Live and cached differ by at most
half a step of each, and not at all where the store has one unit.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vla.stores.dtypes import INT8_MAX, DtypeName
from vla.stores.store import Store


def as_tensor(stored: NDArray[Any], dtype: DtypeName) -> Tensor:
    """Return stored rows as a tensor on the same memory: uint16 is viewed as bfloat16, int8 stays int8."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def round_trip_dtype(values: Tensor, dtype: DtypeName, scales: Sequence[float] | None = None) -> Tensor:
    """Return live features [..., C] float32 as they would come back from a store of `dtype`, on the same device.

    int8 gives float32 on the grid of `scales` [C], at most 127 steps from 0; a channel whose scale is 0 was 0 in the
    whole store, and gives 0. The other dtypes give a tensor of that dtype.
    """
    if dtype != "int8":
        kind: torch.dtype = getattr(torch, dtype)
        return values.to(kind)
    step = torch.tensor(scales, dtype=torch.float32, device=values.device)
    return torch.where(step > 0, torch.round(values / step).clamp(-INT8_MAX, INT8_MAX) * step, 0.0)


def live_scales(store: Store, features: Container[str]) -> dict[str, tuple[float, ...]]:
    """Return the live grid of each channel, for those `features` of a store that are int8."""
    scales = {name: store.live_scales(name) for name in store.manifest.features if name in features}
    return {name: tuple(map(float, grid)) for name, grid in scales.items() if grid is not None}
