"""Depth Anything 3 (arXiv:2511.10647): a ray per pixel and view, seen without knowing the camera.

A ray is a direction and an origin, 6 numbers, in the frame of the scene's reference view. What is cached by default is
the ray map as a geometry adapter reads it: resized bilinearly to 14x14 cells per view. That step has no parameters, so
the cached cells equal, bit for bit before storage, those that the adapter makes of the full map.

A scene is what the network sees at once: the views of one time step (`views` of them), or, as usual, each view on its
own. The views of a scene attend to each other; time steps never do. The head runs in float32, as upstream runs it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch.nn import functional

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.da3_network import ARCHITECTURES, MODELS, build_network, load_network, quiet
from vla.featurize.backbones.da3_resize import PATCH, resize_upper_bound, upper_bound_shape
from vla.featurize.image import Image
from vla.pretrained.inference import count_parameters, frozen_inference
from vla.pretrained.weights import RANDOM, digest_tensors
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings, nearest
from vla.stores.user_given import WEIGHTS, PlainText

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of [0, 1] pixels: upstream's `input_processor.py`."""

RAYS_A_PATCH = 8
"""Rays along each side of a patch: the head's finest level is 8 times the patch grid."""

PIXELS = {"cpu": 504 * 504, "cuda": 8 * 504 * 504}
"""Input pixels a forward pass. The head's widest map takes 130 MB a picture of 504 px; a CPU gains nothing by more than
one, and upstream's own head takes 8 at a time."""

FEATURES = ("ray", "ray_full", "ray_conf", "depth")
TOKENS = re.compile(r"tokens_(0|[1-9]\d*)")

PUBLISHED = "DA3-LARGE"
"""The model that is loaded where neither `weights` nor `model` is given."""
Model = Literal["DA3-SMALL", "DA3-BASE", "DA3-LARGE", "DA3-LARGE-1.1", "DA3-GIANT", "DA3-GIANT-1.1", "tiny"]
ReferenceView = Literal["first", "middle", "saddle_balanced", "saddle_sim_range"]


