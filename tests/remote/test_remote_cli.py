"""A URL wherever a store's folder may stand on the command line: the same results, one line an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.cli import main
from vla.stores.remote.options import RemoteOptions

URL = "s3://bucket/some"
SOURCE = "synthetic:episodes=4,length=[6,9],cameras=1"
TINY = ["model.encoder.components=8", "model.hidden=32", "model.encoder.dim=32", "train.batch_size=4"]


@pytest.fixture
def vla(
    options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`vla(*arguments, code=0)` runs a command in this process; its stdout and stderr."""
    monkeypatch.setenv("VLA_CACHE", str(options.folder))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("vla.stores.memory.keep_freed_memory", lambda: None)  # of this process, for good

    def run(*arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["vla", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said

    return run


@pytest.mark.slow
def test_features_go_to_a_url_and_train_the_very_same_head(
    bucket: Any, vla: Callable[..., Any], tmp_path: Path, files_of: Any
) -> None:
    featurize = ("featurize", "--backbone", "toy", "--source", SOURCE, "--set", "store.unit_rows=8")
    vla(*featurize, "--out", URL)
    vla(*featurize, "--out", tmp_path)
    here = {path: data for path, data in files_of(tmp_path / "toy").items() if not path.endswith("writer.lock")}
    assert {key.removeprefix("some/toy/"): data for key, data in bucket.objects.items()} == here

    assert "exists. Try: --resume" in vla(*featurize, "--out", URL, code=2).err
    del bucket.objects["some/toy/commits/unit-000001.json"]
    assert vla("verify", f"{URL}/toy", code=1).err.count("units 1 of s3://bucket/some/toy are not committed") == 1
    vla(*featurize, "--out", URL, "--resume")
    assert {key.removeprefix("some/toy/"): data for key, data in bucket.objects.items()} == here

    runs = []
    for store, run in ((f"{URL}/toy", tmp_path / "there"), (tmp_path / "toy", tmp_path / "here")):
        settings = [argument for text in (*TINY, "data.random_weights=true") for argument in ("--set", text)]
        vla("train-head", "mlp", "--store", store, "--out", run, "--steps", 3, *settings)
        runs.append({path: data for path, data in files_of(run).items() if path.endswith(".safetensors")})
    assert runs[0]
    assert runs[0] == runs[1]
    own = ["--set", f'data.stores=["{URL}/toy"]']  # a checkpoint never chooses an address
    errors = [
        json.loads(vla("evaluate", tmp_path / run, "--json", *given).out)
        for run, given in (("there", own), ("here", []))
    ]
    assert [error.pop("checkpoint") for error in errors]
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_inspect_and_verify_read_urls(bucket: Any, remote: str, vla: Callable[..., Any]) -> None:
    assert json.loads(vla("inspect", remote, "--json").out)["store"] == remote
    assert json.loads(vla("verify", remote, "--json").out)["ok"] is True
    shard = "some/s/frames/grid/c.1.0.0.0"
    bucket.objects[shard] = bucket.objects[shard][:-1] + b"?"
    report = json.loads(vla("verify", remote, "--repair", "--json").out)
    assert report["dropped"] == [1]
    assert "is a URL; expected a folder" in vla("convert", remote, "s3://bucket/other", "--format", "h5", code=2).err
    assert "s3://bucket/none is no store (holds nothing)" in vla("inspect", "s3://bucket/none", code=3).err
