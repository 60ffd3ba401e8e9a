"""Observation encoders: where things are is kept, what is padded is left out, and every input counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.encoders import (
    AttentionReader,
    EncoderConfig,
    KeypointReader,
    ObservationEncoder,
    ProjectionReader,
    module_key,
)
from vla.heads.model import HeadModel
from vla.stores.errors import DataError, UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
KINDS = ["keypoints", "attention", "projection"]
TOKENS = FeatureIO(shape=(2, 5, 3), dims=("token", "channel"))


def encode(model: HeadModel, batch: Batch) -> Tensor:
    """What the head is conditioned on, [B, numbers]."""
    if hasattr(model.encoder, "mix"):
        return model.encoder.frames(batch).detach().flatten(1)
    return model.encoder.tokens(batch)[0].detach().flatten(1)


def with_grid(batch: Batch, grid: Tensor) -> Batch:
    return dataclasses.replace(batch, features={"grid": grid})


def scaled(reader: Any, channels: int = 3) -> Any:
    reader.scaler.fit(np.zeros(channels), np.ones(channels))
    return reader.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["mlp", "fm-expert"])
def test_swapping_two_cells_changes_the_encoding(
    kind: str, head: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = toy_head(head, encoder={"kind": kind})
    batch = with_grid(toy_batch(model), torch.randn(8, 1, 2, 4, 4, 3))
    swapped = batch.features["grid"].clone()
    swapped[:, :, 0, [0, 3], [1, 2]] = swapped[:, :, 0, [3, 0], [2, 1]]
    change = (encode(model, with_grid(batch, swapped)) - encode(model, batch)).abs().amax(1)
    assert (change > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_of_an_object_is_encoded_differently(kind: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("mlp", encoder={"kind": kind, "use_state": False, "use_task": False})
    batch = toy_batch(model, 16)
    grid = torch.zeros(16, 1, 2, 16, 3)
    grid[torch.arange(16), :, 0, torch.arange(16)] = 3.0
    encoded = encode(model, with_grid(batch, grid.reshape(16, 1, 2, 4, 4, 3)))
    apart = torch.cdist(encoded, encoded) + torch.eye(16) * 1e9
    assert apart.min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_thing_in_another_view_is_encoded_differently(
    kind: str, awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head("mlp", encoder={"kind": kind})
    batch = toy_batch(model)
    change = encode(model, with_grid(batch, batch.features["grid"].flip(2))) - encode(model, batch)
    assert (change.abs().amax(1) > 1e-3).all()


def test_a_keypoint_is_the_place_of_its_cell() -> None:
    """x and y in [-1, 1], the centres of the first and last cell; then how strongly it was found."""
    io = FeatureIO(shape=(1, 3, 5, 3), dims=("y", "x", "channel"))
    reader = scaled(KeypointReader(EncoderConfig(queries=1), io))
    with torch.no_grad():
        reader.heat.copy_(torch.tensor([[[0.0, 1.0, 0.0]]]))
    for row, column in [(0, 0), (0, 4), (2, 0), (1, 2), (2, 3)]:
        feature = torch.zeros(1, 1, 1, 3, 5, 3)
        feature[..., row, column, 1] = 30.0
        wanted = torch.tensor([-1 + column / 2, -1.0 + row, 1.0])
        torch.testing.assert_close(reader(feature).flatten(), wanted, atol=1e-4, rtol=0)


def test_a_keypoint_between_two_equal_cells_is_half_way() -> None:
    io = FeatureIO(shape=(1, 3, 5, 3), dims=("y", "x", "channel"))
    reader = scaled(KeypointReader(EncoderConfig(queries=1), io))
    with torch.no_grad():
        reader.heat.copy_(torch.ones(1, 1, 3))
    feature = torch.zeros(1, 1, 1, 3, 5, 3)
    feature[..., 0, 0, :] = feature[..., 2, 4, :] = 10.0
    torch.testing.assert_close(reader(feature).flatten()[:2], torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_attention_over_projected_cells(masked: bool) -> None:
    """softmax(q K^T / sqrt(d)) V with V = W x + b + position, K = V key^T, written without the shortcut."""
    reader = scaled(AttentionReader(EncoderConfig(queries=4), TOKENS))
    feature = torch.randn(2, 3, 2, 5, 3)
    valid = torch.rand(2, 3, 2, 5) > 0.4 if masked else torch.ones(2, 3, 2, 5, dtype=torch.bool)
    valid[..., 0] = True
    cells = reader.cell(feature) + reader.position
    wanted = torch.nn.functional.scaled_dot_product_attention(
        reader.queries.expand(2, 3, -1, -1, -1), reader.key(cells), cells, attn_mask=valid[..., None, :]
    )
    out = reader(feature, valid if masked else None)
    torch.testing.assert_close(out, wanted.flatten(2, 3), atol=1e-5, rtol=1e-4)


def test_attention_never_looks_at_padded_tokens() -> None:
    reader = scaled(AttentionReader(EncoderConfig(queries=4), TOKENS))
    feature, valid = torch.randn(2, 1, 2, 5, 3), torch.ones(2, 1, 2, 5, dtype=torch.bool)
    valid[..., 3:] = False
    other = feature.clone()
    other[..., 3:, :] = 1e4
    assert torch.equal(reader(feature, valid), reader(other, valid))
    assert not torch.equal(reader(feature), reader(other))


@pytest.mark.parametrize("kind", ["keypoints", "projection"])
def test_only_attention_takes_a_varying_number_of_tokens(kind: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = toy_head("mlp", encoder={"kind": kind})
    batch = dataclasses.replace(toy_batch(model), feature_valid={"grid": torch.ones(8, 1, 2, 16, dtype=torch.bool)})
    with pytest.raises(DataError, match="kind=attention"):
        encode(model, batch)


def test_the_way_of_reading_follows_the_layout() -> None:
    features = {
        "grid": FeatureIO(shape=(2, 4, 4, 3), dims=("y", "x", "channel")),
        "tokens": TOKENS,
        "vector": FeatureIO(shape=(1, 6), dims=("channel",)),
    }
    encoder = ObservationEncoder(EncoderConfig(), HeadIO(action_dim=2, features=features), 1)
    kinds = {name: type(reader) for name, reader in encoder.readers.items()}
    assert kinds == {"grid": KeypointReader, "tokens": AttentionReader, "vector": ProjectionReader}


def test_keypoints_refuse_tokens() -> None:
    with pytest.raises(UsageError, match="need a grid"):
        ObservationEncoder(EncoderConfig(kind="keypoints"), HeadIO(action_dim=2, features={"fine": TOKENS}), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_in_training_only(kind: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("mlp", encoder={"kind": kind, "noise": 0.3})
    batch = toy_batch(model)
    assert torch.equal(encode(model, batch), encode(model, batch))
    model.train()
    assert not torch.equal(encode(model, batch), encode(model, batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_leaves_the_batch_as_it_was(
    kind: str, dtype: torch.dtype, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Features share memory with the loader's ring."""
    model = toy_head("mlp", encoder={"kind": kind, "noise": 0.3}).train()
    batch = toy_batch(model)
    batch = with_grid(batch, batch.features["grid"].to(dtype))
    before = batch.features["grid"].clone()
    encode(model, batch)
    assert torch.equal(batch.features["grid"], before)


