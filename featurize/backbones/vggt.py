"""VGGT (arXiv:2503.11651): the patch tokens of a transformer that sees several pictures of a scene at once.

Its layers attend by turns within a picture and over all pictures of the scene; a layer's token is both results side by
side. A scene here ends at its own time step: it holds the `context` frames before it and the frame itself, oldest
first, and only the tokens of that last frame are kept. A policy then finds its features before the next picture exists.
(Caches of overlapping windows that keep every frame's tokens let a frame see those after it.)

With no context, the default, a scene is the one time step, and features depend on no cut of the episode.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.checkout import open_checkout
from vla.featurize.backbones.resize import resize_exact
from vla.featurize.backbones.vggt_network import PATCH, REPOSITORY, load_aggregator, random_aggregator, truncate
from vla.featurize.image import Image
from vla.pretrained.inference import count_parameters, frozen_inference
from vla.pretrained.weights import RANDOM
from vla.stores.errors import UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, UserGiven

SCENE_PIXELS = {"cpu": 2 * 518 * 518, "cuda": 16 * 518 * 518}
"""Input pixels of one forward pass, at least one scene: the outputs of all 24 layers stay until its end, 270 MB for
each picture of 518 px."""

CODE_LICENCE = "VGGT License v1 (July 29, 2025)"


class VggtSettings(Settings):
    """Which code and weights, what a scene is, and which tokens of it are kept.

    `checkout`: folder of the repository. `any_commit`: take a commit that was not tried, or changed files. `weights`:
    a file or folder, a hub id, "random" for a tiny network, or None for VGGT-1B from the hub. `layer`: counted from 0,
    or from the end by negative numbers. `size`: side of the network's input, or its height and width, multiples of 14.
    `pool`: average the tokens to pool x pool cells (None: all of them). `context`: past frames in each scene.
    `views`: views of a time step in one scene; 1 takes each camera on its own, more must be all the cameras of the
    source. `seed`: of random weights.
    """

    checkout: Annotated[str | None, UserGiven()] = None
    any_commit: Annotated[bool, UserGiven()] = False
    weights: Annotated[str | None, WEIGHTS] = None
    layer: int = -1
    size: int | tuple[int, int] = 518
    pool: int | None = Field(None, ge=1, le=64)
    context: int = Field(0, ge=0, le=63)
    views: int = Field(1, ge=1, le=32)
    seed: int = Field(0, ge=0)

    @field_validator("size")
    @classmethod
    def _whole_patches(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        for side in (value,) if isinstance(value, int) else value:
            if side % PATCH or not 2 * PATCH <= side <= 2016:
                below = min(max(side // PATCH, 2), 144) * PATCH
                raise ValueError(f"a side is a multiple of {PATCH} from {2 * PATCH} to 2016 px, such as {below}")
        return value

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the network's input, in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Vggt:
    """`vggt` [y, x, 2 * width]: the last frame's patch tokens, row by row from the top left."""

    settings_type: ClassVar[type[Settings]] = VggtSettings

    def __init__(self, settings: VggtSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._checkout = open_checkout(REPOSITORY, settings.checkout, any_commit=settings.any_commit)
        if settings.weights == RANDOM:
            self._weights = random_aggregator(self._checkout, settings.seed)
        else:
            self._weights = load_aggregator(self._checkout, settings.weights)
        self._network, depth = self._weights.network, self._weights.architecture.depth
        if not -depth <= settings.layer < depth:
            raise UsageError(f"layer {settings.layer}", expected=f"one of 0 to {depth - 1}, or -{depth} to -1")
        self._layer = settings.layer % depth
        truncate(self._network, self._layer + 1)

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, architecture = self.settings, self._weights.architecture
        height, width = settings.height_width
        rows, columns = (settings.pool,) * 2 if settings.pool else (height // PATCH, width // PATCH)
        return BackboneSpec(
            name="vggt",
            features={"vggt": FeatureSpec((rows, columns, 2 * architecture.width), ("y", "x", "channel"))},
            identity={
                "network": {"name": "vggt", **architecture._asdict()},
                "checkout": self._checkout.identity,
                **self._weights.identity,
                "layer": self._layer,
                "pool": settings.pool,
                "scene": {"views": settings.views, "frames": "oldest first, causal: the last frame's tokens are kept"},
                "preprocess": {
                    "resize": "exact",
                    "resample": "bicubic",
                    "size": [height, width],
                    "scale": "px / 255; ImageNet mean and std inside the network",
                },
            },
            code_licence=CODE_LICENCE if self._checkout.was_tried else "VGGT: see the licence in the checkout",
            weights_licence=self._weights.licence,
            random_weights=settings.weights == RANDOM,
            parameters=count_parameters(self._network),
            context=settings.context,
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, height, width] float32 in 0..1; the network normalises inside."""
        return resize_exact(image, *self.settings.height_width, "bicubic") / 255

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, h, w], or [B, C + 1, V, 3, h, w] with a context, into {"vggt": [B, V, y, x, channel]}."""
        settings = self.settings
        windows = images if settings.context else images[:, None]
        batch, frames, cameras, *picture = windows.shape
        if settings.views not in (1, cameras):
            fix = f"--set options.views=1 or --set options.views={cameras}"
            raise UsageError(f"a scene of {settings.views} views of {cameras} cameras", fix=fix)
        # [B, V / views scenes, frames, views, ...]: the cameras of a time step stay together, time steps in order.
        grouped = windows.reshape(batch, frames, -1, settings.views, *picture).transpose(1, 2)
        scenes = grouped.reshape(-1, frames * settings.views, *picture)
        pixels = SCENE_PIXELS.get(self.device.type, SCENE_PIXELS["cpu"])
        count = max(1, pixels // (scenes.shape[1] * picture[-1] * picture[-2]))
        with frozen_inference(self.device):
            grids = torch.cat([self._grids(part.to(self.device)) for part in torch.split(scenes, count)])
            return {"vggt": grids.reshape(batch, cameras, *grids.shape[2:])}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self._network.to(device)
        # It remembers positions on the device that first asked for them.
        self._network.position_getter = type(self._network.position_getter)()
        self.device = device

    def _grids(self, scenes: torch.Tensor) -> torch.Tensor:
        """Turn scenes [N, frames * views, 3, h, w] into grids [N, views, y, x, channel] of their last time step."""
        layers, first = self._network(scenes.contiguous())
        tokens: torch.Tensor = layers[-1][:, -self.settings.views :, first:]
        count, views, _, channels = tokens.shape
        height, width = self.settings.height_width
        grids = tokens.reshape(count * views, height // PATCH, width // PATCH, channels)
        if self.settings.pool is not None:
            maps = grids.permute(0, 3, 1, 2)
            grids = functional.adaptive_avg_pool2d(maps, self.settings.pool).permute(0, 2, 3, 1)
        return grids.reshape(count, views, *grids.shape[1:])
