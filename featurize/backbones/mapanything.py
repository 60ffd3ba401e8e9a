"""MapAnything (Keetha et al., 2025) from a user's checkout: points in the world, and dense features, from pictures.

It is on no package index. Its image encoder is built through torch.hub, which asks the network even where the weights
are at hand: while the model is built, torch.hub is answered with the copy of DINOv2 in the checkout itself.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vla.featurize.backbones.checkout import Repository, open_checkout
from vla.pretrained.hub import find_model, weight_files
from vla.pretrained.inference import freeze
from vla.pretrained.weights import RANDOM, digest_files, digest_tensors, load_strictly, read_tensors
from vla.stores.documents import read_json_file
from vla.stores.errors import DataError, UsageError
from vla.stores.fingerprint import digest

DEFAULT_ID = "facebook/map-anything-apache"
PATCH = 14
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What its data_norm_type "dinov2" means: mean and std of [0, 1] pixels."""

REPOSITORY = Repository(
    url="https://github.com/facebookresearch/map-anything",
    package="mapanything",
    entry="mapanything.models.mapanything.model",
    commits=("f7ebafb4d8349776705aaa686cf928988d1bd7f4",),
    python_sha256="15b75fe54f239812dcc0146e34aa124daa361623a173854217fd31b3134c5a59",
    packages={
        "uniception": "--no-deps uniception==0.1.7",
        "hydra": "hydra-core",
        "cv2": "opencv-python-headless",
        "torchvision": "torchvision  # in the build that fits this torch",
    },
)

ELSEWHERE = ("pretrained_checkpoint_path", "torch_hub_force_reload")
"""Arguments of the model that name other places to load from."""

_building = threading.Lock()


@dataclass(frozen=True)
class Scene:
    """What MapAnything sees in B time steps of V pictures, in the axes of each first picture's camera, in metres.

    `points` [B, V, h, w, 3], `known` bool [B, V, h, w] (false where it calls its own answer ambiguous), `features`
    [B, V, C, h / 14, w / 14]: what its multi-view transformer hands to its heads.
    """

    points: torch.Tensor
    known: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class MapAnything:
    """The frozen network. `identity` tells code, configuration and weights."""

    network: nn.Module
    channels: int
    norm: str
    identity: Mapping[str, Any]

    def see(self, pictures: torch.Tensor) -> Scene:
        """Look at [B, V, 3, h, w] of [0, 1] values, normalised; h and w multiples of 14. Time steps do not mix."""
        kept: list[Any] = []
        hook = self.network.info_sharing.register_forward_hook(  # type: ignore[union-attr]
            lambda module, given, made: kept.append(made)
        )
        views = [{"img": view, "data_norm_type": [self.norm]} for view in pictures.unbind(1)]
        devices = [pictures.device] if pictures.device.type == "cuda" else []
        try:
            # It draws which geometric inputs to drop even where it is given none.
            with torch.random.fork_rng(devices=devices):
                made = self.network(views)
        finally:
            hook.remove()
        last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        points = torch.stack([view["pts3d"] for view in made], dim=1)
        known = torch.isfinite(points).all(-1)
        if "non_ambiguous_mask" in made[0]:
            known &= torch.stack([view["non_ambiguous_mask"] for view in made], dim=1)
        return Scene(points, known, torch.stack(list(last.features), dim=1))


