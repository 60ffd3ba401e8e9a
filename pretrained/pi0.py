"""The language model, the action expert and the projections of a PaliGemma-type checkpoint; never its vision tower.

Three layouts are known (and read by pattern, one tensor at a time): PaliGemma as transformers saves it, without an
expert; PI0 as transformers saves it (`model.vlm.language_model.…`, `model.dit.…`, `embed_action_time.…`); and pi0 and
pi0.5 as openpi's conversion to PyTorch and LeRobot save them (`paligemma_with_expert.paligemma.model.language_model.…`,
`paligemma_with_expert.gemma_expert.model.…`, `action_in_proj.…`, with or without a leading `model.`). Every key of the
files has to be one of these, of the vision tower, or of a language-model head that no action depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import GemmaConfig

from vla.pretrained.hub import read_json, weight_files
from vla.pretrained.weights import DAMAGE, require_keys
from vla.stores.errors import DataError

Part = Literal["language", "expert", "projections"]

PROJECTIONS = (
    "action_in_proj|action_out_proj|state_proj|action_time_mlp_in|action_time_mlp_out|time_mlp_in|time_mlp_out"
)
PATTERNS: dict[Part, re.Pattern[str]] = {
    "language": re.compile(r"(?:^|\.)language_model\.(?:model\.)?(layers\..+|norm\..+|embed_tokens\.weight)$"),
    "expert": re.compile(r"(?:^|\.)(?:gemma_expert\.model|dit)\.(layers\..+|norm\..+)$"),
    "projections": re.compile(rf"(?:^|\.)((?:{PROJECTIONS})\.(?:weight|bias))$"),
}
TIED = re.compile(r"^(?:model\.)?(?:paligemma_with_expert\.paligemma\.|language_model\.)?lm_head\.weight$")
"""PaliGemma's output matrix, which is its table of embeddings: openpi's conversion saves it under this name alone."""
UNUSED = re.compile(
    r"(?:^|\.)(?:vision_tower|multi_modal_projector)\.|(?:^|\.)(?:gemma_expert\.(?:lm_head|model\.embed_tokens)"
    r"|dit\.embed_tokens)\.weight$"
)

VARIANTS = {"gemma_2b": (2048, 16384, 18, 8, 1, 256), "gemma_300m": (1024, 4096, 18, 8, 1, 256)}
"""openpi's names for (width, MLP, layers, heads, key heads, head width), `get_config` of its gemma.py."""
PALIGEMMA_VOCABULARY = 257152


@dataclass(frozen=True)
class Pi0Sizes:
    """What a checkpoint folder holds: `language`, and `expert` (None: there is none).

    `adaptive`: whether the expert's norms are conditioned on the time, as pi0.5's are (None: either). `max_action`,
    `max_state`: the dimensions that actions and states are padded to.
    """

    language: GemmaConfig
    expert: GemmaConfig | None
    adaptive: bool | None
    max_action: int = 32
    max_state: int = 32


def gemma_config(width: int, mlp: int, layers: int, heads: int, key_heads: int, head_dim: int, **more: Any) -> Any:
    """Return transformers' configuration of a Gemma of these sizes."""
    return GemmaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        **more,
    )


def read_sizes(folder: Path) -> Pi0Sizes:
    """Read a folder's `config.json` and the names in its weight files. Raises `DataError` for another kind of model."""
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    adaptive = any(re.search(r"(?:^|\.)time_mlp_in\.", key) for key, _ in _keys(folder))
    try:
        if kind == "paligemma":
            text = transformers.PaliGemmaConfig.from_dict(dict(values)).text_config
            sizes = Pi0Sizes(text, None, adaptive=None)
        elif kind == "pi0":
            pi0 = transformers.PI0Config.from_dict(dict(values))
            text = pi0.vlm_config.text_config
            sizes = Pi0Sizes(text, pi0.dit_config, adaptive, pi0.max_action_dim, pi0.max_state_dim)
        elif values.get("paligemma_variant") in VARIANTS:
            text = gemma_config(*VARIANTS[values["paligemma_variant"]], vocab_size=PALIGEMMA_VOCABULARY)
            expert = gemma_config(*VARIANTS[values.get("action_expert_variant", "gemma_300m")])
            sizes = Pi0Sizes(text, expert, adaptive)
        else:
            found = f"{folder} holds a {kind or values.get('type') or values.get('paligemma_variant')!r} model"
            raise DataError(found, expected="model_type paligemma or pi0, or a paligemma_variant of openpi")
    except (*DAMAGE, StrictDataclassError, ArithmeticError) as error:
        raise DataError(f"{folder / 'config.json'}: {str(error).strip().partition(chr(10))[0]}") from None
    if sizes.language.model_type != "gemma":
        raise DataError(f"{folder} has a {sizes.language.model_type!r} language model", expected="gemma (PaliGemma 1)")
    return sizes


def read_part(folder: Path, part: Part) -> dict[str, torch.Tensor]:
    """Return one part's tensors in float32, named as transformers' GemmaModel (projections: as above) names them.

    Raises `DataError` where a file is damaged or holds keys of no part.
    """
    tensors: dict[str, torch.Tensor] = {}
    tied: torch.Tensor | None = None
    unexpected = []
    for key, file in _keys(folder):
        found = next(((name, match) for name, pattern in PATTERNS.items() if (match := pattern.search(key))), None)
        if UNUSED.search(key):
            continue
        if found is None and not TIED.match(key):
            unexpected.append(key)
        elif found is None and part == "language":
            tied = _read(file, key)
        elif found is not None and found[0] == part:
            tensors[found[1][1]] = _read(file, key)
    require_keys([], sorted(unexpected), folder)
    if tied is not None:
        tensors.setdefault("embed_tokens.weight", tied)
    return tensors


def _keys(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except DAMAGE as error:
            raise DataError(f"{path} does not load: {str(error).strip().partition(chr(10))[0]}") from None
        for name in names:
            yield name, path


def _read(path: Path, key: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            values: torch.Tensor = file.get_tensor(key).float()
            return values
    except DAMAGE as error:
        raise DataError(f"{path} does not load: {str(error).strip().partition(chr(10))[0]}") from None
