"""Qwen3 language models: their sizes, from a folder, the hub or a state dict, and the networks without an output head.

Sizes alone build a network, so that a checkpoint which holds the weights needs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from torch import nn

from vla.pretrained.hub import find_model, load_model, read_json
from vla.pretrained.inference import freeze
from vla.pretrained.weights import DAMAGE, RANDOM, load_strictly
from vla.stores.errors import DataError
from vla.stores.settings import Settings

QWEN3_ROPE_THETA, QWEN3_EPS = 1_000_000.0, 1e-6
"""Of every dense Qwen3 that was published (config.json of Qwen3-0.6B to 32B): a state dict does not hold them."""
MAX_SIZE = 1 << 20


class LanguageSizes(Settings):
    """What a Qwen3 is built from: `hidden` and `intermediate` widths, `layers`, `heads` of `head_dim`, `kv_heads` of
    them for keys and values, `vocab` token ids, and the constants of rotary positions and normalisation."""

    hidden: int = Field(ge=8, le=MAX_SIZE)
    intermediate: int = Field(ge=8, le=MAX_SIZE)
    layers: int = Field(ge=1, le=1000)
    heads: int = Field(ge=1, le=1000)
    kv_heads: int = Field(ge=1, le=1000)
    head_dim: int = Field(ge=2, le=MAX_SIZE)
    vocab: int = Field(ge=1, le=1 << 22)
    rope_theta: float = Field(QWEN3_ROPE_THETA, gt=0)
    rms_norm_eps: float = Field(QWEN3_EPS, gt=0)


TINY = LanguageSizes(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=257)
"""Of random weights: as many ids as the backbone `text` has byte tokens with random weights."""
TINY_STD = 0.2
"""Of its weights. At transformers' 0.02 a net of this width passes on next to nothing of what it attends to."""


def language_sizes(name: str) -> LanguageSizes:
    """Return the sizes of a language model given as a folder, a hub id or "random".

    Raises `MachineError` where it is nowhere and `DataError` for another architecture than the dense Qwen3.
    """
    if name == RANDOM:
        return TINY
    path = _find(name) / "config.json"
    values = read_json(path)
    if values.get("model_type") != "qwen3":
        raise DataError(f"{path} describes a {values.get('model_type')!r} model", expected="qwen3")
    try:
        config = transformers.Qwen3Config.from_dict(dict(values))
        rope = config.rope_parameters
        if config.attention_bias or config.use_sliding_window or rope["rope_type"] != "default":
            raise DataError(f"{path} has {rope}", expected="plain rotary positions, whole attention and no biases")
        return LanguageSizes(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            rope_theta=rope["rope_theta"],
            rms_norm_eps=config.rms_norm_eps,
        )
    except DataError:
        raise
    except (*DAMAGE, StrictDataclassError) as error:
        raise DataError(f"{path}: {str(error).strip().partition(chr(10))[0]}") from None


def sizes_of(tensors: Mapping[str, torch.Tensor], path: Path) -> LanguageSizes:
    """Return the sizes of a Qwen3 from its state dict. Raises `DataError` where it is none."""
    try:
        head_dim = len(tensors["layers.0.self_attn.q_norm.weight"])
        vocab, hidden = tensors["embed_tokens.weight"].shape
        return LanguageSizes(
            hidden=hidden,
            intermediate=len(tensors["layers.0.mlp.gate_proj.weight"]),
            layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
            heads=len(tensors["layers.0.self_attn.q_proj.weight"]) // head_dim,
            kv_heads=len(tensors["layers.0.self_attn.k_proj.weight"]) // head_dim,
            head_dim=head_dim,
            vocab=vocab,
        )
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"{path} holds no Qwen3: {error}") from None


def build_language(sizes: LanguageSizes) -> nn.Module:
    """Build the network with random weights, on the device that torch is told to build on."""
    config = transformers.Qwen3Config(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        rms_norm_eps=sizes.rms_norm_eps,
        initializer_range=TINY_STD if sizes == TINY else 0.02,
    )
    network: nn.Module = transformers.Qwen3Model(config)
    return network


def load_language(name: str) -> nn.Module:
    """Load the network of a folder or a hub id, or the tiny one whose weights are random, the same in every process."""
    if name == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return freeze(build_language(TINY))
    return load_model(transformers.Qwen3Model, _find(name), unused=("lm_head.",))


def fill_language(sizes: LanguageSizes, tensors: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """Build the network around tensors of its own names, in float32. Raises `DataError` unless each has its place."""
    with torch.device("meta"):
        described = build_language(sizes)
    network = described.to_empty(device="cpu")
    load_strictly(network, {key: value.float() for key, value in tensors.items()}, path)
    return freeze(_with_positions(network, sizes))


def _with_positions(network: Any, sizes: LanguageSizes) -> nn.Module:
    """Compute the rotary frequencies, which are in no state dict and which `to_empty` left undefined."""
    network.rotary_emb = type(network.rotary_emb)(network.config)
    return network  # type: ignore[no-any-return]


def _find(name: str) -> Path:
    fix = f"`hf download {name} --local-dir weights/llm`, then --set model.llm_weights=weights/llm"
    return find_model(name, fix)
