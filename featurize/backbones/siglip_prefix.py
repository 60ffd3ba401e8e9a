"""Image tokens as pi0 and pi0.5 take them: PaliGemma's SigLIP tower and the linear projector behind it.

The tokens are the visual part of the prefix of a PaliGemma-type language model: 256 of width 2048 for a picture of
224 px. They are cached as the projector gives them. Gemma multiplies word embeddings by the square root of its width;
transformers 4 multiplied image tokens too, and divided them by it beforehand. In openpi, and in transformers 5, the
factor reaches words only, so there is nothing to divide.

Only the tower and the projector are read from a checkpoint; the language model's gigabytes stay on disk.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import transformers
from pydantic import Field
from torch import nn

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.resize import resize_with_pad
from vla.featurize.image import Image
from vla.pretrained.hub import fill_model, find_model
from vla.pretrained.inference import count_parameters, freeze, frozen_inference
from vla.pretrained.paligemma import VISION_FIELDS, Prefix, read_prefix
from vla.pretrained.weights import RANDOM, digest_tensors, load_strictly
from vla.stores.settings import Settings
from vla.stores.user_given import WEIGHTS

MODEL_ID = "google/paligemma-3b-pt-224"

TINY_VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
TINY_WIDTH = 64
"""What `--weights random` builds: the real classes, picture and token count, narrow and shallow."""


class SiglipPrefixSettings(Settings):
    """Which weights.

    `weights`: the folder or hub id of a PaliGemma or pi0 checkpoint, "random" for a tiny network, or None for
    google/paligemma-3b-pt-224. `seed`: of random weights.
    """

    weights: Annotated[str | None, WEIGHTS] = None
    seed: int = Field(0, ge=0)


class ImageTokens(nn.Module):
    """SigLIP without its pooling head, then the projector: [N, 3, size, size] in -1..1 to [N, P, width].

    `prefix`: what a checkpoint gave, or None for tiny random weights. Raises `DataError` where the parameters do not
    fit the sizes.
    """

    def __init__(self, prefix: Prefix | None) -> None:
        super().__init__()
        vision, width = (prefix.vision, prefix.width) if prefix else (TINY_VISION, TINY_WIDTH)
        self.config = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
        model = transformers.SiglipVisionModel
        linear = nn.Linear(self.config.hidden_size, width)
        if prefix:
            self.vision_tower = fill_model(model, self.config, prefix.tower, prefix.folder)
        else:
            self.vision_tower = model(self.config)
        self.multi_modal_projector = nn.ModuleDict({"linear": linear})
        if prefix:
            named = nn.ModuleDict({"multi_modal_projector": self.multi_modal_projector})
            load_strictly(named, prefix.projector, prefix.folder)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden: torch.Tensor = self.vision_tower(pixel_values=pictures).last_hidden_state
        tokens: torch.Tensor = self.multi_modal_projector["linear"](hidden)
        return tokens


class SiglipPrefix:
    """`siglip` [256, 2048] tokens a view (of the default checkpoint), row by row from the top left."""

    settings_type: ClassVar[type[Settings]] = SiglipPrefixSettings

    def __init__(self, settings: SiglipPrefixSettings) -> None:
        self.settings = settings
        self.device = torch.device("cpu")
        self.random = settings.weights == RANDOM
        prefix = None if self.random else _read(settings.weights or MODEL_ID)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = ImageTokens(prefix)
        freeze(self.network)
        self.licence = prefix.licence if prefix else "none (random)"
        config = self.network.config
        self.width = prefix.width if prefix else TINY_WIDTH
        self.size, self.tokens = config.image_size, (config.image_size // config.patch_size) ** 2
        self.identity = {
            "network": "siglip_vision_model + linear",
            **{name: getattr(config, name) for name in VISION_FIELDS},
            "projection": self.width,
            "weights_sha256": digest_tensors(self.network.state_dict()),
            **({"weights": RANDOM, "seed": settings.seed} if self.random else {}),
            "layer": "multi_modal_projector of last_hidden_state",
            "scale": "none (pi0: image tokens are not divided by sqrt(width))",
            "preprocess": {
                "resize": "longest side to size, centred on black",
                "resample": "bilinear",
                "size": self.size,
                "scale": "px / 255 * 2 - 1",
            },
        }

    def spec(self) -> BackboneSpec:
        """See `Backbone.spec`."""
        return BackboneSpec(
            name="siglip-prefix",
            features={"siglip": FeatureSpec((self.tokens, self.width), ("token", "channel"))},
            identity=self.identity,
            code_licence="Apache-2.0 (transformers)",
            weights_licence=self.licence,
            random_weights=self.random,
            parameters=count_parameters(self.network),
        )

    def preprocess(self, image: Image) -> torch.Tensor:
        """Turn [H, W, 3] uint8 into [3, size, size] float32 in -1..1, once: `encode` normalises nothing."""
        return resize_with_pad(image, self.size, "bilinear") / 255 * 2 - 1

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn [B, V, 3, size, size] in -1..1 into {"siglip": [B, V, P, width]} float32."""
        with frozen_inference(self.device):
            tokens = self.network(images.flatten(0, 1).to(self.device, non_blocking=True))
        return {"siglip": tokens.reshape(*images.shape[:2], self.tokens, self.width)}

    def to(self, device: torch.device) -> None:
        """See `Backbone.to`."""
        self.network.to(device)
        self.device = device


def _read(name: str) -> Prefix:
    fix = (
        f"accept Gemma's terms on the page of {MODEL_ID}, `hf auth login`, `hf download {MODEL_ID} --local-dir "
        "weights/paligemma` where there is a network, then --weights weights/paligemma (or --weights random for a "
        "trial run)"
    )
    return read_prefix(find_model(name, fix))
