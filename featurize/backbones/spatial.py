"""3-D tokens: CLIP's patches with an encoding of where in the world each of them is, pooled in voxels (LLaVA-3D).

Where the patches are comes from the source (depth, intrinsics, pose), or from MapAnything, which needs pictures alone
and whose own dense features can be kept beside. No token depends on the instruction: language meets them only in
LLaVA-3D's language model, after what is made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from pydantic import Field, model_validator

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.mapanything import IMAGENET, MapAnything, load_mapanything, nearest, pool_features
from vla.featurize.backbones.spatial_geometry import GEOMETRY, Fit, cut_square, make_square, patch_positions
from vla.featurize.backbones.spatial_tokens import Tokens, keep_patches, pool_voxels
from vla.featurize.backbones.spatial_weights import CLIP_ID, LLAVA_ID, load_parts, random_parts
from vla.featurize.image import Image
from vla.pretrained.inference import count_parameters, frozen_inference
from vla.pretrained.weights import RANDOM
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS, UserGiven

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and std of [0, 1] pixels that CLIP was trained with (its processor's defaults)."""

MAPANYTHING_LICENCE = "MapAnything: its card's (Apache-2.0, or CC BY-NC 4.0)"


class SpatialSettings(Settings):
    """Which networks, where positions come from, and what is kept.

    `weights`: a folder with `clip/` and `llava-3d/` inside, "random" for tiny networks, or None for `clip` and `llava`,
    each a hub id or a folder. `geometry`: "source" (depth, intrinsics and pose of each view) or "mapanything" (from
    the pictures; positions are then in the axes of the first camera of each time step). `tokens`: "voxel" or "patch".
    `voxel`: side of a voxel in metres. `count`: voxels kept of each view; of more, a subset that depends on the frame
    alone. `across_views`: whether a voxel that several views see is one token, in the first one's row. `projector`:
    whether tokens go through LLaVA-3D's projector to its language model's width. `fit`: "crop" to the middle of the
    picture (LLaVA-3D's own way), or squeeze all of it to a "square". `dense`: side of the grid to which MapAnything's
    features are pooled and kept; 0 keeps none. `mapanything`: its weights, a folder, a hub id or "random" (None:
    random beside random `weights`, else the published default). `checkout`: folder of its repository. `any_commit`:
    take a commit that was not tried, or changed files. `geometry_size`: side of its picture, a multiple of 14.
    `seed`: of random weights.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    clip: Annotated[str, UserGiven()] = CLIP_ID
    llava: Annotated[str, UserGiven()] = LLAVA_ID
    geometry: Literal["source", "mapanything"] = "source"
    tokens: Literal["voxel", "patch"] = "voxel"
    voxel: float = Field(0.2, gt=0, le=100)
    count: int = Field(256, ge=1, le=65536)
    across_views: bool = True
    projector: bool = False
    fit: Fit = "crop"
    dense: int = Field(0, ge=0, le=64)
    mapanything: Annotated[str | None, WEIGHTS] = None
    checkout: Annotated[str | None, UserGiven()] = None
    any_commit: Annotated[bool, UserGiven()] = False
    geometry_size: int = Field(518, ge=28, le=1036, multiple_of=14)
    seed: int = Field(0, ge=0)

    @property
    def needs_mapanything(self) -> bool:
        """Whether MapAnything runs."""
        return self.geometry == "mapanything" or self.dense > 0

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        given = self.model_fields_set
        if self.weights is not None and given & {"clip", "llava"}:
            raise ValueError("give either weights, or clip and llava")
        voxel = sorted(given & {"voxel", "count", "across_views"})
        if self.tokens == "patch" and voxel:
            raise ValueError(f'tokens="patch" has no voxels, and {", ".join(voxel)} was given')
        idle = sorted(given & {"mapanything", "checkout", "any_commit", "geometry_size"})
        if idle and not self.needs_mapanything:
            raise ValueError(f'{", ".join(idle)} was given without geometry="mapanything" or dense')
        if self.dense > self.geometry_size // 14:
            raise ValueError(f"dense={self.dense} exceeds the {self.geometry_size // 14} patches of a side")
        return self


class Spatial:
    """`spatial` [N, C], `spatial_mask` [N] and `spatial_xyz` [N, 3] metres of each view; `dense` [y, x, C] by choice.

    N is `count` voxels, or every patch. Where the mask is 0 there is no token and the rest is 0.
    """

    settings_type: ClassVar[type[Settings]] = SpatialSettings

    def __init__(self, settings: SpatialSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        random = settings.weights == RANDOM
        parts = (
            random_parts(settings.seed, projector=settings.projector)
            if random
            else load_parts(settings.weights, settings.clip, settings.llava, projector=settings.projector)
        )
        self._parts = parts
        self._side = parts.size // parts.patch
        self._mapanything: MapAnything | None = None
        if settings.needs_mapanything:
            weights = settings.mapanything or (RANDOM if random else None)
            self._mapanything = load_mapanything(
                weights, settings.checkout, any_commit=settings.any_commit, seed=settings.seed
            )
        self._layout = self._input_layout()

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, parts, network = self.settings, self._parts, self._mapanything
        count = settings.count if settings.tokens == "voxel" else self._side**2
        features = {
            "spatial": FeatureSpec((count, parts.width), ("token", "channel")),
            "spatial_mask": FeatureSpec((count,), ("token",), "uint8"),
            "spatial_xyz": FeatureSpec((count, 3), ("token", "xyz"), "float32"),
        }
        if settings.dense and network:
            features["dense"] = FeatureSpec((settings.dense, settings.dense, network.channels), ("y", "x", "channel"))
        random = settings.weights == RANDOM
        licence = "none (random)" if random else "MIT (CLIP) + CC BY-NC-SA 4.0 (LLaVA-3D)"
        return BackboneSpec(
            name="spatial",
            features=features,
            identity=self._identity(),
            code_licence="MIT (LLaVA-3D's tokens, re-implemented) + Apache-2.0 (transformers"
            + (", MapAnything)" if network else ")"),
            weights_licence=licence + (f" + {MAPANYTHING_LICENCE}" if network else ""),
            random_weights=random or bool(network and network.identity.get("weights") == RANDOM),
            parameters=count_parameters(*parts.networks, *([network.network] if network else [])),
            inputs=("image", *(GEOMETRY if settings.geometry == "source" else ())),
        )

    def preprocess(self, view: Image | Mapping[str, Any]) -> torch.Tensor:
        """Turn a view into the float32 vector [F] that `encode` takes apart again.

        It holds the square picture [3, s, s] in 0..1 for CLIP, the same one larger for MapAnything where that runs,
        and [P, 4] positions with their mask where the source gives them. Raises `DataError` for a picture that is
        not uint8 RGB and for impossible geometry.
        """
        settings, parts = self.settings, self._parts
        image = view["image"] if isinstance(view, Mapping) else view
        height, width = image.shape[:2]
        square = make_square(height, width, parts.size, settings.fit)
        pieces = [_channels_first(cut_square(image, square, Picture.Resampling.BICUBIC))]
        if self._mapanything:
            larger = make_square(height, width, settings.geometry_size, settings.fit)
            pieces.append(_channels_first(cut_square(image, larger, Picture.Resampling.LANCZOS)))
        if settings.geometry == "source":
            pieces.append(patch_positions(cast(Mapping[str, Any], view), square, self._side))
        return torch.from_numpy(np.concatenate([piece.ravel() for piece in pieces]))

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, F] into {"spatial": [B, V, N, C], "spatial_mask": [B, V, N], "spatial_xyz": [B, V, N, 3]}.

        All float32; "dense" [B, V, y, x, C] where it is kept. Views of one time step may share voxels; time steps
        never do.
        """
        given = self._take_apart(images.detach())
        made: dict[str, torch.Tensor] = {}
        with frozen_inference(self.device):
            if self._mapanything:
                scene = self._mapanything.see(_normalise(given["scene"].to(self.device), IMAGENET))
                if self.settings.dense:
                    made["dense"] = pool_features(scene.features, self.settings.dense).contiguous()
            if self.settings.geometry == "source":
                where = given["positions"]
                positions, known = where[..., :3], where[..., 3] > 0
            else:
                positions, known = nearest(scene.points, self._side), nearest(scene.known, self._side)
                positions = torch.where(known[..., None], positions, 0)  # what is unknown may be infinite
            patches = self._parts.patches(_normalise(given["picture"].to(self.device), CLIP_STATISTICS).flatten(0, 1))
            encoded = patches.reshape(*images.shape[:2], *patches.shape[1:]) + self._parts.position(
                positions.to(self.device)
            )
            steps = [self._tokens(*step) for step in zip(encoded, positions, known, strict=True)]
            values = torch.stack([step.values for step in steps])
            mask = torch.stack([step.mask for step in steps])
            if self._parts.projector:  # after pooling, as LLaVA-3D does; padding stays 0
                values = self._parts.projector(values) * mask[..., None]
        spatial = {
            "spatial": values,
            "spatial_mask": mask,
            "spatial_xyz": torch.stack([step.positions for step in steps]),
        }
        return {**spatial, **made}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        for network in self._parts.networks:
            network.to(device)
        if self._mapanything:
            self._mapanything.network.to(device)
        self.device = device

    def _tokens(self, values: torch.Tensor, positions: torch.Tensor, known: torch.Tensor) -> Tokens:
        settings = self.settings
        if settings.tokens == "patch":
            return keep_patches(values, positions.to(values.device), known.to(values.device))
        across = settings.across_views
        return pool_voxels(values, positions, known, size=settings.voxel, count=settings.count, across_views=across)

    def _input_layout(self) -> dict[str, tuple[int, ...]]:
        """What `preprocess` puts one after the other."""
        settings, size = self.settings, self._parts.size
        layout: dict[str, tuple[int, ...]] = {"picture": (3, size, size)}
        if self._mapanything:
            layout["scene"] = (3, settings.geometry_size, settings.geometry_size)
        if settings.geometry == "source":
            layout["positions"] = (self._side**2, 4)
        return layout

    def _take_apart(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces, start = {}, 0
        for name, shape in self._layout.items():
            stop = start + math.prod(shape)
            pieces[name] = images[:, :, start:stop].reshape(*images.shape[:2], *shape)
            start = stop
        return pieces

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        kept = ("tokens", *(("voxel", "count", "across_views") if settings.tokens == "voxel" else ()))
        identity: dict[str, Any] = {
            **self._parts.identity,
            "layer": "CLIP hidden_states[-2], patches only, + position encoding"
            + (" + projector" if settings.projector else ""),
            "pool": {name: getattr(settings, name) for name in kept},
            "geometry": settings.geometry,
            "preprocess": {
                "fit": settings.fit,
                "resample": "bicubic",
                "size": self._parts.size,
                "scale": "px / 255",
                "mean_std": [list(values) for values in CLIP_STATISTICS],
                "position": "nearest depth at a patch's top left pixel",
            },
        }
        if self._mapanything:
            size = {"size": settings.geometry_size, "resample": "lanczos", "dense": settings.dense}
            identity["mapanything"] = {**self._mapanything.identity, **size}
        return identity


def _channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def _normalise(pictures: torch.Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in statistics)
    return (pictures - mean) / std
