"""No network at all: small pictures as features, the baseline that a frozen network has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.resize import resize_square
from vla.featurize.image import Image
from vla.stores.settings import Settings


class PixelsSettings(Settings):
    """`size`: side of the picture kept, in pixels; more keeps smaller objects at size^2 * 3 values a view."""

    size: int = Field(32, ge=2, le=512)


class Pixels:
    """Box-averaged pictures [size, size, 3] in -1..1."""

    settings_type: ClassVar[type[Settings]] = PixelsSettings

    def __init__(self, settings: PixelsSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        size = self.settings.size
        return BackboneSpec(
            name="pixels",
            features={"grid": FeatureSpec((size, size, 3), ("y", "x", "channel"))},
            identity={
                "network": "none",
                "layer": "input",
                "preprocess": {"resize": "square", "resample": "box", "size": size, "scale": "px / 127.5 - 1"},
            },
            code_licence="MIT",
            weights_licence="none",
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, size, size] float32 in -1..1."""
        return resize_square(image, self.settings.size, "box") / 127.5 - 1

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, size, size] into {"grid": [B, V, size, size, 3]} float32."""
        return {"grid": images.detach().to(self.device, non_blocking=True).permute(0, 1, 3, 4, 2).contiguous()}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self.device = device
