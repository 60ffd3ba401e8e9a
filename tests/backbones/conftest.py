"""Offline by force, a few pictures, and tiny models saved as the hub would serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_model

from vla.featurize.backbones.da3_network import build_network

TINY_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY_SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_GEMMA = {
    "model_type": "gemma",
    "hidden_size": 40,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 50,
}
TINY_TEXT = {**TINY_SIGLIP, "vocab_size": 50}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))


@pytest.fixture(scope="session")
def pictures() -> list[NDArray[np.uint8]]:
    """Eight different pictures of 60x80: a colour gradient with a bright square in another place each."""
    y, x = np.mgrid[0:60, 0:80]
    made = []
    for number in range(8):
        picture = np.stack([x * 3, y * 4, (x + y) % 256 * (number + 1) % 256], axis=-1)
        picture[5 * number : 5 * number + 12, 8 * number : 8 * number + 12] = 250 - 20 * number
        made.append(picture.astype(np.uint8))
    return made


def save_da3(network: Any, folder: Path, model_name: str) -> None:
    """Write a folder as the hub holds it: the published wrapper keeps the network as `model`, and saves its name."""
    folder.mkdir(parents=True)
    save_model(torch.nn.ModuleDict({"model": network}), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_name": model_name}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Any]]]:
    """`{kind: (folder, the model in memory)}`; the folder was written by `save_pretrained`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = {**TINY_VIT, "image_size": 112}
        eye = {**TINY_SIGLIP, "image_size": 112, "patch_size": 14}
        vlm = {
            "vision_config": {**eye, "image_size": 56, "vision_use_head": False, "model_type": "siglip_vision_model"},
            "text_config": dict(TINY_GEMMA),
            "projection_dim": TINY_GEMMA["hidden_size"],
            "image_token_index": 49,
        }
        made = {
            "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**vit, patch_size=14, mlp_ratio=2)),
            "dinov2_with_registers": transformers.Dinov2WithRegistersModel(
                transformers.Dinov2WithRegistersConfig(**vit, patch_size=14, mlp_ratio=2)
            ),
            "dinov3_vit": transformers.DINOv3ViTModel(
                transformers.DINOv3ViTConfig(**TINY_VIT, intermediate_size=96, num_register_tokens=4)
            ),
            "siglip_vision_model": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**eye)),
            "paligemma": transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**vlm)),
            "pi0": transformers.PI0ForConditionalGeneration(
                transformers.PI0Config(vlm_config={**vlm, "model_type": "paligemma"}, dit_config=dict(TINY_GEMMA))
            ),
            "siglip": transformers.SiglipModel(transformers.SiglipConfig(vision_config=eye, text_config=TINY_TEXT)),
        }
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for kind, model in made.items():
        model.eval().save_pretrained(root / kind)
    if find_spec("depth_anything_3") is not None:
        made["da3"] = build_network("da3-tiny", seed=7)
        save_da3(made["da3"], root / "da3", "da3-tiny")
    yield {kind: (root / kind, model) for kind, model in made.items()}
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkout(files, commit)` writes {path: text} as a checkout of a commit, or as a plain folder for None."""

    def make(files: Mapping[str, str], commit: str | None) -> Path:
        folder = tmp_path_factory.mktemp("checkout")
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        if commit is not None:
            (folder / ".git").mkdir()
            (folder / ".git" / "HEAD").write_text(f"{commit}\n")
        return folder

    return make
