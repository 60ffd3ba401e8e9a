"""Frozen vision transformers as maps of patches: DINOv2 and DINOv3 on one side, SigLIP and SigLIP 2 on the other.

A tower takes pictures in 0..1, normalises them as its network was trained, drops the tokens that have no place in the
picture (CLS, registers), and lays the others out as a square map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from vla.pretrained.hub import load_model, read_model_config, weight_files
from vla.pretrained.inference import freeze
from vla.pretrained.weights import RANDOM, digest_files, digest_tensors
from vla.stores.errors import DataError, UsageError
from vla.stores.fingerprint import digest

Role = Literal["dino", "siglip"]

MEAN_STD: dict[Role, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and std of [0, 1] pixels in training: ImageNet's for DINO, -1..1 for SigLIP (their processors' defaults)."""


@dataclass(frozen=True)
class Kind:
    """A `model_type` of `config.json`: its class in transformers, and the licence of the published weights."""

    role: Role
    model_class: str
    licence: str


KINDS = {
    "dinov2": Kind("dino", "Dinov2Model", "Apache-2.0 (DINOv2)"),
    "dinov2_with_registers": Kind("dino", "Dinov2WithRegistersModel", "Apache-2.0 (DINOv2)"),
    "dinov3_vit": Kind("dino", "DINOv3ViTModel", "DINOv3 License (gated)"),
    "siglip": Kind("siglip", "SiglipVisionModel", "Apache-2.0 (SigLIP)"),
    "siglip_vision_model": Kind("siglip", "SiglipVisionModel", "Apache-2.0 (SigLIP)"),
}
"""SigLIP 2 of a fixed resolution calls itself `siglip`, and is one; its variable-resolution form, `siglip2`, is not."""

TINY: dict[Role, dict[str, Any]] = {
    "dino": {
        "patch_size": 16,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_register_tokens": 4,
    },
    "siglip": {
        "patch_size": 14,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 384,
    },
}
"""What `--weights random` builds: the real architectures with the default models' patches, narrow and shallow."""


@dataclass
class Tower:
    """One frozen vision transformer. `prefix` tokens come before the patches; a picture has side x side patches."""

    role: Role
    network: nn.Module
    prefix: int
    side: int
    mean: torch.Tensor
    std: torch.Tensor
    licence: str
    identity: dict[str, Any]

    @property
    def channels(self) -> int:
        """Width of a token."""
        return int(self.identity["channels"])

    def patch_map(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn [N, 3, size, size] in 0..1 into [N, C, side, side]."""
        mean, std = (values.to(pictures.device) for values in (self.mean, self.std))
        # SigLIP's table of positions is used as it is wherever the number of patches is that of its training; DINO
        # fits its own to any size without being asked.
        options = {"interpolate_pos_encoding": True} if self.role == "siglip" else {}
        tokens: torch.Tensor = self.network(pixel_values=(pictures - mean) / std, **options).last_hidden_state
        patches = tokens[:, self.prefix :].transpose(1, 2)
        return patches.reshape(len(pictures), self.channels, self.side, self.side)


def random_towers(seed: int, size: int) -> list[Tower]:
    """Build tiny DINOv3 and SigLIP networks whose weights depend on `seed` alone; the random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "dinov3_vit": transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY["dino"])),
            "siglip": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY["siglip"])),
        }
    towers = []
    for kind, network in networks.items():
        weights = {"weights": RANDOM, "seed": seed, "weights_sha256": digest_tensors(network.state_dict())}
        config = {"config_sha256": digest(TINY[KINDS[kind].role])}
        towers.append(make_tower(kind, freeze(network), size, {**config, **weights}))
    return towers


def load_towers(folders: Mapping[Role, Path], size: int) -> list[Tower]:
    """Load a network for each role. Raises `DataError` for a folder that holds another kind, before any is loaded."""
    described = {role: read_model_config(folder) for role, folder in folders.items()}
    for role, (kind, _) in described.items():
        known = [name for name, about in KINDS.items() if about.role == role]
        if kind not in known:
            fix = "a checkpoint of a fixed resolution, such as google/siglip2-so400m-patch14-384"
            found = f"{folders[role]} holds a {kind!r} model"
            raise DataError(found, expected=f"one of {', '.join(known)}", fix=fix if kind == "siglip2" else "")
    towers = []
    for role, (kind, config_sha256) in described.items():
        folder, unused = folders[role], ("text_model.", "logit_") if kind == "siglip" else ()
        network = load_model(getattr(transformers, KINDS[kind].model_class), folder, unused=unused)
        identity = {"config_sha256": config_sha256, "weights_sha256": digest_files(weight_files(folder))}
        towers.append(make_tower(kind, network, size, identity))
    return towers


def make_tower(kind: str, network: Any, size: int, identity: dict[str, Any]) -> Tower:
    """Wrap a network. Raises `UsageError` for a size it would silently crop to a multiple of its patch."""
    config, about = network.config, KINDS[kind]
    patch = int(config.patch_size)
    # SigLIP so400m/14-384 was trained on 27 patches of 14 px out of 384 px: at its own size the crop is the recipe.
    if size % patch and (about.role == "dino" or size != config.image_size):
        below, above = size // patch * patch, -(-size // patch) * patch
        found = f"size {size} is no multiple of the {patch} px patches of {kind}, which would drop {size - below} px"
        raise UsageError(found, fix=f"--set options.size={below} or --set options.size={above}")
    registers = int(getattr(config, "num_register_tokens", 0))
    dims = {"channels": config.hidden_size, "layers": config.num_hidden_layers, "patch": patch, "registers": registers}
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in MEAN_STD[about.role])
    return Tower(
        role=about.role,
        network=network,
        prefix=1 + registers if about.role == "dino" else 0,
        side=size // patch,
        mean=mean,
        std=std,
        licence=about.licence,
        identity={"network": kind, **dims, **identity},
    )
