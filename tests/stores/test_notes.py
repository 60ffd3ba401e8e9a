"""`vla inspect` and a training's first lines name what a normalisation takes far out of range, and what is constant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.check_source import CheckConfig, check_source
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.notes import column_notes, store_notes
from vla.stores.store import Store

DIMS = ("x", "still", "joint")


def joint_with_one_outlier(rows: int = 400) -> NDArray[np.float64]:
    """A dimension that moves, a constant one, and a joint next to still with one jump."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.uniform(-1, 1, rows), np.full(rows, 0.25), rng.normal(0, 1e-3, rows)], axis=1)
    values[123, 2] = 1.0
    return values


def notes(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> list[str]:
    return column_notes("action", values, DIMS, "row {}".format, valid)


def test_a_nearly_still_joint_with_one_outlier_is_named_with_its_row() -> None:
    lines = notes(joint_with_one_outlier())
    for norm in ("quantile", "zscore"):
        (line,) = [line for line in lines if norm in line]
        assert "joint" in line
        assert "row 123" in line
    assert float(next(line for line in lines if "quantile" in line).split(": ")[1].split()[0]) > 300


def test_constant_dimensions_are_listed() -> None:
    (line,) = [line for line in notes(joint_with_one_outlier()) if "constant" in line]
    assert "still" in line
    assert "joint" not in line


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_ordinary_columns_have_no_note_in_any_unit(unit: float) -> None:
    assert notes(np.random.default_rng(0).normal(0.3, 1, (5000, 3)) * unit) == []


def test_padded_entries_are_not_named() -> None:
    values = joint_with_one_outlier()
    valid = np.ones(values.shape, bool)
    valid[123, 2] = False
    assert not [line for line in notes(values, valid) if "joint" in line]


@pytest.fixture
def outlying_action(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first number of the action in row 170 of every store is 1e4."""
    steps = Store.steps

    def with_outlier(store: Store, name: str) -> NDArray[Any]:
        values = steps(store, name)
        if name == "action":
            values[170, 0], values[:, 1] = 1e4, 0.25
        return values

    monkeypatch.setattr(Store, "steps", with_outlier)


@pytest.mark.usefixtures("outlying_action")
def test_inspect_names_the_episode_and_row_of_an_outlier(memory_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(memory_path / "s", ids=("a", "b"), lengths=(150, 150), unit_rows=64)
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(made.root), "--json"]).stdout)
    for norm in ("quantile", "zscore"):
        (line,) = [line for line in facts["notes"] if norm in line]
        assert "'b', row 20" in line
    assert any("constant" in line for line in facts["notes"])


def test_inspect_names_a_feature_with_an_outlier(memory_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(memory_path / "s", ids=("a", "b"), lengths=(150, 150), unit_rows=64)
    assert not [line for line in store_notes(made.open()) if "feature" in line]
    store = made.open()
    name, read = next(iter(store.manifest.plain)), Store.unit_statistics

    def with_outlier(store: Store, feature: str, unit: int) -> Any:
        found = read(store, feature, unit)
        if feature == name and unit == 2:
            return replace(found, max=np.where(np.arange(len(found.max)) == 1, 1e3, found.max))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "unit_statistics", with_outlier)
        (line,) = [line for line in store_notes(store) if "feature" in line]
    assert name in line
    assert "channel 1 " in line
    assert "'a', row 128" in line


@pytest.mark.usefixtures("outlying_action")
def test_the_first_lines_of_a_training_name_outliers_and_constants(tmp_path: Path) -> None:
    run(prepare(FeaturizeConfig(source="synthetic:episodes=6,length=[40,40]", backbone="toy")), tmp_path / "store")
    small = ["model.hidden=8", "model.encoder.dim=8", "train.steps=1", "train.device=cpu", "model.action_norm=quantile"]
    small += ["data.validation=0", "data.verify=never"]
    settings = [part for setting in small for part in ("--set", setting)]
    out = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["train-head", "mlp", *out, *settings])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert "constant in the training split, action" in shown
    assert "after quantile normalisation" in shown
    assert "row 10" in shown  # 170 is row 10 of the fifth episode


def test_inspect_of_raw_demonstrations_names_episode_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = SyntheticSource.steps

    def with_outlier(source: SyntheticSource, episode: int) -> Any:
        found = steps(source, episode)
        if episode == 3:
            found["action"][7, 0] = 1e4
        return found

    monkeypatch.setattr(SyntheticSource, "steps", with_outlier)
    report = check_source(CheckConfig(source="synthetic:episodes=6,length=[40,40]", pictures=0))
    (line,) = [line for line in report.facts["notes"] if "zscore" in line]
    assert "row 7" in line
    assert not report.findings
