"""Learning: every head, through every way of reading a grid, finds the bright cell in windows it never saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.model import HeadModel

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
RowsOf = Callable[[Batch, torch.Tensor], Batch]


def one_instruction(batch: Batch) -> Batch:
    """Undo the second instruction: the direction is where the bright cell is, and nothing else."""
    assert batch.action is not None
    sign = torch.where(batch.task.bool(), -1.0, 1.0)[:, None, None]
    return dataclasses.replace(batch, action=(batch.action - 5) * sign + 5, task=torch.zeros_like(batch.task))


def times_better_than_the_mean_action(
    model: HeadModel, make: MakeBatch, rows_of: RowsOf, steps: int, lr: float
) -> float:
    """Train on fresh windows; return (error of the training mean) / (error of sampled actions) on 256 other windows."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = one_instruction(make(model, 2048, 1))
    for step in range(steps):
        rows = torch.randperm(2048)[:64] if step else torch.arange(64)
        loss, _ = model.loss(rows_of(data, rows))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    held_out = one_instruction(make(model, 256, 2))
    assert data.action is not None
    assert held_out.action is not None
    sampled = model.act(held_out, torch.Generator().manual_seed(0), whole=True)
    mean = data.action.mean(dim=(0, 1))
    return float((held_out.action - mean).abs().mean() / (held_out.action - sampled).abs().mean())


@pytest.mark.parametrize("kind", ["projection", "attention", "keypoints"])
def test_every_encoder_learns_where_things_are(
    kind: str, toy_head: MakeHead, toy_batch: MakeBatch, rows_of: RowsOf
) -> None:
    """Attention fails this where its positions start small beside the cells: it starts from the grid's mean."""
    model = toy_head("mlp", encoder={"kind": kind, "use_task": False, "queries": 8})
    assert times_better_than_the_mean_action(model, toy_batch, rows_of, 200, 3e-3) > 5


@pytest.mark.parametrize(
    ("name", "steps", "lr"), [("fm-mlp", 200, 4e-3), ("dp-mlp", 300, 5e-3), ("track-light", 200, 3e-3)]
)
def test_sampled_actions_beat_the_mean_action_five_times(
    name: str, steps: int, lr: float, toy_head: MakeHead, toy_batch: MakeBatch, rows_of: RowsOf
) -> None:
    model = toy_head(name, encoder={"use_task": False, "queries": 8}, n_obs=1)
    assert times_better_than_the_mean_action(model, toy_batch, rows_of, steps, lr) > 5


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "steps", "lr", "settings"),
    [
        ("fm-expert", 150, 3e-3, {}),
        ("dp-unet", 300, 6e-3, {"down_dims": [32, 32], "kernel_size": 3}),
        ("pi0-rgb", 300, 3e-3, {}),
        ("pi05-rays", 300, 4e-3, {"use_geom_prefix": False, "discrete_state": False}),
        ("track-llm", 200, 6e-3, {"llm": "frozen"}),
        ("track-llm", 150, 4e-3, {"llm": "lora"}),
        ("track-llm", 150, 4e-3, {"llm": "full"}),
        pytest.param(
            "spatial-net", 500, 2e-3, {"use_task": False, "width": 64}, marks=pytest.mark.timeout(400)
        ),  # 34 tokens of context: two minutes on a busy machine
    ],
)
def test_the_larger_nets_beat_the_mean_action_five_times(
    name: str,
    steps: int,
    lr: float,
    settings: dict[str, Any],
    toy_head: MakeHead,
    toy_batch: MakeBatch,
    rows_of: RowsOf,
) -> None:
    model = toy_head(name, encoder={"use_task": False, "queries": 8}, n_obs=1, **settings)
    assert times_better_than_the_mean_action(model, toy_batch, rows_of, steps, lr) > 5
