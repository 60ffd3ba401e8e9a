"""Where the networks of `pi0` and `pi05` come from: a checkpoint folder, or tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GemmaModel

from vla.heads.nets.prefix import PrefixModel
from vla.heads.prompts import ByteTokenizer
from vla.pretrained.hub import fill_model, find_model
from vla.pretrained.pi0 import Pi0Sizes, gemma_config, read_part, read_sizes
from vla.pretrained.weights import RANDOM

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