def test_instructions_give_different_actions(every_told: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(every_told)
    batch = toy_batch(model)
    chunks = [
        model.act(dataclasses.replace(batch, task=torch.full((8,), task), label=None), torch.Generator().manual_seed(0))
        for task in (0, 1)
    ]
    assert ((chunks[0] - chunks[1]).abs().amax((1, 2)) > 1e-4).all()


def test_every_observed_frame_and_the_state_count(every: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head(every, n_obs=2)
    batch = toy_batch(model)
    acted = model.act(batch, torch.Generator().manual_seed(0))
    assert batch.state is not None
    name, frames = next(iter(model.reads.items()))
    history = every.startswith("track")  # of the coarse tokens: the present frame counts by its fine ones
    for frame in range(-frames, -1 if history else 0):  # pi0 reads the present one alone
        feature, state = batch.features[name].clone(), batch.state.clone()
        feature[:, frame] += torch.randn(8, *feature.shape[2:]).half()
        # Where the state is words of a prompt, the present one is told.
        state[:, -1 if every.startswith("hier") else frame] += 1
        shown = dataclasses.replace(batch, features={**batch.features, name: feature})
        for changed in (shown, dataclasses.replace(batch, state=state)) if model.columns else (shown,):
            chunk = model.act(changed, torch.Generator().manual_seed(0))
            assert ((chunk - acted).abs().amax((1, 2)) > 3e-5).all()


def test_an_expert_never_attends_to_frames_before_the_episode(awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    model = awake_head("fm-expert", n_obs=2)
    batch = toy_batch(model)
    assert batch.state is not None
    grid, state = batch.features["grid"].clone(), batch.state.clone()
    grid[:, 0] = 50.0
    state[:, 0] = -50.0
    for valid, equal in ((False, True), (True, False)):
        obs_valid = torch.tensor([[valid, True]]).expand(8, 2)
        chunks = [
            model.act(dataclasses.replace(b, obs_valid=obs_valid), torch.Generator().manual_seed(0))
            for b in (batch, dataclasses.replace(batch, features={"grid": grid}, state=state))
        ]
        assert torch.equal(*chunks) == equal


@pytest.mark.parametrize("chosen", [("b",), (1,), ("b", 1)])
def test_state_columns_that_were_not_chosen_do_not_matter(
    chosen: tuple[int | str, ...], awake_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model = awake_head("mlp", encoder={"state_columns": chosen})
    batch = toy_batch(model)
    assert batch.state is not None
    encoded = encode(model, batch)
    for column, counts in enumerate((False, True, False)):
        state = batch.state.clone()
        state[..., column] += 1
        assert torch.equal(encode(model, dataclasses.replace(batch, state=state)), encoded) != counts


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"state_columns": ("gripper_opn",)}, "did you mean 'gripper_open'"),
        ({"state_columns": (3,)}, "state column 3; expected 0 to 1"),
        ({"state_columns": (-1,)}, "state column -1"),
        ({"use_features": False, "use_state": False}, "no input"),
        ({"use_features": False, "state_columns": ()}, "no input"),
    ],
)
def test_inputs_that_are_not_there_are_refused(values: dict[str, Any], says: str) -> None:
    io = HeadIO(action_dim=2, state_dim=2, state_names=("x", "gripper_open"), features={"fine": TOKENS})
    with pytest.raises(UsageError, match=says):
        ObservationEncoder(EncoderConfig(**values), io, 1)


