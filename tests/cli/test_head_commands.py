"""The commands about heads: help that fits a screen, every setting, training online, a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vla.cli import app
from vla.heads.registry import HEADS

SOURCE = "synthetic:episodes=3,length=[5,6],cameras=1"
SMALL = ("model.encoder.components=8", "model.encoder.dim=16", "model.hidden=16", "train.batch_size=4")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)  # its variable is read when it is imported


def vla(*arguments: object) -> Result:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("head", HEADS)
def test_help_of_training_a_head_fits_a_screen_and_leads_to_its_settings(head: str) -> None:
    lines = vla("train-head", head, "--help").output.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert f"vla heads {head}" in " ".join(lines)


@pytest.mark.parametrize("head", HEADS)
def test_every_setting_of_a_head_is_listed(head: str) -> None:
    fields = json.loads(vla("heads", head, "--json").stdout)["settings"]
    assert {"model.n_obs", "model.horizon"} <= {field["name"] for field in fields}
    assert all(field["text"] and field["type"] and field["default"] for field in fields)
    assert "model.horizon" in vla("heads", head).output


def test_heads_are_listed_with_what_they_need() -> None:
    listed = json.loads(vla("heads", "--json").stdout)
    assert listed.keys() == HEADS.keys()
    assert listed["mlp"]["needs"] == ["any feature, the state, the task"]
    assert all(head in vla("heads").output for head in HEADS)


def test_a_head_trains_online_tells_its_parameters_and_is_exported(tmp_path: Path) -> None:
    vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    run = tmp_path / "run"
    begin = ("train-head", "mlp", "--store", tmp_path / "toy", "--out", run, "--steps", 2, "--json", *settings)
    done = vla(*begin, "--online", "--set", "online.augment.copies=2")
    assert json.loads(done.stdout)["parameters"].keys() == {"encoder", "net"}
    assert done.stderr.index("parameters: encoder") < done.stderr.index("train: 2/2")
    made = json.loads(vla("export", run, "--out", tmp_path / "mlp.pt2", "--json").stdout)
    assert list(made["inputs"]) == ["feature_grid", "state", "task", "obs_valid"]
    assert (tmp_path / "mlp.pt2").is_file()


def test_each_group_of_a_training_tells_its_parameters(tmp_path: Path) -> None:
    vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    begin = ("train-head", "mlp", "--store", tmp_path / "toy", "--out", tmp_path / "run", "--steps", 1, *settings)
    assert "parameters: encoder" in vla(*begin, "--group-by", "action-dim").stderr
