"""Every head with every net learns eight windows by heart: loss, sampler and normaliser agree with each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.model import HeadModel

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]


def repeated(batch: Batch, copies: int) -> Batch:
    """The same windows several times: each copy is trained at another noise and another time."""
    assert batch.state is not None
    assert batch.action is not None
    return Batch(
        features={name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in batch.features.items()},
        state=batch.state.repeat(copies, 1, 1),
        task=batch.task.repeat(copies),
        obs_valid=batch.obs_valid.repeat(copies, 1),
        action=batch.action.repeat(copies, 1, 1),
    )


@pytest.mark.parametrize(
    ("name", "steps", "copies", "lr", "times"),
    [
        ("mlp", 150, 1, 5e-3, 20),
        ("fm-mlp", 250, 8, 5e-3, 5),
        ("fm-expert", 200, 8, 5e-3, 5),
        ("dp-mlp", 300, 16, 5e-3, 5),
        ("track-light", 150, 1, 5e-3, 20),
        ("track-llm", 100, 1, 5e-3, 20),
        ("dp-unet", 300, 16, 1e-2, 3),  # 16 channels learn slowly: other seeds reach 5 to 8
    ],
)
def test_a_head_learns_eight_windows_by_heart(
    name: str, steps: int, copies: int, lr: float, times: int, toy_head: MakeHead, toy_batch: MakeBatch
) -> None:
    """Its sampled actions come `times` nearer, in the data's units, than always predicting the mean action."""
    model = toy_head(name, n_obs=1).train()
    batch = toy_batch(model)
    assert batch.action is not None
    many = repeated(batch, copies)
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
