"""The heads by name. A new head is one file here and one line in `HEADS`; nothing is imported until used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from vla.stores.errors import UsageError
from vla.stores.settings import nearest

if TYPE_CHECKING:  # model imports torch, and listing the names must not
    from vla.heads.model import HeadModel

HEADS: dict[str, str] = {
    "dp": "vla.heads.dp:DiffusionHead",
    "fm": "vla.heads.fm:FlowHead",
    "mlp": "vla.heads.mlp:MlpHead",
    "track": "vla.heads.track:TrackHead",
}
"""Name -> "module:Class", a `HeadModel`."""

SUMMARIES = {
    "dp": "Diffusion Policy: noise prediction by a 1-D U-Net or an MLP; DDIM or DDPM sampling",
    "fm": "flow matching in pi0's convention, a small transformer expert or an MLP",
    "mlp": "masked MSE on a chunk of actions: the plain baseline",
    "track": "TrackVLA's planner: waypoints from past and present tokens and an instruction; Qwen3 or a light variant",
}


def head_class(name: str) -> type[HeadModel]:
    """Import a head's class. Raises `UsageError` with the nearest match for an unknown name."""
    if name not in HEADS:
        raise UsageError(f"no head {name!r}{nearest(name, HEADS)}", expected=f"one of {', '.join(HEADS)}")
    module, _, attribute = HEADS[name].partition(":")
    return cast("type[HeadModel]", getattr(importlib.import_module(module), attribute))
