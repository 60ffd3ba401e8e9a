"""The gradient of one optimiser step depends on its windows, and not on how they are cut into micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vla.heads.batch import Batch
from vla.heads.fast import FastTokenizer
from vla.heads.model import HeadModel
from vla.training.config import TrainConfig
from vla.training.loop import fit

MakeHead = Callable[..., HeadModel]
MakeBatch = Callable[..., Batch]
RowsOf = Callable[[Batch, Tensor], Batch]


class NoiseByWindow:
    """Stands in for torch's generators: window i of a step gets the same numbers in every cut of the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
        self._windows, self._tables, self._at = windows, {}, {}
        monkeypatch.setattr(torch, "randn_like", lambda x: self._rows("normal", tuple(x.shape)))
        monkeypatch.setattr(torch, "rand", lambda n, device=None: self._rows("uniform", (n,)))
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, device=None: self._whole(high, shape))

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        key = (name, shape[1:])
        if key not in self._tables:
            generator = torch.Generator().manual_seed(3)
            table = torch.empty(self._windows, *shape[1:])
            self._tables[key] = (
                table.normal_(generator=generator) if name == "normal" else table.uniform_(generator=generator)
            )
        at = self._at.get(key, 0)
        self._at[key] = (at + shape[0]) % self._windows
        return self._tables[key][at : at + shape[0]].clone()

    def _whole(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return (self._rows("uniform", shape) * high).long()


def masked(batch: Batch) -> Batch:
    """Pad steps and dimensions so that no two halves of the batch count alike."""
    assert batch.action is not None
    valid = torch.ones(batch.action.shape[:2], dtype=torch.bool)
    valid[0, 1:], valid[1, 2:], valid[2], valid[6, 3:] = False, False, False, False
    dims = torch.ones(len(batch), batch.action.shape[2], dtype=torch.bool)
    dims[3, 1] = False
    return dataclasses.replace(batch, action_valid=valid, action_dims=dims)


def one_step(model: HeadModel, parts: Sequence[Batch], run_dir: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Make one optimiser step of the micro-batches; return its gradients by name, and its figures."""
    gradients: dict[str, Tensor] = {}

    def keep(_: torch.optim.Optimizer, *__: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def stream(first: int, stride: int) -> Iterator[Batch]:
        return itertools.cycle(parts)

    config = TrainConfig(steps=1, accumulate=len(parts), ema=False, device="cpu", grad_clip=1e9, warmup_steps=0)
    hook = register_optimizer_step_pre_hook(keep)
    try:
        report = fit(model, stream, config, run_dir, artefact={})
    finally:
        hook.remove()
    return gradients, report.metrics


def require_one_gradient(
    make: Callable[[], HeadModel], batch: Batch, rows_of: RowsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare one batch of 8 with 2 x 4 and with 5 + 3 windows."""
    found = []
    for number, sizes in enumerate(([8], [4, 4], [5, 3])):
        NoiseByWindow(monkeypatch, len(batch))
        parts = [rows_of(batch, rows) for rows in torch.arange(len(batch)).split(sizes)]
        found.append(one_step(make(), parts, tmp_path / str(number)))
    (whole, figures), *others = found
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
    for gradients, measured in others:
        assert gradients.keys() == whole.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        for name in figures.keys() - {"steps_per_s", "data_wait_share", "mask_share"}:
            assert measured[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-7), name


def test_a_gradient_does_not_depend_on_how_windows_are_cut_into_micro_batches(
    every: str,
    awake_head: MakeHead,
    toy_batch: MakeBatch,
    rows_of: RowsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = masked(toy_batch(awake_head(every)))
    require_one_gradient(lambda: awake_head(every), batch, rows_of, tmp_path, monkeypatch)


def test_a_gradient_of_fast_tokens_does_not_depend_on_micro_batches(
    awake_head: MakeHead, toy_batch: MakeBatch, rows_of: RowsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = awake_head("hier-joint")
    batch = masked(toy_batch(plain))
    FastTokenizer.fit(plain.labels(toy_batch(plain)).numpy(), vocab_size=200, action_norm="quantile").save(
        tmp_path / "fast"
    )
    make = lambda: awake_head("hier-joint", mode="fast", fast=str(tmp_path / "fast"))  # noqa: E731
    require_one_gradient(make, batch, rows_of, tmp_path, monkeypatch)


def test_the_ramp_of_the_geometry_counts_optimiser_steps(
    awake_head: MakeHead, toy_batch: MakeBatch, rows_of: RowsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> HeadModel:
        model: Any = awake_head("pi0-rays", geom_alpha_warmup=5)
        model.geometry.seen.fill_(2)
        return model  # type: ignore[no-any-return]

    require_one_gradient(make, masked(toy_batch(make())), rows_of, tmp_path, monkeypatch)
