"""Where the networks of `pi0` and `pi05` come from: a checkpoint folder, or tiny ones with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GemmaModel

from vla.heads.nets.prefix import PrefixModel
from vla.heads.prompts import ByteTokenizer
from vla.pretrained.hub import fill_model, find_model, is_hub_id
from vla.pretrained.paligemma import read_prefix
from vla.pretrained.pi0 import Pi0Sizes, gemma_config, read_part, read_sizes
from vla.pretrained.weights import RANDOM, digest_tensors, load_strictly
from vla.stores.errors import UsageError

if TYPE_CHECKING:
    from vla.heads.data import HeadData

TINY_LANGUAGE = (64, 128, 2, 4, 1, 16)
"""Width, MLP, layers, heads, key heads, head width: as wide as the image tokens of `siglip-prefix --weights random`."""
TINY_EXPERT = (32, 64, 2, 4, 1, 16)
TINY_SPREAD = 0.125
"""1 / sqrt(64): with Gemma's own 0.02 so narrow a network would hand on next to nothing of what it sees."""

FIX = (
    "`hf download lerobot/pi0_base --local-dir weights/pi0` (or lerobot/pi05_base, google/paligemma-3b-pt-224) where "
    "there is a network, then --set model.weights=weights/pi0 (or random for a trial run)"
)


def weights_folder(weights: str) -> Path:
    """Return the folder of a checkpoint, given the folder or a hub id. Raises `MachineError` where there is none."""
    return find_model(weights, FIX)


def network_sizes(weights: str) -> Pi0Sizes:
    """Return the sizes of a folder's networks, reading no weights; of "random", tiny ones."""
    if weights != RANDOM:
        return read_sizes(weights_folder(weights))
    language = gemma_config(*TINY_LANGUAGE, vocab_size=ByteTokenizer.size, initializer_range=TINY_SPREAD)
    return Pi0Sizes(language, gemma_config(*TINY_EXPERT, initializer_range=TINY_SPREAD), adaptive=None)


def load_language(weights: str, seed: int = 0) -> PrefixModel:
    """Return the language model of a folder in float32, every key accounted for; of "random", a seeded tiny one.

    Raises `DataError` where the files do not hold exactly its parameters.
    """
    sizes = network_sizes(weights)
    if weights == RANDOM:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            return PrefixModel(sizes.language)
    folder = weights_folder(weights)
    return PrefixModel(sizes.language, fill_model(GemmaModel, sizes.language, read_part(folder, "language"), folder))


def load_expert(net: nn.Module, weights: str) -> None:
    """Load expert and projections of a folder into a velocity net (nets/pi0_expert.py), every key accounted for.

    A folder without an expert (PaliGemma) leaves the fresh one, as "random" does. Raises `DataError` where the files
    do not hold exactly the parameters of the net.
    """
    if weights == RANDOM or network_sizes(weights).expert is None:
        return
    folder = weights_folder(weights)
    expert = {f"expert.{name}": values for name, values in read_part(folder, "expert").items()}
    load_strictly(net, expert | read_part(folder, "projections"), folder)


def check_backbones(data: HeadData, weights: str, geom_model_id: str | None) -> None:
    """Compare the stores' networks with the head's. Raises `UsageError` naming both where they are not the same.

    Image tokens have to come from the vision tower and projector of `weights`; rays from `geom_model_id` (None: none),
    and of the same pictures: augmented copies of one feature beside plain ones of the other would not fit together.
    """
    images = _backbone(data, "siglip")
    if weights != RANDOM and images.get("weights") != RANDOM:
        prefix = read_prefix(weights_folder(weights))
        tower = {f"vision_tower.{name}": values for name, values in prefix.tower.items()}
        if digest_tensors(tower | prefix.projector) != images.get("weights_sha256"):
            raise UsageError(
                f"the image tokens are of another vision tower than that of {weights}",
                expected="image tokens of the same checkpoint",
                fix=f"vla featurize --backbone siglip-prefix --weights {weights}",
            )
    if geom_model_id is not None:
        rays, pictures = (data.stores.stores[data.stores.owner[name]].manifest for name in ("ray", "siglip"))
        check_geometry_model(geom_model_id, _backbone(data, "ray"), rays.provenance["backbone"])
        if data.copies and bool(rays.copies) != bool(pictures.copies):
            which = "image tokens" if pictures.copies else "rays"
            raise UsageError(
                f"only the {which} have augmented copies",
                expected="rays and image tokens of the same pictures",
                fix="the same --augment for both stores, or --set data.augment=false",
            )


def check_geometry_model(wanted: str, identity: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a store's rays are of another model than `wanted`, a name such as the hub's.

    `identity` and `recipe` are what the store says of its backbone. Where that is a folder of weights, only the
    architecture is known: a version behind the name ("-1.1") is then not compared.
    """
    weights, model = recipe.get("weights"), recipe.get("options", {}).get("model")
    name = wanted.rpartition("/")[2].lower()
    if weights and is_hub_id(weights):
        model = weights.rpartition("/")[2]
    network = str(identity.get("network", identity["name"]))
    known = (network, f"{network}-1.1") if model is None else (model.lower(), f"da3-{model.lower()}")
    if name not in known:
        raise UsageError(
            f"the rays of the store are of {model or network}",
            expected=f"{wanted}, the model.geom_model_id",
            fix=f"--set model.geom_model_id={model or network}, if that is meant",
        )


def _backbone(data: HeadData, feature: str) -> dict[str, Any]:
    """Return the identity of the backbone that made a feature."""
    store = data.stores.stores[data.stores.owner[feature]]
    return dict(store.manifest.fingerprint["backbone"])
