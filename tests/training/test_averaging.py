"""The averaged weights are Diffusion Policy's, against the written-out sum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla.training.ema import WarmAverage, ema_decay


def test_the_decay_begins_with_a_copy_and_ends_at_its_maximum() -> None:
    assert ema_decay(0, 0.75, 0.9999) == 0.0
    assert ema_decay(1, 0.75, 0.9999) == pytest.approx(1 - 2**-0.75)
    assert ema_decay(15, 0.75, 0.9999) == pytest.approx(1 - 1 / 8)
    # 1 - (1 + k)^-0.75 passes 0.9999 at k = 10^(16/3) - 1 = 215,443.
    assert ema_decay(215_442, 0.75, 0.9999) < 0.9999
    assert ema_decay(215_444, 0.75, 0.9999) == 0.9999


def test_a_run_averages_its_weights_in_closed_form(trainee: ModuleType, memory_path: Path) -> None:
    net, weights = trainee.Net(), []

    def remember(step: int, total: int, metrics: Mapping[str, float]) -> None:
        weights.append(net.net[0].weight.detach().double().numpy().copy())

    trainee.train(memory_path / "run", net, trainee.config_of(ema_max=0.8), progress=remember)
    # avg_n = sum_k (1 - d_k) prod_{j > k} d_j w_k
    decays = np.array([min(0.8, 1 - (1 + k) ** -0.75) for k in range(14)])
    shares = [(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(14)]
    assert sum(shares) == pytest.approx(1.0)
    expected = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    averaged = load_file(memory_path / "run" / "checkpoints" / "step-00000014" / "ema.safetensors")["net.0.weight"]
    np.testing.assert_allclose(averaged.numpy(), expected, rtol=0, atol=1e-6)
    assert np.abs(averaged.numpy() - weights[-1]).max() > 1e-3  # else the comparison shows nothing


def test_buffers_are_copied_not_averaged() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = WarmAverage(model, 0.75, 0.9999)
    for _ in range(3):
        model(torch.randn(8, 2) + 5)
        average.update_parameters(model)
    for name in ("running_mean", "num_batches_tracked"):
        assert torch.equal(average.averaged.state_dict()[name], model.state_dict()[name])
