"""Every head with every net learns eight windows by heart: loss, sampler and normaliser agree with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.model import HeadModel

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
RowsOf = Callable[[Batch, torch.Tensor], Batch]


@pytest.mark.parametrize(
    ("name", "steps", "copies", "lr", "times", "settings"),
    [
        ("mlp", 150, 1, 5e-3, 20, {}),
        ("fm-mlp", 180, 8, 5e-3, 5, {}),
        ("fm-expert", 150, 8, 5e-3, 5, {}),
        ("dp-mlp", 200, 16, 5e-3, 5, {}),
        ("track-light", 150, 1, 5e-3, 20, {}),
        ("track-llm", 70, 1, 5e-3, 20, {}),
        ("dp-unet", 200, 16, 5e-3, 3, {"down_dims": [32, 32], "kernel_size": 3}),
        ("spatial-net", 150, 8, 5e-3, 5, {}),
        ("pi0-rgb", 150, 4, 8e-3, 5, {}),
        ("pi05-rays", 80, 4, 1e-2, 5, {}),
    ],
)
def test_a_head_learns_eight_windows_by_heart(
    name: str,
    steps: int,
    copies: int,
    lr: float,
    times: int,
    settings: dict[str, Any],
    toy_head: MakeHead,
    toy_batch: MakeBatch,
    rows_of: RowsOf,
) -> None:
    """Its sampled actions come `times` nearer, in the data's units, than always predicting the mean action."""
    model = toy_head(name, n_obs=1, **settings).train()
    batch = toy_batch(model)
    assert batch.action is not None
    many = rows_of(batch, torch.arange(8).repeat(copies))  # each copy is trained at another noise and another time
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss, _ = model.loss(many)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    sampled = model.act(batch, torch.Generator().manual_seed(0), whole=True)
    error = (sampled - batch.action).abs().mean()
    assert error < (batch.action.mean(dim=0) - batch.action).abs().mean() / times


def test_one_backward_pass_reaches_every_weight(every: str, awake_head: MakeHead, toy_batch: MakeBatch) -> None:
    """Data-parallel training refuses parameters that get no gradient."""
    model = awake_head(every)
    model.loss(toy_batch(model))[0].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
