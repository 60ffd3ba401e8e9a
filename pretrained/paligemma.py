"""The vision tower and the projector of a PaliGemma-type checkpoint, and nothing else of it.

Three layouts are known: PaliGemma and PI0 as transformers saves them, and pi0 as openpi's conversion to PyTorch and
LeRobot save it, whose `config.json` names a variant of PaliGemma instead of its sizes. All name the parameters
`….vision_tower.….NAME` and `….multi_modal_projector.linear.NAME`, below one prefix or another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from vla.pretrained.hub import read_json, weight_files
from vla.pretrained.weights import DAMAGE
from vla.stores.errors import DataError

TOWER = re.compile(r"(?:^|\.)vision_tower\.(?:vision_model\.)?+(?!head\.)(.+)")
"""Older releases keep the tower one level deeper, in `vision_model`; SigLIP's pooling head feeds no token."""
PROJECTOR = re.compile(r"(?:^|\.)(multi_modal_projector\..+)")

VISION_FIELDS = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
"""What of SigLIP's configuration the last hidden state depends on, beside the weights."""

GEMMA = "Gemma Terms of Use (PaliGemma, gated)"
LICENCES = {"paligemma": GEMMA, "pi0": "Gemma Terms of Use (pi0, made from PaliGemma)"}


@dataclass(frozen=True)
class Prefix:
    """What makes image tokens: SigLIP's sizes, the projector's width, the parameters in float32, their licence.

    `tower` is named as transformers' SiglipVisionModel names it, `projector` from `multi_modal_projector` on.
    """

    folder: Path
    vision: dict[str, Any]
    width: int
    tower: dict[str, torch.Tensor]
    projector: dict[str, torch.Tensor]
    licence: str


def read_prefix(folder: Path) -> Prefix:
    """Read a checkpoint folder. Raises `DataError` where it is damaged or of another kind."""
    kind, config = _describe(folder)
    vision = config.vision_config
    kept: dict[str, Any] = {name: getattr(vision, name, None) for name in VISION_FIELDS}
    whole = all(
        isinstance(kept[many], int) and isinstance(kept[few], int) and kept[few] > 0 and kept[many] % kept[few] == 0
        for many, few in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads"))
    )
    if vision.model_type != "siglip_vision_model" or not whole:
        found = f"{folder / 'config.json'} has a {vision.model_type!r} of {kept}"
        raise DataError(found, expected="a siglip_vision_model of whole patches and whole heads")
    tower, projector = _read_tensors(folder)
    return Prefix(
        folder=folder,
        vision=kept,
        width=config.projection_dim,
        tower=tower,
        projector=projector,
        licence=LICENCES[kind],
    )


def _describe(folder: Path) -> tuple[str, Any]:
    """Return ("paligemma" or "pi0", the PaliGemma configuration)."""
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    try:
        if kind == "paligemma":
            return "paligemma", transformers.PaliGemmaConfig.from_dict(dict(values))
        if kind == "pi0":
            return "pi0", transformers.PI0Config.from_dict(dict(values)).vlm_config
        if values.get("paligemma_variant") == "gemma_2b":
            # Not transformers' layout: the name stands for SigLIP So400m/14 at 224 px before Gemma 2B.
            return "pi0", transformers.PI0Config().vlm_config
    except (*DAMAGE, StrictDataclassError, ArithmeticError) as error:
        raise DataError(f"{folder / 'config.json'}: {str(error).strip().partition(chr(10))[0]}") from None
    found = f"{folder} holds a {kind or values.get('paligemma_variant')!r} model"
    raise DataError(found, expected="model_type paligemma or pi0, or paligemma_variant gemma_2b")


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read what `TOWER` and `PROJECTOR` find in the shards, one tensor at a time; nothing else leaves the disk."""
    tower: dict[str, torch.Tensor] = {}
    projector: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # a safetensors handle is no mapping
                    for pattern, tensors in ((TOWER, tower), (PROJECTOR, projector)):
                        if found := pattern.search(key):
                            tensors[found[1]] = file.get_tensor(key).float()
        except DAMAGE as error:
            raise DataError(f"{path} does not load: {str(error).strip().partition(chr(10))[0]}") from None
    return tower, projector
