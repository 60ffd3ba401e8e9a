"""DINO and SigLIP side by side, pooled to 64 fine and 4 coarse tokens: the tokens that OpenTrackVLA plans from.

The whole picture, squeezed to a square, goes through both networks; their patch tokens are laid out as maps, averaged
to a common 24x24 grid and joined along channels (DINO first), then averaged to 8x8 and to 2x2. With the default
networks that is 384 + 1152 = 1536 channels. CLS and register tokens are dropped: they have no place in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.hub import find_model, is_hub_id, load_model, read_model_config, weight_files
from vla.featurize.backbones.inference import count_parameters, freeze, frozen_inference
from vla.featurize.backbones.resize import resize_square
from vla.featurize.backbones.weights import RANDOM, digest_files, digest_tensors
from vla.featurize.image import Image
from vla.stores.errors import DataError, UsageError
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings

DINO_ID, SIGLIP_ID = "facebook/dinov3-vits16-pretrain-lvd1689m", "google/siglip-so400m-patch14-384"

DINO_LICENCES = {
    "dinov2": "Apache-2.0 (DINOv2)",
    "dinov2_with_registers": "Apache-2.0 (DINOv2)",
    "dinov3_vit": "DINOv3 License (gated)",
}
SIGLIP_LICENCES = {"siglip": "Apache-2.0 (SigLIP)", "siglip_vision_model": "Apache-2.0 (SigLIP)"}
CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and std of [0, 1] pixels that DINOv2 and DINOv3 were trained with (their processors' defaults)."""
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""The same for SigLIP."""

TINY_DINO = {
    "patch_size": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_register_tokens": 4,
}
TINY_SIGLIP = {
    "patch_size": 14,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 384,
}
"""What `--weights random` builds: the real architectures with the default models' patches, narrow and shallow."""


class DinoSiglipSettings(Settings):
    """Which networks, at which size, pooled how.

    `weights`: a folder with `dino/` and `siglip/` inside, "random" for tiny networks, or None for `dino` and `siglip`,
    each a hub id or a folder. `size`: side of the square picture in pixels, a multiple of the patch of each network
    (384 for DINOv3, 378 for DINOv2; SigLIP's own training size is always allowed). `grid`, `fine`, `coarse`: sides of
    the common grid and of the two poolings. `seed`: of random weights.
    """

    weights: str | None = None
    dino: str = DINO_ID
    siglip: str = SIGLIP_ID
    size: int = Field(384, ge=28, le=1024)
    grid: int = Field(24, ge=2)
    fine: int = Field(8, ge=2)
    coarse: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_place_for_weights(self) -> Self:
        if self.weights is not None and self.model_fields_set & {"dino", "siglip"}:
            raise ValueError("give either weights, or dino and siglip")
        if max(self.fine, self.coarse) > self.grid:
            raise ValueError(f"fine={self.fine} and coarse={self.coarse} cannot exceed grid={self.grid}")
        return self


@dataclass
class Tower:
    """One frozen vision transformer. `prefix` tokens come before the patches; a picture has side x side patches."""

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

    def patch_map(self, pictures: torch.Tensor, **options: Any) -> torch.Tensor:
        """Turn [N, 3, size, size] in 0..1 into [N, C, side, side]."""
        mean, std = (values.to(pictures.device) for values in (self.mean, self.std))
        tokens: torch.Tensor = self.network(pixel_values=(pictures - mean) / std, **options).last_hidden_state
        patches = tokens[:, self.prefix :].transpose(1, 2)
        return patches.reshape(len(pictures), self.channels, self.side, self.side)


