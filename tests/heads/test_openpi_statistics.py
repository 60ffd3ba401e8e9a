"""A head may take openpi's norm_stats.json in place of the training split's statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.heads.batch import HeadIO
from vla.heads.model import HeadModel
from vla.heads.normalize import Mode, Normalizer
from vla.stores.errors import DataError
from vla.stores.norm_stats import NormStats, write_norm_stats

VALUES = np.random.default_rng(0).normal(3, 2, (200, 3))
STATS = NormStats.of(VALUES)


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_the_formulas_are_openpis_and_invert(mode: Mode) -> None:
    normaliser = Normalizer(3)
    normaliser.fit_from(STATS, mode, "file")
    assert STATS.q01 is not None
    assert STATS.q99 is not None
    x = torch.as_tensor(VALUES, dtype=torch.float32)
    wanted = {
        "zscore": (VALUES - STATS.mean) / (STATS.std + 1e-6),
        "quantile": (VALUES - STATS.q01) / (STATS.q99 - STATS.q01 + 1e-6) * 2 - 1,
    }[mode]
    np.testing.assert_allclose(normaliser(x).numpy(), wanted, atol=2e-5)
    np.testing.assert_allclose(normaliser.inverse(normaliser(x)).numpy(), VALUES, atol=2e-5)


def test_a_constant_component_does_not_explode() -> None:
    normaliser = Normalizer(1)
    normaliser.fit_from(NormStats.of(np.full((5, 1), 0.3)), "zscore", "file")
    assert float(normaliser(torch.tensor([[0.31]]))) == 0.0


@pytest.mark.parametrize("mode", ["limits", "none"])
def test_what_the_file_does_not_hold_is_refused(mode: Mode) -> None:
    with pytest.raises(DataError, match=r"file does not give what .*expected zscore, or quantile"):
        Normalizer(3).fit_from(STATS, mode, "file")
    with pytest.raises(DataError, match="does not give what the normalisation 'quantile' needs"):
        Normalizer(3).fit_from(NormStats(STATS.mean, STATS.std), "quantile", "file")
    with pytest.raises(DataError, match="file has 3 components; expected 4"):
        Normalizer(4).fit_from(STATS, "zscore", "file")


def _file(path: Path, action: int, state: int) -> str:
    parts = {"state": np.arange(2.0 * state).reshape(2, state), "actions": np.arange(2.0 * action).reshape(2, action)}
    write_norm_stats(path, {name: NormStats.of(values) for name, values in parts.items()})
    return str(path)


def test_a_head_takes_them_for_action_and_state(
    tmp_path: Path, toy_head: Callable[..., HeadModel], toy_io: HeadIO
) -> None:
    file = _file(tmp_path / "norm_stats.json", toy_io.action_dim, toy_io.state_dim)
    settings: dict[str, Any] = {"norm_stats": file, "action_norm": "zscore", "state_norm": "zscore"}
    head = toy_head("mlp", **settings)
    half = toy_io.action_dim / 2  # rows 0.. and action_dim..: their mean and deviation
    assert head.action.centre.tolist() == [half + i for i in range(toy_io.action_dim)]
    assert head.action.scale.tolist() == pytest.approx([half + 1e-6] * toy_io.action_dim)
    assert head.encoder.state is not None
    assert head.encoder.state.centre.tolist() == [toy_io.state_dim / 2 + i for i in range(toy_io.state_dim)]


def test_a_file_of_another_robot_is_refused(tmp_path: Path, toy_head: Callable[..., HeadModel], toy_io: HeadIO) -> None:
    file = _file(tmp_path / "norm_stats.json", toy_io.action_dim + 1, toy_io.state_dim)
    with pytest.raises(DataError, match=rf"actions, has {toy_io.action_dim + 1} components"):
        toy_head("mlp", norm_stats=file, action_norm="zscore")
    other = tmp_path / "other.json"
    write_norm_stats(other, {"state": NormStats.of(np.eye(toy_io.state_dim))})
    with pytest.raises(DataError, match="has no 'actions', only state"):
        toy_head("mlp", norm_stats=str(other), action_norm="zscore")
