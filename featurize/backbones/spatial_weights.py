"""The networks behind `spatial`: CLIP's vision tower, and the two small parts of LLaVA-3D that act on its patches.

LLaVA-3D publishes one checkpoint for the whole vision-language model; by name only the encoder of positions and the
projector are read from it, and a part with a missing, unexpected or misshapen parameter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from vla.featurize.backbones.spatial_tokens import make_position_encoder, make_projector
from vla.pretrained.hub import find_model, is_hub_id, load_model, read_model_config, weight_files
from vla.pretrained.inference import freeze
from vla.pretrained.weights import RANDOM, digest_files, digest_tensors, load_strictly, require_keys
from vla.stores.errors import DataError
from vla.stores.fingerprint import digest

CLIP_ID, LLAVA_ID = "openai/clip-vit-large-patch14-336", "ChaimZhu/LLaVA-3D-7B"

POSITION = "model.video_tower.video_tower.positional_embedding.position_embedding_head."
PROJECTOR = "model.mm_projector."
"""Where the parts stand in LLaVA-3D's checkpoint: the attributes of its classes, joined."""

UNUSED = ("text_", "visual_projection.", "logit_scale", "vision_model.embeddings.position_ids")
"""What a file of the whole CLIP holds besides its vision tower."""

TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
}
TINY_WORDS = 48
"""What `--weights random` builds: CLIP ViT-L/14-336's patches, narrow and shallow; a narrow language model's width."""


@dataclass(frozen=True)
class Parts:
    """Frozen networks. `size` and `patch` in pixels; `width` of the tokens that are kept."""

    clip: Any
    position: nn.Sequential
    projector: nn.Sequential | None
    size: int
    patch: int
    width: int
    identity: Mapping[str, Any]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return (self.clip, self.position, *([self.projector] if self.projector else []))

    def patches(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn normalised pictures [N, 3, size, size] into the patch tokens [N, P, C] before CLIP's last layer."""
        tokens: torch.Tensor = self.clip(pixel_values=pictures).last_hidden_state
        return tokens[:, 1:]


def random_parts(seed: int, *, projector: bool) -> Parts:
    """Build tiny networks; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = freeze(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY_CLIP)))
        position = make_position_encoder(TINY_CLIP["hidden_size"])
        projection = make_projector(TINY_CLIP["hidden_size"], TINY_WORDS) if projector else None
    weights = {"weights": RANDOM, "seed": seed}
    clip_identity = {"config_sha256": digest(TINY_CLIP), "weights_sha256": digest_tensors(clip.state_dict())}
    return _parts(clip, position, projection, {**weights, "clip": clip_identity})


def load_parts(weights: str | None, clip: str, llava: str, *, projector: bool) -> Parts:
    """Load a folder with `clip/` and `llava-3d/`, or two hub ids or folders.

    Raises `MachineError` where they are not to be had, `DataError` where they do not fit.
    """
    if weights is not None:
        folder = Path(weights).expanduser().absolute()  # a relative "a/clip" could pass for a hub id
        clip, llava = str(folder / "clip"), str(folder / "llava-3d")
    ids = [name if is_hub_id(name) else default for name, default in ((clip, CLIP_ID), (llava, LLAVA_ID))]
    fix = (
        f"`hf download {ids[0]} --local-dir weights/clip` and `hf download {ids[1]} --local-dir weights/llava-3d` "
        "where there is a network, then --weights weights (or --weights random for a trial run)"
    )
    tower, whole = find_model(clip, fix), find_model(llava, fix)
    kind, config_sha256 = read_model_config(tower)
    if kind not in ("clip", "clip_vision_model"):
        raise DataError(f"{tower} holds a {kind!r} model", expected="clip or clip_vision_model")
    network = load_model(transformers.CLIPVisionModel, tower, unused=UNUSED)
    width = int(network.config.hidden_size)  # type: ignore[union-attr,arg-type]
    position = _load_part(make_position_encoder(width), read_part(whole, POSITION), POSITION, whole)
    projection = None
    if projector:
        tensors = read_part(whole, PROJECTOR)
        out = len(tensors["2.bias"]) if "2.bias" in tensors else width
        projection = _load_part(make_projector(width, out), tensors, PROJECTOR, whole)
    clip_identity = {"config_sha256": config_sha256, "weights_sha256": digest_files(weight_files(tower))}
    return _parts(network, position, projection, {"clip": clip_identity})


def read_part(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return {name after the prefix: float32 tensor} of a checkpoint's files, reading nothing else of them."""
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                found |= {name.removeprefix(prefix): tensors.get_tensor(name).float() for name in names}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} is not a file of weights: {str(error).partition(chr(10))[0]}") from None
    return found


def _load_part(network: nn.Sequential, tensors: Mapping[str, torch.Tensor], prefix: str, folder: Path) -> nn.Sequential:
    wanted = {prefix + key for key in network.state_dict()}
    found = {prefix + key for key in tensors}
    require_keys(sorted(wanted - found), sorted(found - wanted), folder)
    load_strictly(network, tensors, folder)
    return network


def _parts(clip: Any, position: nn.Sequential, projector: nn.Sequential | None, identity: dict[str, Any]) -> Parts:
    config = clip.config
    dims = {"channels": config.hidden_size, "layers": config.num_hidden_layers, "patch": config.patch_size}
    identity["clip"] |= {"network": "clip_vision_model", **dims}
    identity["position_sha256"] = digest_tensors(position.state_dict())
    if projector:
        identity["projector_sha256"] = digest_tensors(projector.state_dict())
    # What comes out of the last layer but one is what LLaVA takes: the last one need not run.
    layers = _layers(clip)
    del layers[-1]
    for network in (position, projector):
        if network:
            freeze(network)
    width = int(config.hidden_size if projector is None else projector[-1].out_features)  # type: ignore[arg-type]
    return Parts(clip, position, projector, int(config.image_size), int(config.patch_size), width, identity)


def _layers(clip: Any) -> nn.ModuleList:
    vision = getattr(clip, "vision_model", clip)
    layers = vision.encoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers
