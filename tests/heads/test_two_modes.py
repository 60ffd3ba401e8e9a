"""What generative heads are for: of two ways past an obstacle they keep both, and a regression takes their mean."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_modes.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("vla_two_modes", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vla_two_modes"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["vla_two_modes"]


def test_experts_pass_on_both_sides_and_their_mean_does_not_pass(example: ModuleType) -> None:
    _, paths = example.demonstrations(64, seed=3)
    found = example.statistics(paths)
    assert (found["left"], found["right"], found["hit"]) == (0.5, 0.5, 0.0)
    assert example.statistics(paths.mean(axis=0, keepdims=True))["hit"] == 1.0


@pytest.mark.parametrize("head", ["dp", "fm"])
def test_a_generative_head_keeps_both_ways(
    head: str, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"net": "mlp", "hidden": 128, "n_obs": 1, "n_action": 1, "encoder": {"dim": 32}}
    monkeypatch.setitem(example.HEADS, "dp", {**small, "horizon": example.HORIZON})
    model = example.train(head, 300, tmp_path / "run")
    found = example.statistics(example.paths_of(model, 64))
    # Few steps, so that some paths are between the two ways: each side is taken often, and far from the middle.
    assert min(found["left"], found["right"]) > 0.15
    assert found["offset"] > 0.35


def test_the_mlp_averages_the_two_ways_into_the_obstacle(example: ModuleType, tmp_path: Path) -> None:
    model = example.train("mlp", 100, tmp_path / "run")
    found = example.statistics(example.paths_of(model, 8))
    assert found["hit"] == 1.0
    assert found["offset"] < 0.2


def test_a_picture_of_the_ways_is_drawn(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example.draw({"fm": np.zeros((3, example.HORIZON, 2), np.float32)}, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")
