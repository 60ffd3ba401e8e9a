"""DINO and SigLIP side by side, pooled to 64 fine and 4 coarse tokens: the tokens that OpenTrackVLA plans from.

The whole picture, squeezed to a square, goes through both networks; their patch tokens are laid out as maps, averaged
to a common grid (DINO's own, 24x24 by default) and joined along channels (DINO first), then averaged to 8x8 and to
2x2. With the default networks that is 384 + 1152 = 1536 channels. CLS and register tokens are dropped: they have no
place in the picture. Either network can also be run alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.resize import resize_square
from vla.featurize.backbones.towers import MEAN_STD, Role, load_towers, random_towers
from vla.featurize.image import Image
from vla.pretrained.hub import find_model, is_hub_id
from vla.pretrained.inference import count_parameters, frozen_inference
from vla.pretrained.weights import RANDOM
from vla.stores.errors import UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, UserGiven

DINO_ID, SIGLIP_ID = "facebook/dinov3-vits16-pretrain-lvd1689m", "google/siglip-so400m-patch14-384"


class DinoSiglipSettings(Settings):
    """Which networks, at which size, pooled how.

    `weights`: a folder with `dino/` and `siglip/` inside, "random" for tiny networks, or None for `dino` and `siglip`,
    each a hub id or a folder. `towers`: both, or "dino" or "siglip" alone. `size`: side of the square picture in
    pixels, a multiple of the patch of each network (384 for DINOv3, 378 for DINOv2; SigLIP's own training size is
    always allowed). `grid`: side of the common grid, DINO's own where None (SigLIP's where it is alone). `fine`,
    `coarse`: sides of the two poolings. `seed`: of random weights.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    dino: Annotated[str, UserGiven()] = DINO_ID
    siglip: Annotated[str, UserGiven()] = SIGLIP_ID
    towers: Literal["both", "dino", "siglip"] = "both"
    size: int = Field(384, ge=28, le=1024)
    grid: int | None = Field(None, ge=2)
    fine: int = Field(8, ge=2)
    coarse: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The networks in use, in the order of their channels."""
        return ("dino", "siglip") if self.towers == "both" else (self.towers,)

    @model_validator(mode="after")
    def _one_place_for_weights(self) -> Self:
        named = self.model_fields_set & {"dino", "siglip"}
        if self.weights is not None and named:
            raise ValueError("give either weights, or dino and siglip")
        if unused := named - set(self.roles):
            raise ValueError(f"{unused.pop()} is given, but towers={self.towers} does not use it")
        return self


class DinoSiglip:
    """`fine` [64, C] and `coarse` [4, C] tokens, row by row from the top left."""

    settings_type: ClassVar[type[Settings]] = DinoSiglipSettings

    def __init__(self, settings: DinoSiglipSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        if settings.weights == RANDOM:
            towers = random_towers(settings.seed, settings.size)
        else:
            towers = load_towers(_find_folders(settings), settings.size)
        self.towers = [tower for tower in towers if tower.role in settings.roles]
        self.grid = settings.grid or self.towers[0].side
        smallest = min(tower.side for tower in self.towers)
        if self.grid > smallest:
            found = f"grid={self.grid} exceeds the {smallest}x{smallest} patches of a {settings.size} px picture"
            raise UsageError(
                found, fix=f"--set options.grid={smallest}, or --set options.size=N, N above {settings.size}"
            )
        if max(settings.fine, settings.coarse) > self.grid:
            found = f"fine={settings.fine} and coarse={settings.coarse} cannot exceed grid={self.grid}"
            raise UsageError(found, fix=f"--set options.fine=N and --set options.coarse=N, N up to {self.grid}")

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, random = self.settings, self.settings.weights == RANDOM
        channels = sum(tower.channels for tower in self.towers)
        return BackboneSpec(
            name="dino-siglip",
            features={
                "fine": FeatureSpec((settings.fine**2, channels), ("token", "channel")),
                "coarse": FeatureSpec((settings.coarse**2, channels), ("token", "channel")),
            },
            identity={
                **{tower.role: tower.identity for tower in self.towers},
                "layer": "last_hidden_state, patches only",
                "pool": {"grid": self.grid, "fine": settings.fine, "coarse": settings.coarse},
                "preprocess": {
                    "resize": "square",
                    "resample": "bicubic",
                    "size": settings.size,
                    "scale": "px / 255",
                    **{f"{role}_mean_std": [list(values) for values in MEAN_STD[role]] for role in settings.roles},
                },
            },
            code_licence="Apache-2.0 (transformers)",
            weights_licence="none (random)" if random else " + ".join(tower.licence for tower in self.towers),
            random_weights=random,
            parameters=count_parameters(*(tower.network for tower in self.towers)),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, size, size] float32 in 0..1; each network normalises inside `encode`."""
        return resize_square(image, self.settings.size, "bicubic") / 255

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, size, size] in 0..1 into {"fine": [B, V, 64, C], "coarse": [B, V, 4, C]} float32."""
        settings, pictures = self.settings, images.flatten(0, 1).to(self.device, non_blocking=True)
        with frozen_inference(self.device):
            maps = [functional.adaptive_avg_pool2d(tower.patch_map(pictures), self.grid) for tower in self.towers]
            joined = torch.cat(maps, dim=1)
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
        for tower in self.towers:
            tower.network.to(device)
        self.device = device


def _find_folders(settings: DinoSiglipSettings) -> dict[Role, Path]:
    """Return the folder of each network in use. Raises `MachineError` that says what to type where one is missing."""
    if settings.weights is not None:
        folder = Path(settings.weights).expanduser().absolute()  # a relative "a/dino" could pass for a hub id
        names = {role: str(folder / role) for role in settings.roles}
    else:
        names = {role: settings.dino if role == "dino" else settings.siglip for role in settings.roles}
    published: dict[Role, str] = {"dino": DINO_ID, "siglip": SIGLIP_ID}
    downloads = " and ".join(
        f"`hf download {name if is_hub_id(name) else published[role]} --local-dir weights/{role}`"
        for role, name in names.items()
    )
    fix = f"{downloads} where there is a network, then --weights weights (or --weights random for a trial run)"
    return {role: find_model(name, fix) for role, name in names.items()}
