"""`hier`, full: PaliGemma's language model and pi0.5's expert, tiny and random, over cached image tokens."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vla.heads import hier_full
from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.fast import FastTokenizer
from vla.heads.hier_full import FullLanguage, fast_ids
from vla.heads.model import HeadModel
from vla.heads.nets.pi0_expert import Pi05Net
from vla.heads.nets.prefix import PrefixModel
from vla.heads.pi0_weights import network_sizes
from vla.heads.prompts import action_prompt
from vla.pretrained.pi0 import gemma_config
from vla.stores.errors import UsageError

MakeBatch = Callable[..., Batch]
IO = HeadIO(
    action_dim=2,
    state_dim=3,
    state_names=("a", "b", "c"),
    features={"siglip": FeatureIO(shape=(2, 4, 64), dims=("token", "channel"))},
    tasks=("go there", "go away"),
    labels=(
        {"high_level_task": "reach it", "subtask": "go there"},
        {"high_level_task": "clear the table", "subtask": "go away"},
    ),
)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.fixture
def full(toy_batch: MakeBatch) -> Callable[..., Any]:
    """`full(**settings)`: a full head of tiny random networks with every statistic fitted, and gates awake."""

    def make(io: HeadIO = IO, **settings: Any) -> HeadModel:
        torch.manual_seed(0)
        values = {"variant": "full", "weights": "random", "horizon": 4, "n_action": 2, "max_subtask": 6, **settings}
        model = build_head("hier", values, io)
        sample = toy_batch(model, 64, seed=9)
        assert sample.action is not None
        assert sample.state is not None
        model.fit_normalisers(sample.action.flatten(0, 1).numpy(), sample.state.flatten(0, 1).numpy())
        for name, parameter in model.named_parameters():
            if "dense" in name:  # adaptive norms begin with gates of zero, which would hide the expert
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


def test_gap_4_keys_and_values_are_both_cut_off(full: Any, toy_batch: MakeBatch) -> None:
    """The action loss leaves no gradient at any parameter of the language model; that of the text reaches each."""
    model = full()
    batch = toy_batch(model)
    backward(model.outputs(batch).action.mean())
    assert all(p.grad is None for p in model.language.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.actor.parameters())
    (cache,) = model._context(batch, model._prompt(batch, action_prompt, ["go there"] * 8))
    assert not any(t.requires_grad for t in (*cache.keys, *cache.values))
    model.zero_grad()
    backward(model.outputs(batch).text.mean())
    for name, parameter in model.named_parameters():
        if name.startswith("language."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_actions_follow_what_the_language_model_sees(full: Any, toy_batch: MakeBatch) -> None:
    """Cut off from gradients, not from content: pictures and subtask change the chunk."""
    model = full()
    batch = dataclasses.replace(toy_batch(model), label=None)
    there = torch.tensor([model.tokenizer.encode("go there")] * 8)
    away = torch.tensor([model.tokenizer.encode("go away")] * 8)
    seen = {"siglip": batch.features["siglip"] + torch.randn_like(batch.features["siglip"])}
    chunks = [
        model.act(changed, torch.Generator().manual_seed(0))
        for changed in (
            dataclasses.replace(batch, plan=there),
            dataclasses.replace(batch, plan=away),
            dataclasses.replace(batch, plan=there, features=seen),
        )
    ]
    assert ((chunks[0] - chunks[1]).abs().amax((1, 2)) > 1e-4).all()
    assert ((chunks[0] - chunks[2]).abs().amax((1, 2)) > 1e-4).all()


def test_expert_mode_freezes_the_language_model_outside_of_the_checkpoint(full: Any, toy_batch: MakeBatch) -> None:
    model = full(mode="expert")
    assert model.frozen.keys() == {"language", "tokenizer"}
    assert not [name for name in model.state_dict() if "language" in name]
    backward(model.loss(toy_batch(model))[0])
    assert all(p.grad is None and not p.requires_grad for p in model.frozen["language"].module.parameters())
    assert full(mode="expert").frozen["language"].digest == model.frozen["language"].digest
    assert full(mode="expert", seed=1).frozen["language"].digest != model.frozen["language"].digest
    counts = model.parameter_counts()
    assert counts["language"][1] == 0
    assert counts["actor"][0] == counts["actor"][1] > 0


def test_high_level_mode_of_the_full_variant_has_no_expert(full: Any, toy_batch: MakeBatch) -> None:
    model = full(mode="high-level")
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"language"}
    assert model.loss(toy_batch(model))[1].keys() == {"text_loss"}


def test_gap_10_actions_are_padded_to_the_width_of_the_projections(toy_batch: MakeBatch) -> None:
    """What the padded outputs say counts for nothing: their weights get no gradient."""
    net = Pi05Net(gemma_config(32, 64, 2, 4, 1, 16), 2, 32)
    torch.nn.init.normal_(net.expert.norm.dense.weight, std=0.3)
    assert net.action_in_proj.in_features == net.action_out_proj.out_features == 32
    prefix = PrefixModel(gemma_config(64, 128, 2, 4, 1, 16, vocab_size=9))
    cache = prefix(torch.randn(3, 5, 64), torch.ones(3, 5, dtype=torch.bool)).detach()
    x, t = torch.randn(3, 4, 2), torch.rand(3)
    velocity = net(x, t, cache)
    assert velocity.shape == (3, 4, 2)
    backward(velocity.sum())
    gradient = net.action_out_proj.weight.grad
    assert gradient is not None
    assert gradient[:2].abs().sum() > 0
    assert (gradient[2:] == 0).all()


def test_more_actions_than_the_projections_hold_are_refused() -> None:
    io = IO.model_copy(update={"action_dim": 33})
    with pytest.raises(UsageError, match="33 actions; expected at most 32"):
        build_head("hier", {"variant": "full", "weights": "random"}, io)


def test_the_full_variant_learns_to_say_the_subtask(full: Any, toy_batch: MakeBatch) -> None:
    model = full(max_subtask=12)
    batch = toy_batch(model)
    assert batch.action is not None
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    model.eval()
    asked = dataclasses.replace(batch, label=None, action=None, action_valid=None)
    assert model.subtasks(asked) == [IO.labels[label]["subtask"] for label in batch.label.tolist()]


def test_a_sample_does_not_depend_on_how_much_its_prompt_is_padded(full: Any, toy_batch: MakeBatch) -> None:
    """Prompts of other lengths beside it: states of one to three digits, tasks of two to three words."""
    model = full()
    batch = dataclasses.replace(toy_batch(model), label=None, action=None, action_valid=None)
    assert batch.state is not None
    noise = torch.randn(8, 4, 2)

    def sampled(rows: slice) -> Tensor:
        part = Batch(
            features={"siglip": batch.features["siglip"][rows]},
            state=batch.state[rows],
            task=batch.task[rows],
            obs_valid=batch.obs_valid[rows],
        )
        context = model._context(part, model._prompt(part, action_prompt, model.subtasks(part)))
        velocity: Tensor = model.net(noise[rows], torch.full((len(part),), 0.5), *context)
        return velocity

    together = sampled(slice(0, 8))
    for row in range(8):
        torch.testing.assert_close(sampled(slice(row, row + 1)), together[row : row + 1], atol=1e-5, rtol=1e-4)


def test_fast_ids_end_before_the_segmentation_tokens_as_in_openpi(tmp_path: Path) -> None:
    assert fast_ids("random", 259, 3).tolist() == [259, 260, 261]
    folder = paligemma(tmp_path / "weights", vocabulary=400)
    assert fast_ids(str(folder), 259, 3).tolist() == [400 - 1 - 128, 400 - 2 - 128, 400 - 3 - 128]


def test_fast_mode_of_the_full_variant_says_chunks(full: Any, toy_batch: MakeBatch, tmp_path: Path) -> None:
    plain = full()
    batch = toy_batch(plain)
    FastTokenizer.fit(plain.labels(batch).numpy(), vocab_size=200).save(tmp_path / "fast")
    model = full(mode="fast", fast=str(tmp_path / "fast"))
    assert model.act(dataclasses.replace(batch, label=None)).shape == (8, 4, 2)
    assert model.language.model.config.vocab_size == 259 + model.fast.size
    assert {"text_loss", "fast_loss", "fast_saturated"} == model.loss(batch)[1].keys()
    assert {"fast", "tokenizer"} == model.frozen.keys()
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps([1000 + i for i in range(model.fast.size)]))
    moved = full(mode="fast", fast=str(tmp_path / "fast"), fast_mapping=str(mapping))
    assert moved.language.model.config.vocab_size == 1000 + model.fast.size
    assert moved.frozen["fast"].digest != model.frozen["fast"].digest


def paligemma(folder: Path, vocabulary: int = 300) -> Path:
    """Save a checkpoint in PaliGemma's layout, its language model tiny."""
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": vocabulary, "model_type": "gemma"}
    values = {"model_type": "paligemma", "text_config": text, "projection_dim": 64}
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(7)
    model = PrefixModel(gemma_config(64, 128, 2, 4, 1, 16, vocab_size=vocabulary))
    tensors = {f"language_model.model.{name}": value for name, value in model.language.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_published_weights_are_taken_and_new_ids_begin_as_their_mean(full: Any, tmp_path: Path) -> None:
    """`prepare` takes them before the first step; a checkpoint holds them from then on."""
    folder = paligemma(tmp_path / "weights")
    config = full().config.model_copy(update={"weights": str(folder)})
    language = FullLanguage(config, IO, words=305)
    before = copy.deepcopy(language.state_dict())
    table = language.load().state_dict()["model.language.embed_tokens.weight"]
    assert table.shape == (305, 64)
    torch.testing.assert_close(table[300:], table[:300].mean(0).expand(5, -1))
    assert not torch.equal(before["model.language.embed_tokens.weight"], table)


def test_image_tokens_of_another_width_are_refused(full: Any) -> None:
    features = {"siglip": FeatureIO(shape=(1, 4, 48), dims=("token", "channel"))}
    with pytest.raises(UsageError, match="48 wide and the language model 64"):
        full(io=IO.model_copy(update={"features": features}))


def test_the_full_variant_names_the_backbone_that_it_needs() -> None:
    io = IO.model_copy(update={"features": {}})
    with pytest.raises(UsageError, match="vla featurize --backbone siglip-prefix"):
        build_head("hier", {"variant": "full", "weights": "random"}, io)


def test_a_checkpoint_of_pi0_is_refused_for_its_norms(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dataclasses.replace(network_sizes("random"), adaptive=False)
    monkeypatch.setattr(hier_full, "network_sizes", lambda weights: sizes)
    with pytest.raises(UsageError, match=r"no adaptive norms.*pi05_base"):
        full()


@pytest.mark.parametrize(("mode", "loaded"), [("joint", ["language", "expert"]), ("high-level", ["language"])])
def test_published_weights_are_loaded_for_what_the_mode_trains(
    mode: str, loaded: list[str], full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    model = full(mode=mode)
    monkeypatch.setattr(FullLanguage, "load", lambda self: asked.append("language"))
    monkeypatch.setattr(hier_full, "load_expert", lambda net, weights: asked.append("expert"))
    hier_full.load_full(model.language, model.actor)
    assert asked == loaded
