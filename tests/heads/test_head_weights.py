"""A head is its name, its settings and its tensors: those bring it back exactly, and less than those is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.heads.batch import Batch, HeadIO
from vla.heads.checkpoint import build_head
from vla.heads.model import HeadModel
from vla.heads.nets.instructions import Instructions
from vla.heads.normalize import ChannelScaler, Normalizer
from vla.heads.registry import HEADS, SUMMARIES, head_class
from vla.stores.errors import CheckpointError, UsageError

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
FITTED = (Normalizer, ChannelScaler, Instructions)
"""What is fitted before training and refuses to work until then."""


@pytest.mark.parametrize("kind", ["auto", "attention", "projection"])
def test_weights_through_a_file_give_the_same_actions(
    every: str, kind: str, awake_head: MakeHead, toy_head: MakeHead, toy_batch: MakeBatch, memory_path: Path
) -> None:
    """Normalisers, scales and projections travel among them."""
    model, other = awake_head(every, encoder={"kind": kind}), toy_head(every, encoder={"kind": kind}, fitted=False)
    save_file(model.state_dict(), memory_path / "model.safetensors")
    other.load_state_dict(load_file(memory_path / "model.safetensors"))
    batch = toy_batch(model)
    wanted, got = (m.act(batch, torch.Generator().manual_seed(0)) for m in (model, other))
    assert torch.isfinite(wanted).all()
    assert torch.equal(got, wanted)


def test_settings_through_their_dump_build_the_same_head(every: str, toy_head: MakeHead) -> None:
    model = toy_head(every)
    again = build_head(every.partition("-")[0], model.config.model_dump(mode="json"), model.io)
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_the_same_seed_builds_the_same_weights(every: str, toy_head: MakeHead) -> None:
    first, second = toy_head(every).state_dict(), toy_head(every).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_with_one_statistic_missing_neither_trains_nor_acts(
    every: str, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    model, empty = toy_head(every), toy_head(every, fitted=False)
    batch = toy_batch(model)
    model.act(batch)
    fitted = [name for name, part in model.named_modules() if isinstance(part, FITTED)]
    assert "action" in fitted
    assert len(fitted) > 1
    for part in fitted:
        whole = copy.deepcopy(model.get_submodule(part).state_dict())
        model.get_submodule(part).load_state_dict(empty.get_submodule(part).state_dict())
        with pytest.raises(CheckpointError, match="missing"):
            model.act(dataclasses.replace(batch, action=None))
        with pytest.raises(CheckpointError, match="missing"):
            model.loss(batch)
        model.get_submodule(part).load_state_dict(whole)


@pytest.mark.parametrize("name", list(HEADS))
def test_every_head_is_found_by_its_name_and_has_a_summary(name: str) -> None:
    assert issubclass(head_class(name), HeadModel)
    assert SUMMARIES.keys() == HEADS.keys()


@pytest.mark.parametrize(("wrong", "nearest"), [("mpl", "mlp"), ("dpp", "dp"), ("fmm", "fm")])
def test_an_unknown_head_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no head '{wrong}', did you mean '{nearest}'.* one of dp, fm"):
        head_class(wrong)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hiden": 3}, "unknown key 'hiden', did you mean 'hidden'"),
        ({"encoder": {"kind": "keypoint"}}, r"encoder\.kind"),
        ({"encoder": {"dims": 64}}, "unknown key 'encoder.dims', did you mean 'dim'"),
        ({"hidden": "many"}, "hidden = 'many'"),
        ({"horizon": 0}, "horizon = 0"),
    ],
)
def test_an_unknown_setting_is_refused_by_name(values: dict[str, Any], says: str, toy_io: HeadIO) -> None:
    with pytest.raises(UsageError, match=says):
        build_head("mlp", values, toy_io)
