"""The backbones by name. A new one is one file here and one line in `BACKBONES`; nothing is imported until used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from vla.stores.errors import UsageError
from vla.stores.settings import Settings, nearest

if TYPE_CHECKING:  # base imports torch, and listing the names must not
    from vla.featurize.backbones.base import Backbone

BACKBONES: dict[str, str] = {
    "efficientnet": "vla.featurize.backbones.efficientnet:EfficientNetLite0",
    "da3": "vla.featurize.backbones.da3:DepthAnything3",
    "dino-siglip": "vla.featurize.backbones.dino_siglip:DinoSiglip",
    "pixels": "vla.featurize.backbones.pixels:Pixels",
    "toy": "vla.featurize.backbones.toy:Toy",
}
"""Name -> "module:Class". The class takes its own frozen settings, and names their type as `settings_type`."""

SUMMARIES = {
    "efficientnet": "EfficientNet-Lite0, ImageNet weights from the package index; grids of any block",
    "da3": "Depth Anything 3; rays pooled to 14x14x6 a view, and by choice full rays, depth, tokens of a layer",
    "dino-siglip": "DINOv3 or DINOv2 beside SigLIP; 64 fine and 4 coarse tokens a view",
    "pixels": "32 x 32 RGB: the baseline that every learned backbone has to beat",
    "toy": "no weights, microseconds: for tests and dry runs",
}


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
    module, _, attribute = BACKBONES[name].partition(":")
    return cast(BackboneClass, getattr(importlib.import_module(module), attribute))


def make_backbone(name: str, weights: str | None = None, **options: Any) -> Backbone:
    """Build a configured backbone on the CPU, its weights loaded and digested.

    `weights` is a local file or folder, "random", or None for the backbone's own; `options` are fields of its
    settings. Raises `UsageError` for an unknown name or option, `MachineError` where weights or a package are
    missing, `DataError` where weights do not fit the network.
    """
    backbone_class = load_backbone_class(name)
    settings_type = backbone_class.settings_type
    if weights is not None:
        if "weights" not in settings_type.model_fields:
            raise UsageError(f"backbone {name!r} has no weights, and --weights {weights!r} was given")
        options["weights"] = weights
    return backbone_class(settings_type.build(options, where=f"backbone {name!r}"))
