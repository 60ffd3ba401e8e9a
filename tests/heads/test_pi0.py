"""pi0 and pi0.5: what trains, what they read, what switches them, and a second implementation of pi0.5's numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.model import HeadModel
from vla.heads.pi0 import Pi0Head, export_prefix
from vla.heads.prompts import ByteTokenizer, tokenise
from vla.stores.errors import UsageError

MakeHead = Callable[..., Any]
MakeBatch = Callable[..., Batch]
IMAGES = {"siglip": FeatureIO(shape=(2, 16, 64), dims=("token", "channel"))}
RAYS = {"ray": FeatureIO(shape=(2, 4, 4, 6), dims=("y", "x", "channel"))}


def io_of(**changes: Any) -> HeadIO:
    return HeadIO(**{"action_dim": 2, "state_dim": 3, "features": IMAGES, "tasks": ("go",), **changes})


def built(kind: str = "pi0", io: HeadIO | None = None, **settings: Any) -> HeadModel:
    return build_head(kind, {"weights": "random", **settings}, io or io_of())


def act(model: HeadModel, batch: Batch) -> Tensor:
    return model.act(batch, torch.Generator().manual_seed(0))


# What trains.


@pytest.mark.parametrize(("name", "own"), [("pi0-rays", "state_proj action_time_mlp"), ("pi05-rays", "time_mlp")])
def test_only_adapter_expert_and_projections_train(
    name: str, own: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """All of them, and nothing of the language model, to which the action's gradient must not get."""
    model: Pi0Head = awake_head(name).train()
    language = model.frozen["language"].module
    before = model.frozen["language"].digest
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.loss(toy_batch(model))[0].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    tops = {".".join(n.split(".")[:2]) for n in trained}
    mlps = {f"net.{word}_{end}" for word in own.split() if "mlp" in word for end in ("in", "out")}
    mlps |= {"net.state_proj"} if "state_proj" in own else set()
    assert tops == {"geometry.alpha", "geometry.project", "net.action_in_proj", "net.action_out_proj"} | mlps | {
        "net.expert"
    }
    assert trained == [n for n, _ in model.named_parameters()]
    assert all(p.grad is None and not p.requires_grad for p in language.parameters())
    del model.frozen["language"].__dict__["digest"]
    assert model.frozen["language"].digest == before
    assert not [key for key in model.state_dict() if "language" in key]
    assert model.parameter_counts()["language"][1] == 0


def test_the_adapter_is_clipped_and_stepped_with_all_else(toy_head: MakeHead) -> None:
    """The origin's had a group of its own, outside the clipping of gradients and their exchange between processes."""
    model = toy_head("pi0-rays")
    assert model.param_groups(1e-3) is None  # one group, of all parameters
    assert {"geometry.alpha", "geometry.project.weight"} < {name for name, _ in model.named_parameters()}


