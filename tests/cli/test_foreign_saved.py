"""A saved run or store that came from somebody else chooses no code, no weights and no bucket when it is replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.cli import app
from vla.heads.train import HeadTrainConfig
from vla.stores.errors import UsageError
from vla.stores.metadata import read_manifest


def vla(*arguments: object) -> int:
    return int(app([str(argument) for argument in arguments], standalone_mode=False) or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of `mlp` over three synthetic episodes."""
    vla("featurize", "--backbone", "toy", "--source", "synthetic:episodes=3,length=[8,9]", "--out", tmp_path)
    settings = ("train.steps=1", "train.batch_size=2", "data.validation=0", "model.horizon=4")
    sets = [word for setting in settings for word in ("--set", setting)]
    vla("train-head", "mlp", "--store", tmp_path / "toy", "--out", tmp_path / "run", *sets)
    return tmp_path / "run"


def edit(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    saved = json.loads((run / "run.json").read_bytes())
    change(saved["settings"])
    (run / "run.json").write_text(json.dumps(saved))


def canary(folder: Path) -> Path:
    """A checkout whose modules write a file when they are imported."""
    for name in ("models/__init__.py", "models/croco.py", "croco.py", "__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return folder


@pytest.mark.parametrize("how", [["--resume", "--out", "RUN"], ["--config", "RUN", "--out", "OUT"]])
def test_a_saved_run_opens_no_bucket_that_the_user_does_not_name(how: list[str], run: Path, tmp_path: Path) -> None:
    edit(run, lambda settings: settings["data"].update(stores=["s3://somebody/else"]))
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "again")) for word in how]
    with pytest.raises(UsageError, match="s3://somebody/else"):
        vla("train-head", *words)


def test_the_user_names_another_store_for_a_run_that_was_trained_from_a_bucket(run: Path, tmp_path: Path) -> None:
    edit(run, lambda settings: settings["data"].update(stores=["s3://somebody/else"]))
    assert vla("train-head", "--resume", "--out", run, "--store", tmp_path / "toy") == 0


@pytest.mark.parametrize("how", ["resume", "config"])
def test_a_saved_store_chooses_no_checkout_and_no_weights(how: str, tmp_path: Path) -> None:
    checkout = canary(tmp_path / "checkout")
    vla("featurize", "--backbone", "toy", "--source", "synthetic:episodes=3,length=[8,9]", "--out", tmp_path)
    manifest = read_manifest(tmp_path / "toy")
    settings = {"backbone": "croco", "options": {"checkout": str(checkout), "any_commit": True}}
    provenance = {**manifest.provenance, "settings": {**manifest.provenance["settings"], **settings}}
    file = tmp_path / "toy" / "zarr.json"
    document = json.loads(file.read_bytes())
    document["attributes"] = manifest.model_copy(update={"provenance": provenance}).attributes()  # signed anew
    words = ["--resume", "--out", tmp_path / "toy"] if how == "resume" else ["--config", tmp_path / "toy"]
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="checkout"):
        vla("featurize", *words)
    assert not (checkout / "ran").exists()


def test_a_saved_run_does_not_choose_how_a_bucket_is_reached(run: Path, tmp_path: Path) -> None:
    edit(run, lambda settings: settings["data"].update(remote={"cache": str(tmp_path / "theirs")}))
    assert "remote" not in HeadTrainConfig.read_file(run)["data"]
