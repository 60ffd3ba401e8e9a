"""What a newcomer types: options of a backbone, `--out=~/x`, lists with spaces, places beside the right one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.cli import app
from vla.featurize.backbones.registry import BACKBONES, backbone_fields
from vla.heads import train
from vla.stores.errors import CheckpointError, SourceError, StoreError, UsageError
from vla.terminal.run_app import run_app

SOURCE = "synthetic:episodes=2,length=[4,4],cameras=1"


def vla(*words: object) -> int:
    return run_app(app, [str(word) for word in words])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_option_of_a_backbone_is_listed_with_its_meaning(
    backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [field.name for field in backbone_fields(backbone) if not field.text] == []
    assert vla("backbones", backbone, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["backbone"] == backbone
    assert {"missing", "code_licence", "weights_licence"} <= shown.keys()
    assert [option["name"] for option in shown["options"]] == [field.name for field in backbone_fields(backbone)]


def test_options_of_a_backbone_are_shown_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert vla("backbones", "da3") == 0
    shown = capsys.readouterr().out
    assert "options.model" in shown
    assert "options.weights" not in shown
    assert "--weights" in shown


def test_an_unknown_backbone_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="'da3'"):
        vla("backbones", "da-3")


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert vla("featurize", "--backbone=toy", f"--source={SOURCE}", "--out=~/stores") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home/stores/toy/zarr.json").is_file()


def test_names_in_a_list_may_have_spaces_around(make_store: Callable[..., Any], tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", features={"grid": ((1, 2), "float16"), "ray": ((1, 2), "float16")}).root
    with pytest.raises(UsageError, match="'none'"):
        vla("train-head", "mlp", "--store", store, "--out", tmp_path / "run", "--features", "grid, ray ,none")


def test_an_existing_run_is_refused_before_the_head_is_built(
    make_store: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s", features={"grid": ((1, 2), "float16")}).root
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    built: list[str] = []
    monkeypatch.setattr(train, "build_head", lambda *arguments: built.append("a head of billions"))
    with pytest.raises(UsageError, match="exists"):
        vla("train-head", "mlp", "--store", store, "--out", tmp_path / "run")
    assert built == []


@pytest.mark.parametrize("word", ["evaluate", "export", "rollout"])
def test_a_folder_or_file_inside_a_run_is_answered_with_the_run(word: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    rest = {"evaluate": [], "export": ["--out", "x.pt2"], "rollout": ["--env", "metaworld:push-v3"]}[word]
    for inside in ("checkpoints", "run.json"):
        with pytest.raises(CheckpointError) as caught:
            vla(word, run / inside, *rest)
        assert str(run) in caught.value.fix.split()


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["train-head", "mlp", "--out", "x", "--store"]])
def test_a_place_beside_a_store_is_answered_with_the_store(
    words: list[str], make_store: Callable[..., Any], tmp_path: Path
) -> None:
    store = make_store(tmp_path / "stores/a", features={"grid": ((1, 2), "float16")}).root
    inside = [] if words == ["verify"] else [store / "frames"]  # verify reports a group of another kind as a finding
    for place in (store.parent, store / "zarr.json", *inside):
        with pytest.raises(StoreError) as caught:
            vla(*words, place)
        assert str(store) in caught.value.fix.split()


def test_a_file_of_a_data_set_is_answered_with_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "demos/meta").mkdir(parents=True)
    (tmp_path / "demos/meta/info.json").write_text("{}")
    with pytest.raises(SourceError) as caught:
        vla("featurize", "--backbone", "toy", "--source", tmp_path / "demos/meta/info.json", "--out", tmp_path)
    assert caught.value.fix == f"--source {tmp_path / 'demos'}"


def test_a_store_that_is_missing_is_answered_with_a_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        vla("inspect", tmp_path / "stores" / "mine")
    assert caught.value.fix == f"vla featurize --backbone NAME --out {tmp_path / 'stores'} --name mine"


def test_no_name_of_a_backbone_is_not_the_folder_of_all_stores(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="backbone"):
        vla("featurize", "--backbone", "", "--source", SOURCE, "--out", tmp_path)


@pytest.mark.parametrize("backbone", ["toy", "pixels"])
def test_weights_of_a_backbone_without_any_are_to_be_left_out(backbone: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        vla("featurize", "--backbone", backbone, "--source", SOURCE, "--out", tmp_path, "--weights", "random")
    assert "--weights" in caught.value.fix


def test_no_command_is_shown_that_cannot_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert vla("heads") == 0
    lines = re.findall(r"vla featurize --backbone (\S+)", capsys.readouterr().out)
    assert lines
    assert set(lines) <= BACKBONES.keys()


@pytest.mark.parametrize("backbone", ["da3", "croco"])
def test_the_last_lines_of_a_listing_fit_a_narrow_screen(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vla("backbones", backbone) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[-2:])) <= 60


def test_random_weights_of_a_student_are_answered_with_a_network_that_can_be_typed(tmp_path: Path) -> None:
    command = ["featurize", "--backbone", "rgb2pc", "--weights", "random", "--dry-run", "--out", tmp_path]
    options = ["--set", "options.grid=14", "--set", "options.channels=112"]
    assert vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, *options) == 0
    command += ["--source", tmp_path / "toy"]
    with pytest.raises(UsageError) as caught:
        vla(*command)
    assert vla(*command, *shlex.split(caught.value.fix)) == 0


def test_a_misspelt_setting_of_a_trained_head_is_not_said_to_be_decided_in_training(tmp_path: Path) -> None:
    store = tmp_path / "toy"
    assert vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path) == 0
    small = ["--set", "model.width=16", "--set", "model.encoder.dim=8", "--set", "data.validation=0"]
    assert vla("train-head", "fm", "--store", store, "--out", tmp_path / "run", "--steps", 1, *small) == 0
    with pytest.raises(UsageError, match="'sample_steps'"):
        vla("evaluate", tmp_path / "run", "--set", "model.sampel_steps=2")
    with pytest.raises(UsageError, match=r"trained|training"):
        vla("evaluate", tmp_path / "run", "--set", "model.horizon=2")
