"""The network of VGGT as the user's checkout builds it, sized by its weights; only the part that makes tokens.

The published file holds five networks: the aggregator, whose tokens we keep, and the heads for cameras, depth, points
and tracks, which are not built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vla.featurize.backbones.checkout import Checkout, Repository
from vla.pretrained.hub import find_model, is_hub_id, weight_files
from vla.pretrained.inference import freeze
from vla.pretrained.weights import (
    RANDOM,
    digest_files,
    digest_tensors,
    find_file,
    load_strictly,
    read_tensors,
    require_fit,
    require_keys,
)
from vla.stores.errors import DataError

PATCH, TRAINED_SIZE, REGISTERS = 14, 518, 4
"""Of every published VGGT. The table of positions is that of 518 px and is interpolated to other sizes."""

REPOSITORY = Repository(
    url="https://github.com/facebookresearch/vggt",
    package="vggt",
    entry="vggt.models.aggregator",
    # All since the licence of 29 July 2025; the last is a public fork's. One and the same `vggt` folder.
    commits=(
        "44b3afbd1869d8bde4894dd8ea1e293112dd5eba",
        "7db3449c84664e04ea8a77515808cf12cb19b36c",
        "e56963328b7476e615ce8dda9164d381f8dc07a3",
        "e37f126212db79e2ac3a48d84378b014adbfe262",
        "059c288227aa00faaf1a4ecf3f4f3be9b40aa467",
        "674a023bb8f3a685de3d01ff373e55abd7dd88a4",
        "8492456ce358ee9a4fe3274e36d73106b640fb5c",
        "978c1b2ee46432c0759e732857a0ef3205ec798a",
        "373f970da9997721cec6b4ef7c7b05cb1b380f18",
        "a1179fe98aea9bca4fa1cb618f49ab2fa9dd8f88",
        "a24d9de2cacce10f3b4c10350d94f485548895e8",
    ),
    python_sha256="b5a3f965e6175e5d2bb9a23b81150c29d3436d88b89e872df44dd8bb4a74786a",
)

HUB_ID = "facebook/VGGT-1B"
LICENCES = {
    HUB_ID: "VGGT-1B: non-commercial",
    "facebook/VGGT-1B-Commercial": "VGGT-1B-Commercial: commercial use allowed, gated",
}
UNKNOWN_LICENCE = "unknown (user's file); VGGT-1B is non-commercial"

HEADS = ("camera_head.", "point_head.", "depth_head.", "track_head.")
AGGREGATOR = "aggregator."


class Architecture(NamedTuple):
    """`width` of a token of either attention, `depth` in layers (each one within and one over pictures), attention
    `heads`, and `vision_depth`, layers of the DINOv2 that turns patches into tokens."""

    width: int
    depth: int
    heads: int
    vision_depth: int


PUBLISHED = Architecture(1024, 24, 16, 24)
TINY = Architecture(64, 3, 2, 1)
"""What `--weights random` builds."""

VISION_HEAD = 64
"""Channels of a head of attention of every DINOv2."""


class Aggregator(NamedTuple):
    """A frozen network, the part of the identity that tells its weights, and their licence."""

    network: Any
    architecture: Architecture
    identity: dict[str, Any]
    licence: str


def random_aggregator(checkout: Checkout, seed: int) -> Aggregator:
    """Build a tiny network whose weights depend on `seed` alone; the random state stays."""
    network = build(checkout, TINY, seed)
    identity = {"weights": RANDOM, "seed": seed, "weights_sha256": digest_tensors(network.state_dict())}
    return Aggregator(network, TINY, identity, "none (random)")


def load_aggregator(checkout: Checkout, weights: str | None) -> Aggregator:
    """Build the network that a file of weights is for, and load it.

    `weights` is a file, a folder, or a hub id (None: VGGT-1B). Raises `MachineError` where there is none, `DataError`
    where its keys or shapes are not those of a VGGT.
    """
    name = weights or HUB_ID
    path = _find(name)
    tensors = _aggregator_tensors(read_tensors(path), path)
    architecture = read_architecture(tensors, path)
    with torch.device("meta"):  # drawing 909 million random numbers to overwrite them took minutes
        network = build(checkout, architecture)
    require_fit(network, tensors, path)
    load_strictly(network.to_empty(device="cpu"), tensors, path)
    constants = dict(build(checkout, TINY).named_buffers())  # mean and std of pixels are in no file
    for key, buffer in network.named_buffers():
        if key not in tensors:
            buffer.copy_(constants[key])
    licence = LICENCES.get(name, UNKNOWN_LICENCE)
    return Aggregator(network, architecture, {"weights_sha256": digest_files([path])}, licence)


def build(checkout: Checkout, architecture: Architecture, seed: int = 0) -> Any:
    """Build an aggregator of the checkout, random and frozen, as its own VGGT builds it at these sizes."""
    width, depth, heads, vision_depth = architecture
    with checkout.importing() as load, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aggregator, vision = load("vggt.models.aggregator"), load("vggt.layers.vision_transformer")
        block, attention = load("vggt.layers.block"), load("vggt.layers.attention")
        # Its own names for the vision part mean fixed sizes; "conv" is a light one, to be replaced.
        network = aggregator.Aggregator(
            img_size=TRAINED_SIZE,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_register_tokens=REGISTERS,
            patch_embed="conv",
        )
        network.patch_embed = vision.DinoVisionTransformer(
            img_size=TRAINED_SIZE,
            patch_size=PATCH,
            embed_dim=width,
            depth=vision_depth,
            num_heads=width // VISION_HEAD,
            mlp_ratio=4,
            block_fn=partial(block.NestedTensorBlock, attn_class=attention.MemEffAttention),
            num_register_tokens=REGISTERS,
            interpolate_antialias=True,
            interpolate_offset=0.0,
            block_chunks=0,
            init_values=1.0,
            drop_path_uniform=True,  # of rate 0: nothing is dropped, and no number is read, which "meta" has not
        )
    return freeze(network)


def truncate(network: Any, layers: int) -> None:
    """Drop what comes after the first `layers` layers, in place: the last that is left is then the last output."""
    network.frame_blocks, network.global_blocks = network.frame_blocks[:layers], network.global_blocks[:layers]
    network.depth = network.aa_block_num = layers


def read_architecture(tensors: Mapping[str, torch.Tensor], path: Path) -> Architecture:
    """Tell the sizes of a network from its tensors. Raises `DataError` where they are those of no VGGT."""
    told = ("camera_token", "frame_blocks.0.attn.q_norm.weight", "patch_embed.blocks.0.norm1.weight")
    require_keys([AGGREGATOR + name for name in told if name not in tensors], [], path)
    width, channels = tensors[told[0]].shape[-1:].numel(), tensors[told[1]].numel()
    if not width or not channels or width % VISION_HEAD or width % channels:
        raise DataError(f"{path} does not fit: tokens of {width} channels, heads of {channels}")
    return Architecture(
        width, _count("frame_blocks", tensors), width // channels, _count(r"patch_embed\.blocks", tensors)
    )


def _count(blocks: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Count the blocks of a kind by their highest number; gaps show as missing keys when the network is loaded."""
    numbers = (re.match(rf"{blocks}\.(\d{{1,3}})\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _aggregator_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    unexpected = sorted(name for name in tensors if not name.startswith((AGGREGATOR, *HEADS)))
    require_keys([], unexpected, path)
    return {name[len(AGGREGATOR) :]: values for name, values in tensors.items() if name.startswith(AGGREGATOR)}


def _find(name: str) -> Path:
    fix = (
        f"`hf download {HUB_ID} model.safetensors config.json --local-dir weights/vggt` where there is a network, then "
        "--weights weights/vggt (or --weights random for a trial run)"
    )
    return weight_files(find_model(name, fix))[0] if is_hub_id(name) else find_file(Path(name).expanduser())
