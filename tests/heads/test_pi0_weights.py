"""Published checkpoints: the three layouts, read whole or refused; transformers' own PI0 says the same in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.heads import flow
from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.pi0 import Pi0Head
from vla.heads.pi0_weights import load_expert, load_language
from vla.heads.prompts import ByteTokenizer, tokenise
from vla.pretrained import pi0 as layouts
from vla.stores.errors import DataError, UsageError

LANGUAGE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LANGUAGE |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": ByteTokenizer.size}
EXPERT = {**LANGUAGE, "hidden_size": 32, "intermediate_size": 40}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
IMAGE, A = ByteTokenizer.size, 7
"""The id of an image token, behind all words; and the width of actions and states."""


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Draw every parameter anew: norms begin at zero, and would hide what multiplies them."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network.eval()


@pytest.fixture(scope="module")
def published() -> Any:
    """A small PI0 of transformers, every weight random."""
    torch.manual_seed(0)
    vlm = {"model_type": "paligemma", "text_config": {"model_type": "gemma", **LANGUAGE}, "projection_dim": 48}
    vlm |= {"vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}}
    vlm |= {"image_token_id": IMAGE}
    config = transformers.PI0Config(
        vlm_config=vlm,
        dit_config={"model_type": "gemma", **EXPERT},
        chunk_size=4,
        max_state_dim=A,
        max_action_dim=A,
    )
    return randomise(transformers.PI0ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def folder(published: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers."""
    path = tmp_path_factory.mktemp("pi0") / "weights"
    published.save_pretrained(path)
    return path


def head_of(kind: str, weights: Path | str, width: int = 48, **settings: Any) -> Pi0Head:
    """A head for actions and states of A, its normalisers the identity, its expert loaded."""
    io = HeadIO(
        action_dim=A,
        state_dim=A,
        features={"siglip": FeatureIO(shape=(2, 4, width), dims=("token", "channel"))},
        tasks=("pick up the cup", "go"),
    )
    settings |= {"weights": str(weights), "tokenizer": "random", "action_norm": "none", "state_norm": "none"}
    head = build_head(kind, {"horizon": 4, "n_action": 2, **settings}, io)
    assert isinstance(head, Pi0Head)
    moving = np.stack([-np.ones(A), np.ones(A)])  # a constant dimension would come back as its constant
    head.fit_normalisers(moving, moving)
    load_expert(head.net, str(weights))
    return head.eval()