class DinoSiglip:
    """`fine` [64, C] and `coarse` [4, C] tokens, row by row from the top left."""

    settings_type: ClassVar[type[Settings]] = DinoSiglipSettings

    def __init__(self, settings: DinoSiglipSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self.dino, self.siglip = _random_towers(settings) if settings.weights == RANDOM else _load_towers(settings)
        smallest = min(self.dino.side, self.siglip.side)
        if settings.grid > smallest:
            found = f"grid={settings.grid} exceeds the {smallest}x{smallest} patches of a {settings.size} px picture"
            raise UsageError(found, fix=f"grid={smallest}, or a larger size")

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, random = self.settings, self.settings.weights == RANDOM
        channels = self.dino.channels + self.siglip.channels
        return BackboneSpec(
            name="dino-siglip",
            features={
                "fine": FeatureSpec((settings.fine**2, channels), ("token", "channel")),
                "coarse": FeatureSpec((settings.coarse**2, channels), ("token", "channel")),
            },
            identity={
                "dino": self.dino.identity,
                "siglip": self.siglip.identity,
                "layer": "last_hidden_state, patches only",
                "pool": {"grid": settings.grid, "fine": settings.fine, "coarse": settings.coarse},
                "preprocess": {
                    "resize": "square",
                    "resample": "bicubic",
                    "size": settings.size,
                    "scale": "px / 255",
                    "dino_mean_std": [list(values) for values in IMAGENET],
                    "siglip_mean_std": [list(values) for values in HALF],
                },
            },
            code_licence="Apache-2.0 (transformers)",
            weights_licence="none (random)" if random else f"{self.dino.licence} + {self.siglip.licence}",
            random_weights=random,
            parameters=count_parameters(self.dino.network, self.siglip.network),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, size, size] float32 in 0..1; each network normalises inside `encode`."""
        return resize_square(image, self.settings.size, "bicubic") / 255

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, size, size] in 0..1 into {"fine": [B, V, 64, C], "coarse": [B, V, 4, C]} float32."""
        settings, pictures = self.settings, images.flatten(0, 1).to(self.device)
        with frozen_inference(self.device):
            # SigLIP's table of positions is used as it is wherever the number of patches is that of its training.
            maps = (self.dino.patch_map(pictures), self.siglip.patch_map(pictures, interpolate_pos_encoding=True))
            joined = torch.cat([functional.adaptive_avg_pool2d(part, settings.grid) for part in maps], dim=1)
            pooled = {
                "fine": functional.adaptive_avg_pool2d(joined, settings.fine),
                "coarse": functional.adaptive_avg_pool2d(joined, settings.coarse),
            }
            return {
                name: grid.flatten(2).transpose(1, 2).reshape(*images.shape[:2], -1, joined.shape[1])
                for name, grid in pooled.items()
            }

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self.dino.network.to(device)
        self.siglip.network.to(device)
        self.device = device


def _random_towers(settings: DinoSiglipSettings) -> tuple[Tower, Tower]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        dino = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY_DINO))
        siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY_SIGLIP))
    towers = []
    for kind, network, config in (("dinov3_vit", dino, TINY_DINO), ("siglip", siglip, TINY_SIGLIP)):
        weights = {"weights": RANDOM, "seed": settings.seed, "weights_sha256": digest_tensors(network.state_dict())}
        towers.append(_tower(kind, freeze(network), settings.size, {"config_sha256": digest(config), **weights}))
    return towers[0], towers[1]


def _load_towers(settings: DinoSiglipSettings) -> tuple[Tower, Tower]:
    names = (settings.dino, settings.siglip)
    if settings.weights is not None:
        folder = Path(settings.weights).expanduser().absolute()  # a relative "a/dino" could pass for a hub id
        names = (str(folder / "dino"), str(folder / "siglip"))
    dino, siglip = (
        name if is_hub_id(name) else default for name, default in zip(names, (DINO_ID, SIGLIP_ID), strict=True)
    )
    fix = (
        f"`hf download {dino} --local-dir weights/dino` and `hf download {siglip} --local-dir weights/siglip` where "
        "there is a network, then --weights weights (or --weights random for a trial run)"
    )
    folders = [find_model(name, fix) for name in names]
    described = [read_model_config(folder) for folder in folders]
    for folder, (kind, _), known in zip(folders, described, (DINO_LICENCES, SIGLIP_LICENCES), strict=True):
        if kind not in known:
            raise DataError(f"{folder} holds a {kind!r} model", expected=f"one of {', '.join(known)}")
    towers = []
    for folder, (kind, config_sha256) in zip(folders, described, strict=True):
        unused = ("text_model.", "logit_") if kind == "siglip" else ()
        network = load_model(getattr(transformers, CLASSES[kind]), folder, unused=unused)
        identity = {"config_sha256": config_sha256, "weights_sha256": digest_files(weight_files(folder))}
        towers.append(_tower(kind, network, settings.size, identity))
    return towers[0], towers[1]


def _tower(kind: str, network: Any, size: int, identity: dict[str, Any]) -> Tower:
    """Wrap a network. Raises `UsageError` for a size it would silently crop to a multiple of its patch."""
    config, is_dino = network.config, kind in DINO_LICENCES
    patch = int(config.patch_size)
    # SigLIP so400m/14-384 was trained on 27 patches of 14 px out of 384 px: at its own size the crop is the recipe.
    if size % patch and (is_dino or size != config.image_size):
        below, above = size // patch * patch, -(-size // patch) * patch
        found = f"size {size} is no multiple of the {patch} px patches of {kind}, which would drop {size - below} px"
        raise UsageError(found, fix=f"size={below} or size={above}")
    registers = int(getattr(config, "num_register_tokens", 0))
    dims = {"channels": config.hidden_size, "layers": config.num_hidden_layers, "patch": patch, "registers": registers}
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET if is_dino else HALF))
    return Tower(
        network=network,
        prefix=1 + registers if is_dino else 0,
        side=size // patch,
        mean=mean,
        std=std,
        licence={**DINO_LICENCES, **SIGLIP_LICENCES}[kind],
        identity={"network": kind, **dims, **identity},
    )
