"""Depth Anything 3's network: built from its own classes, its weights read in the layout of the model hub.

The package declares `numpy<2` and some twenty packages that its network does not use, so pip cannot install it beside
zarr 3 unless its dependencies are left out. Its `api` module is never imported: it needs them, and its forward pass
deletes the rays. Only the ray-predicting models are here; the metric and monocular ones have no ray head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vla.pretrained.hub import find_model, read_json, weight_files
from vla.pretrained.inference import freeze
from vla.pretrained.weights import digest_files, load_strictly, read_tensors
from vla.stores.errors import DataError, MachineError, UsageError
from vla.stores.settings import nearest

INSTALL = "`pip install einops addict omegaconf` and `pip install --no-deps depth-anything-3==0.1.1`"

PREFIX = "model."
"""What the hub's files put before every name: the published wrapper keeps its network as `model`."""

UNUSED = tuple(PREFIX + part for part in ("cam_enc.", "cam_dec.", "gs_head.", "gs_adapter."))
"""Parts of the published files that no feature needs: pose and Gaussian branches."""

APACHE, NON_COMMERCIAL = "Apache-2.0", "CC BY-NC 4.0 (non-commercial)"


@dataclass(frozen=True)
class Architecture:
    """One network. `vit` is upstream's name of a transformer of this size, if it has one; `layers` feed the ray head.

    From `alt_start` on, every second layer attends across the views of a scene. `features` and `channels` are the
    widths of the head. `licence` is that of the published weights.
    """

    vit: str | None
    width: int
    depth: int
    heads: int
    layers: tuple[int, int, int, int]
    alt_start: int
    features: int
    channels: tuple[int, int, int, int]
    licence: str


ARCHITECTURES = {
    "da3-small": Architecture("vits", 384, 12, 6, (5, 7, 9, 11), 4, 64, (48, 96, 192, 384), APACHE),
    "da3-base": Architecture("vitb", 768, 12, 12, (5, 7, 9, 11), 4, 128, (96, 192, 384, 768), APACHE),
    "da3-large": Architecture("vitl", 1024, 24, 16, (11, 15, 19, 23), 8, 256, (256, 512, 1024, 1024), NON_COMMERCIAL),
    "da3-giant": Architecture("vitg", 1536, 40, 24, (19, 27, 33, 39), 13, 256, (256, 512, 1024, 1024), NON_COMMERCIAL),
    "da3-tiny": Architecture(None, 64, 6, 2, (2, 3, 4, 5), 2, 32, (16, 24, 32, 32), "none"),
}
"""By the `model_name` of a hub folder's config.json; all but the tiny one as in the package's configs/*.yaml."""

MODELS = {
    "DA3-SMALL": "da3-small",
    "DA3-BASE": "da3-base",
    "DA3-LARGE": "da3-large",
    "DA3-LARGE-1.1": "da3-large",
    "DA3-GIANT": "da3-giant",
    "DA3-GIANT-1.1": "da3-giant",
    "tiny": "da3-tiny",
}
"""Name of a published model (`depth-anything/NAME` on the hub) -> its architecture. "tiny" is for random weights."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep upstream's logger, which prints to stdout, from a command's JSON."""
    from depth_anything_3.utils.logger import LOG_LEVELS, logger

    level, logger.level = logger.level, LOG_LEVELS["ERROR"]
    try:
        yield
    finally:
        logger.level = level


def build_network(name: str, seed: int = 0) -> Any:
    """Build a frozen network with random weights, backbone and ray head only; the random state stays untouched.

    Raises `MachineError` naming the two commands where the package is not installed.
    """
    try:
        with warnings.catch_warnings():  # it calls deprecated functions of torch and omegaconf as it is imported
            warnings.simplefilter("ignore")
            from depth_anything_3.model.da3 import DepthAnything3Net
            from depth_anything_3.model.dinov2.dinov2 import DinoV2
            from depth_anything_3.model.dualdpt import DualDPT
    except ModuleNotFoundError as error:
        raise MachineError(f"backbone 'da3' needs the package {error.name}", fix=INSTALL) from None
    arch = ARCHITECTURES[name]
    start = {"alt_start": arch.alt_start, "qknorm_start": arch.alt_start, "rope_start": arch.alt_start}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch.vit is not None:
            vit = DinoV2(arch.vit, out_layers=list(arch.layers), cat_token=True, **start)
        else:
            vit = _small_vit(arch, start)
        head = DualDPT(2 * arch.width, output_dim=2, features=arch.features, out_channels=arch.channels)
        return freeze(DepthAnything3Net(vit, head))


def _small_vit(arch: Architecture, start: Mapping[str, int]) -> Any:
    """Build the same transformer at a size for which upstream has no name."""
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer

    sizes = {"patch_size": 14, "embed_dim": arch.width, "depth": arch.depth, "num_heads": arch.heads}
    vit: Any = DinoV2.__new__(DinoV2)  # its constructor knows four sizes only, and would build one of them
    nn.Module.__init__(vit)
    vit.out_layers = list(arch.layers)
    vit.pretrained = DinoVisionTransformer(518, **sizes, ffn_layer="mlp", cat_token=True, **start)
    return vit


def load_network(where: str, wanted: str | None, fix: str) -> tuple[str, Any, str]:
    """Return (architecture, frozen float32 network, SHA-256 of its files) of a hub folder or a hub id.

    `wanted`: the architecture that it has to have, if any. Raises `MachineError` ending in `fix` where there is
    nothing to load, `UsageError` for another architecture than wanted, `DataError` where the files do not fit.
    """
    folder = find_model(where, fix)
    name = str(read_json(folder / "config.json").get("model_name"))
    if name not in ARCHITECTURES:
        found = f"{folder / 'config.json'} has model_name {name!r}{nearest(name, ARCHITECTURES)}"
        raise DataError(found, expected=f"a model with rays: {', '.join(ARCHITECTURES)}")
    if wanted not in (None, name):
        raise UsageError(f"{folder} holds {name}, and model asks for {wanted}", fix="leave options.model out")
    network, files = build_network(name), weight_files(folder)
    tensors = {key: value for file in files for key, value in read_tensors(file).items() if not key.startswith(UNUSED)}
    if foreign := sorted(key for key in tensors if not key.startswith(PREFIX)):
        found = f"{folder} does not fit: {len(foreign)} names without {PREFIX!r}, first {foreign[0]}"
        raise DataError(found, expected="weights as the hub holds them")
    bare = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    load_strictly(network, _with_tied_names(network, bare), folder)
    return name, network, digest_files(files)


def _with_tied_names(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the other names of parameters that have several: the head shares one LayerNorm, safetensors keeps one name.

    Which names belong together is told by the identity of the parameters, never by a list.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in network.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), []).append(name)
    filled = dict(tensors)
    for tied in names.values():
        present = [name for name in tied if name in tensors]
        for name in tied if present else ():
            filled.setdefault(name, tensors[present[0]])
    return filled
