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
    "hier": "vla.heads.hier:HierHead",
    "mlp": "vla.heads.mlp:MlpHead",
    "pi0": "vla.heads.pi0:Pi0Head",
    "pi05": "vla.heads.pi05:Pi05Head",
    "spatial": "vla.heads.spatial:SpatialHead",
    "track": "vla.heads.track:TrackHead",
}
"""Name -> "module:Class", a `HeadModel`."""

SUMMARIES = {
    "dp": "Diffusion Policy: noise prediction by a 1-D U-Net or an MLP; DDIM or DDPM sampling",
    "fm": "flow matching in pi0's convention, a small transformer expert or an MLP",
    "hier": "pi0.5's hierarchy: a language model says the subtask, a flow-matching expert does it",
    "mlp": "masked MSE on a chunk of actions: the plain baseline",
    "pi0": "pi0: PaliGemma over cached image tokens, instruction and DA3 geometry; flow-matching action expert",
    "pi05": "pi0.5: as pi0, with the state in the prompt and the time in the expert's norms",
    "spatial": "SpatialVLA: a connector MLP and a flow-matching expert over cached 3-D tokens",
    "track": "TrackVLA's planner: waypoints from past and present tokens and an instruction; Qwen3 or a light variant",
}


def head_name(cls: type[HeadModel]) -> str:
    """Return the name of a head's class, or of the nearest class that it is made from; a stranger's own otherwise."""
    names = {place: name for name, place in HEADS.items()}
    places = (f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__)
    return next((names[place] for place in places if place in names), cls.__name__)


def head_class(name: str) -> type[HeadModel]:
    """Import a head's class. Raises `UsageError` with the nearest match for an unknown name."""
    if name not in HEADS:
        raise UsageError(f"no head {name!r}{nearest(name, HEADS)}", expected=f"one of {', '.join(HEADS)}")
    module, _, attribute = HEADS[name].partition(":")
    return cast("type[HeadModel]", getattr(importlib.import_module(module), attribute))
