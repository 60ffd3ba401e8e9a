"""The planner against OpenTrackVLA's own code: the same checkpoint, the same tokens, the same plan.

VLA_OPENTRACKVLA_CHECKOUT names a checkout of the repository; its language model is a small random Qwen3.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vla.featurize.sources.waypoints import integrate_waypoints
from vla.heads.batch import Batch, FeatureIO, HeadIO, TextIO
from vla.heads.checkpoint import build_head
from vla.heads.model import HeadModel
from vla.heads.opentrackvla import read_published
from vla.heads.texts import TextRows

CHECKOUT = os.environ.get("VLA_OPENTRACKVLA_CHECKOUT", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="VLA_OPENTRACKVLA_CHECKOUT does not name a checkout of OpenTrackVLA"
)

ROPE = {"rope_type": "default", "rope_theta": 1e6}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "rope_parameters": ROPE,
}
WORDS = [3, 9, 27, 11]


class Words:
    """Stands in for their tokenizer: every instruction is the same four tokens."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, torch.Tensor]:
        ids = torch.tensor([WORDS] * len(texts))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module", params=["model", "train"])
def theirs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Their two copies of the network: model.py for inference, train.py for training."""
    sys.path.insert(0, CHECKOUT)
    yield __import__(request.param)
    sys.path.remove(CHECKOUT)
    for name in ("model", "train", "cache_gridpool"):
        sys.modules.pop(name, None)


@pytest.fixture(params=["off", "all"])
def tanh(request: pytest.FixtureRequest) -> str:
    mode: str = request.param
    return mode


@pytest.fixture(params=[False, True], ids=["plain", "angle"])
def pair(
    theirs: Any, tanh: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, HeadModel]:
    """(their model, our head from a checkpoint of it), every parameter drawn at random, alpha 1.7."""
    torch.manual_seed(3)
    angle: bool = request.param
    language = transformers.Qwen3Model(transformers.Qwen3Config(**SIZES))
    monkeypatch.setattr(theirs.AutoModel, "from_pretrained", lambda *_, **__: language)
    monkeypatch.setattr(theirs.AutoTokenizer, "from_pretrained", lambda *_: Words())
    config = theirs.ModelConfig(use_angle_tvi=angle, use_tanh_actions=tanh == "all", alpha_xy=1.7)
    model = theirs.OpenTrackVLA(config, vision_feat_dim=1536).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "model_epoch00_step000100.pt"
    settings = {"no_tanh_actions": tanh == "off", "alpha_xy": 1.7, "llm_name": "Qwen/Qwen3-0.6B", "val_json": None}
    torch.save({"model_state": model.state_dict(), "config": settings, "epoch": 0, "step": 100}, path)
    ours = {"variant": "llm", "planner": str(path), "tanh": tanh, "angle": "yaw" if angle else None}
    head: Any = build_head("track", ours, describe())
    head.fit_texts(
        TextRows(torch.tensor([[*WORDS, 0, 0]]), torch.tensor([[True] * 4 + [False] * 2]), torch.zeros(1, 6, 0))
    )
    head.take(read_published(str(path)))
    return model, head.eval()


def describe() -> HeadIO:
    tokens = {
        name: FeatureIO(shape=(1, count, 1536), dims=("token", "channel"))
        for name, count in (("coarse", 4), ("fine", 64))
    }
    return HeadIO(
        action_dim=3,
        chunk=8,
        state_dim=1,
        state_names=("yaw",),
        features=tokens,
        tasks=("follow",),
        text=TextIO(length=6, side="right"),
    )


def test_plans_equal_theirs(pair: tuple[Any, HeadModel]) -> None:
    model, head = pair
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(2, 32, 1, 4, 1536, generator=generator)
    fine = torch.randn(2, 1, 1, 64, 1536, generator=generator)
    yaw = torch.rand(2, 32, generator=generator) * 6 - 3
    batch = Batch(
        features={"coarse": coarse, "fine": fine},
        state=yaw[..., None],
        task=torch.zeros(2, dtype=torch.long),
        obs_valid=torch.ones(2, 32, dtype=torch.bool),
    )
    times = torch.arange(31).repeat_interleave(4).expand(2, -1)
    with torch.no_grad():
        wanted = model(
            coarse[:, :31, 0].flatten(1, 2),
            times,
            fine[:, 0, 0],
            torch.full((2, 64), 31),
            ["follow"] * 2,
            yaw_hist=yaw[:, :31],
            yaw_curr=yaw[:, 31:],
        )
    plan = head.act(batch)
    assert wanted.abs().mean() > 0.05
    torch.testing.assert_close(plan, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beyond", [0.0, 40.0])
def test_the_loss_equals_theirs_whatever_stands_in_padded_waypoints(
    theirs: Any, beyond: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """beta_nav * mse_masked over plans and labels divided by (alpha, alpha, 1), as their training loop writes it."""
    if not hasattr(theirs, "mse_masked"):
        pytest.skip("model.py has no loss")
    generator = torch.Generator().manual_seed(6)
    plan, wanted = torch.randn(4, 8, 3, generator=generator), torch.randn(4, 8, 3, generator=generator)
    valid = torch.rand(4, 8, generator=generator) > 0.3
    alpha = torch.tensor([1.7, 1.7, 1.0])
    head: Any = build_head(
        "track", {"alpha_xy": 1.7}, describe().model_copy(update={"text": TextIO(length=6, width=4)})
    )
    head.fit_normalisers(wanted[valid].numpy(), np.zeros((1, 0)))
    monkeypatch.setattr(head, "_plan", lambda _: plan / alpha)
    monkeypatch.setattr(head, "check", lambda _: None)
    label = torch.where(valid[..., None], wanted, beyond)
    batch = Batch({}, None, torch.zeros(4, dtype=torch.long), torch.ones(4, 32, dtype=torch.bool), label, valid)
    loss, _ = head.loss(batch)
    torch.testing.assert_close(loss, 10.0 * theirs.mse_masked(plan / alpha, wanted / alpha, valid))


def test_labels_equal_theirs(theirs: Any) -> None:
    velocities = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    wanted = theirs.integrate_actions_to_waypoints(velocities, 8, 0.1)
    ours, valid = integrate_waypoints(velocities, 1, 8, 0.1)
    assert valid.all()
    np.testing.assert_allclose(ours[0], wanted, atol=1e-6)