def test_a_language_model_that_is_asked_to_trains_and_is_in_the_checkpoint(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """All of it but what no key or value depends on."""
    model = awake_head("pi0-rays", freeze_language_model=False)
    assert model.frozen == {}
    model.loss(toy_batch(model))[0].backward()
    frozen = {n.removeprefix("language.language.") for n, p in model.named_parameters() if not p.requires_grad}
    last = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    wanted = {f"layers.1.{part}.weight" for part in (*last, "post_attention_layernorm")} | {"norm.weight"}
    assert frozen == wanted
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert "language.language.embed_tokens.weight" in model.state_dict()


def test_dimensions_up_to_those_of_the_checkpoint_are_zeros_and_cost_nothing(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head("pi0-rgb")
    model.loss(toy_batch(model))[0].backward()
    net = model.net
    assert net.action_out_proj.out_features == net.action_in_proj.in_features == 32
    assert not net.action_out_proj.weight.grad[2:].any()
    assert not net.action_in_proj.weight.grad[:, 2:].any()
    assert not net.state_proj.weight.grad[:, 3:].any()


# What is read.


def test_without_the_geometry_prefix_neither_rays_nor_adapter_are_needed() -> None:
    model = built()
    assert model.reads == {"siglip": 1}
    assert model.geometry is None


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_missing_ray_is_an_error_that_names_head_and_command(kind: str) -> None:
    """The origin logged "Geometry prefix skipped" and trained without."""
    wanted = rf"head '{kind}' needs the feature 'ray', and .* they hold siglip; .* --backbone da3"
    with pytest.raises(UsageError, match=wanted):
        built(kind, use_geom_prefix=True)


def test_a_geometry_prefix_changes_what_is_done_and_is_part_of_the_loss(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head("pi0-rays")
    batch = toy_batch(model)
    other = dataclasses.replace(batch, features={**batch.features, "ray": batch.features["ray"] + 1})
    assert (act(model, other) - act(model, batch)).abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("which", ["pi0-rays", "pi05-rays"])
def test_the_prefix_is_computed_once_for_a_decision(which: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(which, sample_steps=7)
    calls = []
    model.frozen["language"].module.register_forward_hook(lambda *_: calls.append(1))
    steps = []
    model.net.register_forward_hook(lambda *_: steps.append(1))
    act(model, toy_batch(model))
    assert (len(calls), len(steps)) == (1, 7)


@pytest.mark.parametrize("name", ["pi0-rays", "pi05-rays"])
def test_neither_longer_prompts_nor_other_images_of_batch_mates_change_an_action(
    name: str, awake_head: MakeHead, toy_batch: MakeBatch, rows_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla.heads.flow.noise_like", lambda shape, reference, _: torch.ones(shape))
    io = io_of(features=IMAGES | RAYS, tasks=("go", "take the very last of all the cups from the long table"))
    model = awake_head(name, io=io, max_tokens=200)
    batch = toy_batch(model)
    both = dataclasses.replace(batch, task=torch.arange(8) % 2)
    short = rows_of(both, torch.tensor([0]))
    torch.testing.assert_close(model.act(short), model.act(both)[:1], atol=2e-5, rtol=1e-5)


def test_image_tokens_that_are_padding_change_no_action(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    masked = {"siglip": IMAGES["siglip"].model_copy(update={"masked": True})}
    model = awake_head("pi0-rgb", io=io_of(features=masked))
    batch = toy_batch(model)
    valid = batch.feature_valid["siglip"].clone()
    valid[..., 9:] = False
    batch = dataclasses.replace(batch, task=torch.zeros(8, dtype=torch.int64), feature_valid={"siglip": valid})
    other = batch.features["siglip"].clone()
    other[..., 9:, :] = 40
    wanted = act(model, batch)
    torch.testing.assert_close(act(model, dataclasses.replace(batch, features={"siglip": other})), wanted)
    other[..., :9, :] = 40
    assert (act(model, dataclasses.replace(batch, features={"siglip": other})) - wanted).abs().max() > 1e-3


def test_geometry_of_the_cameras_that_are_named_alone_is_used(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """The origin had the key of one camera in its code."""
    model = awake_head("pi0-rays", geom_views=[1])
    batch = toy_batch(model)
    assert export_prefix(model, batch)[0].shape == (8, 16, 64)
    for view, same in ((0, True), (1, False)):
        rays = batch.features["ray"].clone()
        rays[:, :, view] += 1
        changed = export_prefix(model, dataclasses.replace(batch, features={**batch.features, "ray": rays}))[0]
        assert torch.equal(changed, export_prefix(model, batch)[0]) == same


def test_pi05_reads_the_state_in_its_prompt_and_nowhere_else(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("pi05-rays")
    batch = toy_batch(model)
    assert not [name for name, _ in model.net.named_parameters() if "state" in name]
    assert batch.state is not None
    words = model.prompts(batch)[0]
    assert words.startswith(f"Task: {model.io.tasks[int(batch.task[0])]}, State: ")
    assert words.endswith(";\nAction: ")
    bins = [int(word) for word in words.partition("State: ")[2].partition(";")[0].split()]
    normed = model.state(batch.state[0, -1]).double()
    assert bins == [min(max(math.floor((x + 1) * 128), 0), 255) for x in normed.tolist()]
    # The same bins, the same actions: what the words do not say is not read.
    within = (torch.tensor(bins) + 0.5) / 128 - 1
    middle = dataclasses.replace(batch, state=torch.cat([model.state.inverse(within)[None, None], batch.state[1:]]))
    assert torch.equal(act(model, middle), act(model, batch))
    moved = dataclasses.replace(batch, state=batch.state + model.state.scale)
    assert (act(model, moved) - act(model, batch)).abs().max() > 1e-3


def test_pi05_can_do_without_a_state(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("pi05-rays", discrete_state=False)
    batch = dataclasses.replace(toy_batch(model), state=None)
    assert model.columns == ()
    assert model.prompts(batch)[0] in ("go there\n", "go away\n")
    assert act(model, batch).isfinite().all()


# Switches.


@pytest.mark.parametrize("name", ["freeze_vision_tower", "freeze_geom_model"])
def test_what_a_cache_has_frozen_is_not_unfrozen(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = False: .*the store holds what that network made"):
        built("pi0", None, **{name: False})


@pytest.mark.parametrize(
    ("io", "settings", "says"),
    [
        (
            {"features": IMAGES | {"ray": FeatureIO(shape=(1, 4, 4, 7), dims=("y", "x", "channel"))}},
            {},
            "channels last",
        ),
        ({"features": IMAGES | RAYS}, {"geom_views": [2]}, r"geom_views \[2\] of 2 cameras; expected positions 0 to 1"),
        ({"features": IMAGES | RAYS}, {"geom_target_hw": [0, 4]}, "rows and columns"),
        (
            {"features": RAYS | {"siglip": FeatureIO(shape=(1, 4, 2048), dims=("token", "channel"))}},
            {},
            "'siglip' is 2048 wide, the language model of random 64",
        ),
        ({"features": IMAGES | RAYS, "action_dim": 33}, {}, "actions of 33 dimensions; expected at most 32"),
        ({"features": IMAGES | RAYS, "state_dim": 40}, {}, "states of 40 dimensions; expected at most 32"),
        ({"features": IMAGES | RAYS, "tasks": ()}, {}, "no instruction"),
    ],
)
def test_what_does_not_fit_is_refused(io: dict[str, Any], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        built("pi05", io_of(**io), use_geom_prefix=True, **settings)


def test_the_prefix_can_be_left_out_of_a_trained_head_and_its_feature_with_it(
    awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """The comparison that the design asks for, in evaluation and rollout: `--set model.use_geom_prefix=false`."""
    model = awake_head("pi0-rays")
    batch = toy_batch(model)
    whole = act(model, batch)
    model.adjust({"use_geom_prefix": False, "sample_steps": 3})
    assert model.reads == {"siglip": 1}
    blind = act(model, dataclasses.replace(batch, features={"siglip": batch.features["siglip"]}))
    assert (blind - whole).abs().max() > 1e-4
    with pytest.raises(UsageError, match="no geometry prefix"):
        export_prefix(model, batch)
    model.adjust({"use_geom_prefix": True, "sample_steps": 10})
    assert torch.equal(act(model, batch), whole)


def test_a_trained_head_is_told_what_cannot_be_changed(toy_head: MakeHead) -> None:
    model = toy_head("pi0-rgb")
    with pytest.raises(UsageError, match="trained without a geometry prefix"):
        model.adjust({"use_geom_prefix": True})
    with pytest.raises(UsageError, match=r"model.horizon is decided in training; expected one of n_action, sample"):
        model.adjust({"horizon": 9})
    with pytest.raises(UsageError, match="n_action 9 of horizon 4"):
        model.adjust({"n_action": 9})
    with pytest.raises(UsageError, match="sample_steps = 0"):
        model.adjust({"sample_steps": 0})
    with pytest.raises(UsageError, match="decided in training; expected one of n_action"):
        toy_head("mlp").adjust({"hidden": 3})


@pytest.mark.parametrize("name", ["pi0-rays", "pi05-rays"])
def test_the_prefix_is_exported_for_other_policies(name: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """`extra_prefix_embs`, `extra_pad_masks`, `extra_att_masks`: of the head as it acts, ready to be concatenated."""
    model = awake_head(name, geom_alpha_warmup=5).train()
    model.geometry.seen.fill_(5)
    batch = toy_batch(model)
    tokens, pad, att = export_prefix(model, batch)
    assert tokens.shape == (8, 32, 64)
    assert tokens.dtype == torch.float32
    assert not tokens.requires_grad
    assert (pad.dtype, att.dtype, pad.shape, att.shape) == (torch.bool, torch.bool, (8, 32), (8, 32))
    assert pad.all()
    assert not att.any()
    rays = batch.features["ray"][:, 0].float().flatten(1, 3)
    torch.testing.assert_close(tokens, model.geometry.project(rays) * model.geometry.alpha)
    assert int(model.geometry.seen) == 5


def test_a_head_without_a_prefix_has_none_to_export(toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model: Any = toy_head("mlp")
    with pytest.raises(UsageError, match="head 'mlp' has no prefix to export; expected a pi0 or pi05 head"):
        export_prefix(model, toy_batch(model))


# pi0.5 once more, as openpi runs it: prefix and expert side by side, one attention over both, in plain tensors.


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def attend(sides: list[tuple[Any, Tensor]], rotary: Any, positions: Tensor, seen: Tensor) -> list[Tensor]:
    """One softmax over the tokens of both networks; each projects its own."""
    queries, keys, values = (
        torch.cat(
            [part(layer)(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer, x in sides],
            dim=2,
        )
        for part in (lambda a: a.q_proj, lambda a: a.k_proj, lambda a: a.v_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary(queries[:, 0], positions))
    scores = queries @ keys.transpose(2, 3) / 4
    mixed = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1) @ values
    lengths = [x.shape[1] for _, x in sides]
    return [
        layer.o_proj(part)
        for (layer, _), part in zip(sides, mixed.transpose(1, 2).flatten(2).split(lengths, 1), strict=True)
    ]


def velocity_of_openpi(model: Pi0Head, embeddings: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    net: Any = model.net
    language = model.frozen["language"].module.language
    B, L, H = len(x_t), embeddings.shape[1], x_t.shape[1]
    periods = 4e-3 * 1000 ** torch.linspace(0, 1, 16)
    angle = 2 * math.pi * t[:, None] / periods
    times = torch.cat([angle.sin(), angle.cos()], dim=1)
    condition = F.silu(net.time_mlp_out(F.silu(net.time_mlp_in(times))))
    actions = net.action_in_proj(F.pad(x_t, (0, 30)))
    seen = torch.ones(B, L + H, L + H, dtype=torch.bool)
    seen[:, :L, L:] = False
    positions = torch.arange(L + H).expand(B, -1)

    def adaptive(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = norm.dense(condition)[:, None].chunk(3, dim=-1)
        return rms(x) * (1 + scale) + shift, gate

    for ours, theirs in zip(language.layers, net.expert.layers, strict=True):
        normed = rms(embeddings) * (1 + ours.input_layernorm.weight)
        conditioned, gate = adaptive(theirs.input_layernorm, actions)
        sides = [(ours.self_attn, normed), (theirs.self_attn, conditioned)]
        first, second = attend(sides, language.rotary_emb, positions, seen)
        embeddings, actions = embeddings + first, actions + second * gate
        embeddings = embeddings + ours.mlp(rms(embeddings) * (1 + ours.post_attention_layernorm.weight))
        conditioned, gate = adaptive(theirs.post_attention_layernorm, actions)
        actions = actions + theirs.mlp(conditioned) * gate
    return net.action_out_proj(adaptive(net.expert.norm, actions)[0])[..., :2]  # type: ignore[no-any-return]


def test_pi05_says_what_prefix_and_expert_say_side_by_side(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """A second implementation, without a cache, of one attention over both networks (openpi's `forward`)."""
    model = awake_head("pi05-rays", io=io_of(features=IMAGES | RAYS))
    batch = dataclasses.replace(toy_batch(model, count=2), task=torch.zeros(2, dtype=torch.int64))
    batch = dataclasses.replace(batch, state=torch.zeros(2, 1, 3))  # prompts of one length: nothing is padded
    ids, valid, _ = tokenise(model.prompts(batch), ByteTokenizer(), max_length=200)
    assert valid.all()
    language = model.frozen["language"].module
    images = batch.features["siglip"][:, 0].flatten(1, 2).float()
    embeddings = torch.cat([images, language.language.embed_tokens.weight[ids] * 8, export_prefix(model, batch)[0]], 1)
    x_t, t = torch.randn(2, 4, 2), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        got = model.velocity(batch)(x_t, t)
        wanted = velocity_of_openpi(model, embeddings, x_t, t)
    assert wanted.std() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