def test_a_single_instruction_is_not_read(toy_io: HeadIO, toy_head: MakeHead) -> None:
    assert toy_head("mlp", fitted=False).encoder.task is not None
    assert toy_head("mlp", fitted=False, io=toy_io.model_copy(update={"tasks": ("go",)})).encoder.task is None
    assert toy_head("mlp", fitted=False, encoder={"use_task": False}).encoder.task is None


@pytest.mark.parametrize(
    ("head", "features", "encoder", "says"),
    [
        ("hier-expert", False, {}, r"no feature, and no state is read here; expected a feature.*--features NAME"),
        ("mlp", False, {"use_state": False}, r"no feature, and no state is read here.*--features NAME"),
        ("mlp", True, {"use_state": False, "use_features": False}, r"--set model\.encoder\.use_features=true"),
    ],
)
def test_a_head_without_input_says_which_one_it_lacks(
    head: str, features: bool, encoder: dict[str, Any], says: str, toy_head: MakeHead, toy_io: HeadIO
) -> None:
    """`hier` reads the state in its prompt: a state alone was called no input at all."""
    io = toy_io if features else toy_io.model_copy(update={"features": {}})
    with pytest.raises(UsageError, match=says):
        toy_head(head, io=io, encoder=encoder, fitted=False)


@pytest.mark.parametrize("name", ["mlp", "fm-expert"])
@pytest.mark.parametrize("feature", ["obs.feat", "values", "type", "training", "%2E"])
def test_a_feature_may_have_any_name(name: str, feature: str, toy_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Keys of torch's ModuleDict are attributes: a dot, or the name of a method, was a KeyError."""
    plain = toy_head(name)
    io = plain.io.model_copy(update={"features": {feature: plain.io.features["grid"]}})
    model = toy_head(name, io=io, fitted=False)
    weights = {key.replace("grid", module_key(feature)): value for key, value in plain.state_dict().items()}
    model.load_state_dict(weights)
    batch = toy_batch(plain)
    named = dataclasses.replace(batch, features={feature: batch.features["grid"]})
    acted = [one.act(seen, torch.Generator().manual_seed(0)) for one, seen in ((plain, batch), (model, named))]
    assert torch.equal(*acted)


def test_features_of_ordinary_names_keep_their_keys_in_checkpoints() -> None:
    names = ("grid", "mean_croco", "obs.feat", "obs%2Efeat", "%obs%2Efeat", "values", "%values")
    keys = [module_key(name) for name in names]
    assert keys[:2] == ["grid", "mean_croco"]
    assert len(set(keys)) == len(names)
