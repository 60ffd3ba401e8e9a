"""Features in microseconds, for tests and dry runs: average colours under a fixed random projection."""

from __future__ import annotations

import time
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.resize import resize_square
from vla.featurize.image import Image
from vla.stores.settings import Settings


class ToySettings(Settings):
    """What the toy makes.

    `grid`: cells along y and x. `channels`: values a cell; grid=24, channels=1536 imitates a large backbone's bytes.
    `seed`: of the projection. `delay_ms`: time slept for each time step, so that a test can interrupt a run; it
    changes no feature.
    """

    grid: int = Field(4, ge=2, le=512)
    channels: int = Field(8, ge=1, le=8192)
    seed: int = Field(0, ge=0)
    delay_ms: float = Field(0.0, ge=0, le=60_000)


class Toy:
    """grid x grid cells: the average colour of each, in -1..1, times a fixed 3 x channels matrix.

    Elementwise operations only, so a feature is the same bit for bit whatever the batch it was computed in.
    """

    settings_type: ClassVar[type[Settings]] = ToySettings

    def __init__(self, settings: ToySettings) -> None:
        self.settings = settings
        projection = np.random.default_rng(settings.seed).uniform(-1, 1, (3, settings.channels))
        self.projection = torch.from_numpy(projection.astype(np.float32))

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        grid, channels = self.settings.grid, self.settings.channels
        return BackboneSpec(
            name="toy",
            features={"grid": FeatureSpec((grid, grid, channels), ("y", "x", "channel"))},
            identity={
                "network": "toy",
                "channels": channels,
                "seed": self.settings.seed,
                "layer": "projection",
                "preprocess": {"resize": "square", "resample": "box", "size": grid, "scale": "px / 127.5 - 1"},
            },
            code_licence="MIT",
            weights_licence="none",
            parameters=self.projection.numel(),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, grid, grid] float32 in -1..1."""
        return resize_square(image, self.settings.grid, "box") / 127.5 - 1

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, grid, grid] into {"grid": [B, V, grid, grid, channels]} float32."""
        time.sleep(self.settings.delay_ms * len(images) / 1000)
        red, green, blue = images.detach().to(self.projection.device).unsqueeze(-1).unbind(dim=2)
        return {"grid": red * self.projection[0] + green * self.projection[1] + blue * self.projection[2]}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self.projection = self.projection.to(device)