class Da3Settings(Settings):
    """Which network, which of its outputs, and what it sees at once.

    `weights`: a folder or hub id with config.json and model.safetensors, "random", or None for `model` from the hub.
    `model`: the size of the network. None is "tiny" with random weights, DA3-LARGE from the hub, and the folder's own
    where `weights` is a folder.
    `features`: of "ray" (pooled), "ray_full", "ray_conf", "depth" and "tokens_<layer>". `target_hw`: rows and columns
    of "ray". `size`: longest side of the network's input in pixels, a multiple of 14. `picture`: height and width of
    the source's pictures, needed for the features whose shape depends on it. `views`: views of a scene; 1 takes each
    view on its own, more must be all the cameras of the source. `ref_view_strategy`: which view of a scene of 3 or more
    gives its frame. Upstream's "saddle_balanced" chooses by content, so that the frame may jump in mid-episode;
    "first" is the first camera throughout. `seed`: of random weights.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    model: Model | None = None
    features: Annotated[tuple[str, ...], PlainText()] = Field(("ray",), min_length=1)
    target_hw: tuple[int, int] = (14, 14)
    size: int = Field(504, ge=2 * PATCH, le=2016, multiple_of=PATCH)
    picture: tuple[int, int] | None = None
    views: int = Field(1, ge=1, le=32)
    ref_view_strategy: ReferenceView = "first"
    seed: int = Field(0, ge=0)

    @field_validator("features", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in FEATURES and not TOKENS.fullmatch(name):
                known = ", ".join((*FEATURES, "tokens_<layer>"))
                raise ValueError(f"no feature {name!r}{nearest(name, FEATURES)}; there are {known}")
        if len(set(value)) != len(value):
            raise ValueError("each feature is named once")
        return value

    @field_validator("target_hw")
    @classmethod
    def _a_grid(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 2:
            raise ValueError("a grid has at least 2x2 cells: with fewer, where things are is lost")
        return value

    @field_validator("picture")
    @classmethod
    def _a_picture(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError("height and width in pixels")
        return value


class DepthAnything3:
    """`ray` [y, x, 6] and the other grids of `Da3Settings.features`, in that order."""

    settings_type: ClassVar[type[Settings]] = Da3Settings

    def __init__(self, settings: Da3Settings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self._features: dict[str, FeatureSpec] = {}
        _require_picture(settings)  # before gigabytes of weights are read
        self._name, self._network, self._weights = _build(settings)
        self._arch = ARCHITECTURES[self._name]
        self._tokens = {name: int(match[1]) for name in settings.features if (match := TOKENS.fullmatch(name))}
        for name, layer in self._tokens.items():
            if layer >= self._arch.depth:
                raise UsageError(f"{name} of {self._name}", expected=f"a layer of 0 to {self._arch.depth - 1}")
        self._features = {name: self._feature_spec(name) for name in settings.features}

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        settings, random = self.settings, self.settings.weights == RANDOM
        several = settings.views >= 3  # with fewer, upstream chooses no reference view
        return BackboneSpec(
            name="da3",
            features=self._features,
            identity={
                "network": self._name,
                **self._weights,
                "layer": {"features": list(settings.features), "head": list(self._arch.layers)},
                "pool": {"target_hw": list(settings.target_hw), "mode": "bilinear, align_corners=False"},
                "scene": {
                    "views": settings.views,
                    "ref_view_strategy": settings.ref_view_strategy if several else None,
                },
                "precision": "float32; the transformer in bfloat16 autocast on accelerators",
                "preprocess": {
                    "resize": "upper bound, sides to multiples of 14",
                    "resample": "area, cubic where it grows",
                    "size": settings.size,
                    "scale": "px / 255",
                    "mean_std": [list(MEAN), list(STD)],
                },
            },
            code_licence="Apache-2.0 (depth-anything-3)",
            weights_licence="none (random)" if random else self._arch.licence,
            random_weights=random,
            parameters=count_parameters(self._network),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, h, w] float32, ImageNet-normalised; h and w follow the picture's shape.

        Raises `DataError` for a picture that is not of `picture`'s shape, `UsageError` for one with fewer rays than
        `target_hw` asks for.
        """
        settings = self.settings
        if settings.picture is not None and image.shape[:2] != settings.picture:
            found = f"a picture of shape {image.shape}, {image.dtype}"
            raise DataError(found, expected=f"[H, W, 3] uint8, RGB, of picture={list(settings.picture)}")
        resized = resize_upper_bound(image, settings.size)
        rays = [side // PATCH * RAYS_A_PATCH for side in resized.shape[:2]]
        if "ray" in settings.features and any(n > m for n, m in zip(settings.target_hw, rays, strict=True)):
            found = f"target_hw={list(settings.target_hw)} exceeds the {rays[0]}x{rays[1]} rays of a picture"
            fix = f"--set options.target_hw=[{rays[0]},{rays[1]}], or --set options.size=N, N above {settings.size}"
            raise UsageError(found, fix=fix)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (torch.from_numpy(resized).permute(2, 0, 1).contiguous() / 255 - mean) / std

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, h, w] into {name: [B, V, y, x, channel]} float32.

        Raises `UsageError` where V is not the `views` of a scene (unless that is 1).
        """
        B, V = images.shape[:2]
        views = self.settings.views
        if views not in (1, V):
            fix = f"--set options.views={V}, or --set options.views=1 for each alone"
            raise UsageError(f"{V} views in a time step, and views={views}", fix=fix)
        scenes = images.to(self.device, non_blocking=True).reshape(B * V // views, views, *images.shape[2:])
        count = max(1, PIXELS.get(self.device.type, PIXELS["cuda"]) // scenes[0, :, 0].numel())
        with frozen_inference(self.device), quiet():
            parts = [self._grids(scenes[i : i + count]) for i in range(0, len(scenes), count)]
            made = {name: torch.cat([part[name] for part in parts]) for name in self._features}
            return {name: values.reshape(B, V, *values.shape[2:]) for name, values in made.items()}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self._network.to(device)
        # Upstream keeps the positions of the first device it ran on, by grid and not by device.
        self._network.backbone.pretrained.position_getter.position_cache.clear()
        self.device = device

    def _grids(self, scenes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run [S, N, 3, h, w]; return {name: [S, N, y, x, channel]}.

        The head takes pairs (patch tokens, camera token) of its layers. Layers of `tokens_<layer>` are taken the same
        way: upstream's `export_feat_layers` has half the channels, and does not undo the reordering of views.
        """
        S, N, _, h, w = scenes.shape
        layers = sorted({*self._arch.layers, *self._tokens.values()})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            pairs, _ = self._network.backbone.pretrained.get_intermediate_layers(
                scenes, layers, cam_token=None, ref_view_strategy=self.settings.ref_view_strategy
            )
        taken = {layer: (tokens.float(), camera.float()) for layer, (tokens, camera) in zip(layers, pairs, strict=True)}
        made = {name: taken[layer][0].reshape(S, N, h // PATCH, w // PATCH, -1) for name, layer in self._tokens.items()}
        if len(made) == len(self._features):
            return made
        out = self._network.head([taken[layer] for layer in self._arch.layers], h, w, patch_start_idx=0)
        return {
            **made,
            "ray": pool_rays(out["ray"], self.settings.target_hw),
            "ray_full": out["ray"],
            "ray_conf": out["ray_conf"][..., None],
            "depth": out["depth"][..., None],
        }

    def _feature_spec(self, name: str) -> FeatureSpec:
        settings = self.settings
        if name == "ray":
            return FeatureSpec((*settings.target_hw, 6), ("y", "x", "channel"))
        assert settings.picture is not None  # _require_picture saw to it
        h, w = upper_bound_shape(*settings.picture, settings.size)
        if name == "depth":
            return FeatureSpec((h, w, 1), ("y", "x", "channel"))
        rows, columns = h // PATCH, w // PATCH
        if name in self._tokens:
            return FeatureSpec((rows, columns, 2 * self._arch.width), ("y", "x", "channel"))
        channels = {"ray_full": 6, "ray_conf": 1}[name]
        return FeatureSpec((rows * RAYS_A_PATCH, columns * RAYS_A_PATCH, channels), ("y", "x", "channel"))


def pool_rays(rays: torch.Tensor, target_hw: tuple[int, int]) -> torch.Tensor:
    """Resize [S, N, y, x, 6] to [S, N, *target_hw, 6] as the geometry adapter does: bilinear, no antialiasing."""
    planes = rays.flatten(0, 1).permute(0, 3, 1, 2)
    pooled = functional.interpolate(planes, size=target_hw, mode="bilinear", align_corners=False)
    return pooled.permute(0, 2, 3, 1).reshape(*rays.shape[:2], *target_hw, rays.shape[-1])


def _require_picture(settings: Da3Settings) -> None:
    if settings.picture is None and (shaped := [name for name in settings.features if name != "ray"]):
        found = f"the shape of {', '.join(shaped)} depends on the source's pictures"
        raise UsageError(found, expected="their height and width", fix="--set options.picture=[480,640]")


def _build(settings: Da3Settings) -> tuple[str, Any, dict[str, Any]]:
    """Return the architecture's name, the network, and the part of the identity that tells its weights."""
    if settings.weights == RANDOM:
        name = MODELS[settings.model or "tiny"]
        network = build_network(name, settings.seed)
        digest = digest_tensors(network.state_dict())
        return name, network, {"weights": RANDOM, "seed": settings.seed, "weights_sha256": digest}
    if settings.weights is None and settings.model == "tiny":
        raise UsageError("no weights of the tiny model were ever published", fix="--weights random")
    model = settings.model or PUBLISHED
    fix = (
        f"`hf download depth-anything/{model} --local-dir weights/da3` where there is a network, then "
        "--weights weights/da3 (or --weights random for a trial run)"
    )
    wanted = MODELS[model] if settings.weights is None or settings.model is not None else None
    name, network, digest = load_network(settings.weights or f"depth-anything/{model}", wanted, fix)
    return name, network, {"weights_sha256": digest}