def test_velocity_and_actions_are_those_of_transformers(
    published: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows whose prompts differ in length, two cameras; image tokens instead of pixels is all that differs."""
    head = head_of("pi0", folder)
    pixels, state, noise = torch.randn(2, 2, 3, 28, 28), torch.randn(2, A), torch.randn(2, 4, A)
    with torch.no_grad():
        images = published.model.vlm.get_image_features(pixels.flatten(0, 1)).pooler_output
    batch = Batch(
        features={"siglip": images.reshape(2, 1, 2, 4, 48)},
        state=state[:, None],
        task=torch.tensor([0, 1]),
        obs_valid=torch.ones(2, 1, dtype=torch.bool),
    )
    words, real, _ = tokenise(head.prompts(batch), ByteTokenizer(), max_length=48)
    theirs = {
        "state": state,
        "input_ids": torch.cat([torch.full((2, 8), IMAGE), words], dim=1),
        "attention_mask": torch.cat([torch.ones(2, 8, dtype=torch.bool), real], dim=1).long(),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    }
    t = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        wanted = published(**theirs, noise=noise, timestep=t).logits
        got = head.velocity(batch)(noise, t)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(flow, "noise_like", lambda shape, reference, generator: noise)
    torch.testing.assert_close(
        head.act(batch, whole=True), published.sample_actions(**theirs, noise=noise), atol=1e-5, rtol=1e-5
    )


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: values.contiguous().clone() for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def as_openpi(head: Pi0Head, prefix: str) -> dict[str, Tensor]:
    """The tensors of a head by the names that openpi's conversion and LeRobot give them, beside those of no use."""
    language = head.frozen["language"].module.language.state_dict()
    paligemma, expert = f"{prefix}paligemma_with_expert.paligemma.", f"{prefix}paligemma_with_expert.gemma_expert."
    tensors = {f"{paligemma}model.language_model.{name}": values for name, values in language.items()}
    tensors[f"{paligemma}lm_head.weight"] = tensors.pop(f"{paligemma}model.language_model.embed_tokens.weight")
    tensors[f"{paligemma}model.vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(3)
    tensors[f"{paligemma}model.multi_modal_projector.linear.bias"] = torch.zeros(3)
    tensors[f"{expert}lm_head.weight"] = torch.zeros(3, 3)
    for name, values in head.net.state_dict().items():
        tensors[f"{expert}model.{name[7:]}" if name.startswith("expert.") else f"{prefix}{name}"] = values
    return tensors


@pytest.fixture
def tiny_openpi(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let openpi's names of sizes stand for those of the tiny networks; return its config.json."""
    variants = {"gemma_2b": (64, 128, 2, 4, 1, 16), "gemma_300m": (32, 64, 2, 4, 1, 16)}
    monkeypatch.setattr(layouts, "VARIANTS", variants)
    monkeypatch.setattr(layouts, "PALIGEMMA_VOCABULARY", ByteTokenizer.size)
    return {"type": "whatever", "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_checkpoints_of_openpi_and_lerobot_load_whole(
    kind: str, prefix: str, tiny_openpi: dict[str, str], memory_path: Path
) -> None:
    source = head_of(kind, "random", 64)
    randomise(source.net)
    folder = save(memory_path / "weights", tiny_openpi, as_openpi(source, prefix))
    loaded = head_of(kind, folder, 64)
    assert loaded.frozen["language"].digest == source.frozen["language"].digest
    assert loaded.net.state_dict().keys() == source.net.state_dict().keys()
    for name, values in source.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], values), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("action_in_proj.bias"), "it lacks action_in_proj.bias"),
        (lambda t: t.pop("paligemma_with_expert.gemma_expert.model.norm.weight"), "it lacks expert.norm.weight"),
        (
            lambda t: t.pop("paligemma_with_expert.paligemma.model.language_model.norm.weight"),
            "it lacks norm.weight",
        ),
        (lambda t: t.update(surprise=torch.zeros(1)), "it has unexpected surprise"),
        (lambda t: t.update({"action_in_proj.bias": torch.zeros(5)}), r"action_in_proj.bias is \(5,\)"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_key(
    change: Callable[[dict[str, Tensor]], Any], says: str, tiny_openpi: dict[str, str], memory_path: Path
) -> None:
    tensors = as_openpi(head_of("pi0", "random", 64), "")
    change(tensors)
    folder = save(memory_path / "weights", tiny_openpi, tensors)
    with pytest.raises(DataError, match=says):
        _ = head_of("pi0", folder, 64).frozen["language"].module


def test_a_head_does_not_take_the_other_ones_expert(tiny_openpi: dict[str, str], memory_path: Path) -> None:
    folder = save(memory_path / "weights", tiny_openpi, as_openpi(head_of("pi05", "random", 64), ""))
    with pytest.raises(UsageError, match=r"holds an expert of pi05; expected one of pi0. Try: vla train-head pi05"):
        head_of("pi0", folder, 64)


def test_a_paligemma_brings_its_language_model_and_the_expert_is_fresh(published: Any, memory_path: Path) -> None:
    model = transformers.PaliGemmaForConditionalGeneration(published.config.vlm_config)
    randomise(model).save_pretrained(memory_path / "weights")
    head = head_of("pi05", memory_path / "weights", expert_width=32, expert_mlp=40)
    theirs = model.model.language_model.state_dict()
    ours = head.frozen["language"].module.language.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert head.parameter_counts()["language"][1] == 0


def test_of_a_checkpoint_no_vision_tower_is_read(folder: Path) -> None:
    """What has no place in the networks is not in them: their keys are those of language model and expert."""
    language = load_language(str(folder))
    assert not [name for name in language.state_dict() if "vision" in name or "projector" in name]
    tensors = load_file(folder / "model.safetensors")
    assert [name for name in tensors if "vision_tower" in name]


def test_a_model_of_another_kind_is_refused(memory_path: Path) -> None:
    folder = save(memory_path / "weights", {"model_type": "llava"}, {"a": torch.zeros(1)})
    with pytest.raises(DataError, match="holds a 'llava' model; expected model_type paligemma or pi0"):
        head_of("pi0", folder)