def nearest(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Sample [B, V, h, w, ...] at side x side points: the value at each patch's top left, as LLaVA-3D does."""
    rows, columns = (torch.arange(side, device=grid.device) * size // side for size in grid.shape[2:4])
    return grid[:, :, rows[:, None], columns[None, :]].flatten(2, 3)


def pool_features(features: torch.Tensor, side: int) -> torch.Tensor:
    """Average [B, V, C, h, w] to [B, V, side, side, C]."""
    pooled = functional.adaptive_avg_pool2d(features.flatten(0, 1), side)
    return pooled.permute(0, 2, 3, 1).reshape(*features.shape[:2], side, side, -1)


def load_mapanything(weights: str | None, checkout: str | None, *, any_commit: bool, seed: int) -> MapAnything:
    """Build the network on the CPU in float32.

    `weights` is a folder with config.json and model.safetensors, a hub id, "random" for a tiny network of the same
    architecture, or None for the Apache-2.0 weights. Raises what `open_checkout` does, `MachineError` naming a
    package that its code needs, and `DataError` for weights that do not fit.
    """
    place = open_checkout(REPOSITORY, checkout, any_commit=any_commit)
    name = weights or DEFAULT_ID
    identity: dict[str, Any] = {**place.identity, "features": "info_sharing, last layer, normalised"}
    config, folder = tiny_config(), None
    if name != RANDOM:
        fix = f"`hf download {name} --local-dir weights/ma`, then --set options.mapanything=weights/ma"
        folder = find_model(name, fix)
        config = _read_config(folder / "config.json")
    identity["config_sha256"] = digest(_jsonable(config))
    with _building, torch.random.fork_rng(devices=[]), place.importing() as load:
        torch.manual_seed(seed)
        module = load(REPOSITORY.entry)
        with _hub_answered_by(load("mapanything.models.external.dinov2.hub.backbones")):
            network: Any = _construct(module, config, folder)
    if folder is None:
        identity |= {"weights": RANDOM, "seed": seed, "weights_sha256": digest_tensors(network.state_dict())}
    else:
        files = weight_files(folder)
        tensors = {key: value for file in files for key, value in read_tensors(file).items()}
        load_strictly(network, with_tied(tensors, network), folder)
        identity["weights_sha256"] = digest_files(files)
    patch = network.encoder.patch_size
    if patch != PATCH:
        raise UsageError(f"the encoder of {name} has patches of {patch} px", expected=f"{PATCH}")
    # Pictures alone go in: whatever chances of other inputs a file was trained with, none is drawn.
    network.geometric_input_config.update({"overall_prob": 0.0, "dropout_prob": 1.0})
    channels = int(network.info_sharing.dim)
    return MapAnything(freeze(network), channels, str(network.encoder.data_norm_type), identity)


def with_tied(tensors: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Add the other names of tied parameters: its heads have up to six for one, and a file keeps one of them."""
    names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, values in network.state_dict().items():
        if values.numel():
            names.setdefault((values.data_ptr(), tuple(values.shape)), []).append(name)
    tied = {name: tensors[known] for group in names.values() for known in group if known in tensors for name in group}
    return {**tied, **tensors}


def _construct(module: ModuleType, config: dict[str, Any], folder: Path | None) -> nn.Module:
    # As its own from_pretrained: what a file says beside the arguments is left aside.
    known = inspect.signature(module.MapAnything.__init__).parameters
    try:
        network: nn.Module = module.MapAnything(**{name: part for name, part in config.items() if name in known})
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(f"{folder} has a config.json that the checkout does not build: {what}") from None
    return network


def _read_config(path: Path) -> dict[str, Any]:
    """Read the keyword arguments of the model; ranges in it may be infinite."""
    try:
        config = read_json_file(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a {type(config).__name__}", expected="the arguments of MapAnything")
    # Weights are loaded here, with every key accounted for, and never from a path that a file names.
    return {name: part for name, part in config.items() if name not in ELSEWHERE}


def _jsonable(value: Any) -> Any:
    """Spell infinities out: fingerprints are strict JSON."""
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_jsonable(part) for part in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


@contextmanager
def _hub_answered_by(backbones: ModuleType) -> Iterator[None]:
    """Answer `torch.hub.load` with untrained networks of the checkout; every weight is loaded afterwards."""

    def answer(repository: str, name: str, **_: Any) -> Any:
        if repository != "facebookresearch/dinov2" or not hasattr(backbones, name):
            raise UsageError(f"MapAnything asks torch.hub for {name} of {repository}", expected="a DINOv2 encoder")
        return getattr(backbones, name)(pretrained=False)

    asked, torch.hub.load = torch.hub.load, answer  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.hub.load = asked


def tiny_config() -> dict[str, Any]:
    """Return the arguments of a narrow, shallow MapAnything: what `random` builds.

    The published configuration (its configs/model/mapanything.yaml, resolved) but for the sizes.
    """
    encoder = {
        "encoder_str": "dinov2",
        "name": "dinov2_small_2_layers",
        "data_norm_type": "dinov2",
        "size": "small",
        "with_registers": False,
        "uses_torch_hub": True,
        "gradient_checkpointing": False,
        "norm_returned_features": False,
        "keep_first_n_layers": 2,
    }
    layers = {
        "name": "aat_4_layers",
        "indices": [1, 2],
        "norm_intermediate": True,
        "size": "4_layers",
        "depth": 4,
        "distinguish_ref_and_non_ref_views": True,
        "gradient_checkpointing": False,
        "dim": 96,
        "num_heads": 6,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "qk_norm": False,
        "init_values": 1e-5,
    }
    return {
        "name": "mapanything",
        "encoder_config": encoder,
        "info_sharing_config": {
            "model_type": "alternating_attention",
            "model_return_type": "intermediate_features",
            "custom_positional_encoding": None,
            "module_args": layers,
        },
        "pred_head_config": _tiny_heads(),
        "geometric_input_config": _no_geometry(),
        "use_register_tokens_from_encoder": True,
        "info_sharing_mlp_layer_str": "swiglufused",
    }


def _tiny_heads() -> dict[str, Any]:
    """Rays, depth, pose, confidence, mask and scale, none of them bounded."""
    adaptor = {"name": "raydirs+depth+pose+confidence+mask+scale"}
    free = {"vmin": float("-inf"), "vmax": float("inf")}
    return {
        "type": "dpt+pose",
        "gradient_checkpointing": False,
        "feature_head": {"feature_dim": 16, "hooks": [0, 1, 2, 3], "checkpoint_gradient": False},
        "regressor_head": {"output_dim": 6, "checkpoint_gradient": False},
        "pose_head": {"num_resconv_block": 1, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "adaptor_type": "raydirs+depth+pose+confidence+mask",
        "adaptor_config": {"input_dim": 6, "scene_rep_dim": 4, "scene_rep_type": "raydirs+depth+pose"},
        "dpt_adaptor": {
            **adaptor,
            "ray_directions_mode": "linear",
            "ray_directions_normalize_to_unit_sphere": True,
            "ray_directions_normalize_to_unit_image_plane": False,
            "ray_directions_clamp_min_of_z_dir": False,
            "ray_directions_z_dir_min": float("-inf"),
            **{f"ray_directions_{end}": value for end, value in free.items()},
            "depth_mode": "exp",
            "depth_vmin": 0,
            "depth_vmax": float("inf"),
            "confidence_type": "exp",
            "confidence_vmin": 1,
            "confidence_vmax": float("inf"),
        },
        "pose_adaptor": {
            **adaptor,
            "cam_trans_mode": "linear",
            **{f"cam_trans_{end}": value for end, value in free.items()},
            "quaternions_mode": "linear",
            "quaternions_normalize": True,
            **{f"quaternions_{end}": value for end, value in free.items()},
        },
        "scale_adaptor": {**adaptor, "mode": "exp", "vmin": 1e-8, "vmax": float("inf")},
    }


def _no_geometry() -> dict[str, Any]:
    """Encoders of rays, depth and poses, and no chance of their being used."""
    encoders: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
        ("ray_dirs_encoder", 3, "dense_rep_encoder", {"apply_pe": False}),
        ("depth_encoder", 1, "dense_rep_encoder", {"apply_pe": False}),
        ("cam_rot_encoder", 4, "global_rep_encoder", {}),
        ("cam_trans_encoder", 3, "global_rep_encoder", {}),
        ("scale_encoder", 1, "global_rep_encoder", {}),
    )
    chances = ("overall", "ray_dirs", "depth", "cam", "sparse_depth", "depth_scale_norm_all", "pose_scale_norm_all")
    return {
        **{
            f"{name}_config": {"name": name, "in_chans": channels, "encoder_str": kind, **more}
            for name, channels, kind, more in encoders
        },
        **{f"{chance}_prob": 0 for chance in chances},
        "dropout_prob": 1,
        "sparsification_removal_percent": 0,
    }
