"""What may be typed: bare values for lists, devices, other names of a dtype, --version, and what TAB offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vla import __version__
from vla.cli import app
from vla.featurize.job import FeaturizeConfig
from vla.heads.train import HeadTrainConfig
from vla.stores.errors import UsageError
from vla.stores.settings import Settings, nearest
from vla.terminal.run_app import run_app
from vla.training.torch_device import choose_device


class Lists(Settings):
    names: tuple[str, ...] = ()
    numbers: list[int] | None = None
    mixed: tuple[int | str, ...] | None = None
    pair: tuple[int, int] = (1, 2)
    either: str | tuple[str, ...] = ""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("names=tensorboard", ("tensorboard",)),
        ("numbers=3", [3]),
        ("mixed=x", ("x",)),
        ("mixed=4", (4,)),
        ('names=["a","b"]', ("a", "b")),
        ("either=a", "a"),
        ("numbers=null", None),
    ],
)
def test_a_bare_value_of_a_list_is_its_one_element(text: str, wanted: Any) -> None:
    assert getattr(Lists.from_sources(None, [text]), text.partition("=")[0]) == wanted


@pytest.mark.parametrize("text", ["pair=3", "names=true", "numbers=x"])
def test_a_bare_value_that_is_no_element_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        Lists.from_sources(None, [text])


def test_a_tracker_needs_no_brackets() -> None:
    begin = ["data.stores=s", "data.features=grid", "train.trackers=tensorboard"]
    config = HeadTrainConfig.from_sources(None, begin, head="mlp")
    assert (config.train.trackers, config.data.stores, config.data.features) == (("tensorboard",), ("s",), ("grid",))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("fp16", "float16"),
        ("half", "float16"),
        ("f16", "float16"),
        ("FP16", "float16"),
        ("bf16", "bfloat16"),
        ("f32", "float32"),
        ("single", "float32"),
        ("i8", "int8"),
        ("flaot16", "float16"),
    ],
)
def test_another_name_of_a_dtype_is_answered_with_ours(said: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"store.dtype.*did you mean '{meant}'"):
        FeaturizeConfig.from_sources(None, [f"store.dtype={said}"], backbone="toy")


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("train.precision=float16", "fp16"),
        ("train.precision=bfloat16", "bf16"),
        ("train.precision=fp32", "no"),
        ("train.schedule=Cosin", "cosine"),
        ("data.shuffle=block", "blocks"),
    ],
)
def test_every_choice_suggests_the_nearest(setting: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        HeadTrainConfig.from_sources(None, ["data.stores=s", setting], head="mlp")


@pytest.mark.parametrize(("name", "meant"), [("gpu", "cuda"), ("CUDA", "cuda"), ("cpu:0", "cpu"), ("cudo:1", "cuda")])
def test_a_device_suggests_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        choose_device(name)


@pytest.mark.parametrize(
    "words",
    [
        ["record", "meta-world", "--task", "push-v3", "--out", "x"],
        ["train-head", "mlp", "--store", "s", "--out", "x", "--group-by", "action_dim"],
    ],
)
def test_a_choice_outside_the_settings_suggests_the_nearest(words: list[str]) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        run_app(app, words)


def test_a_word_like_none_of_the_choices_suggests_none() -> None:
    assert nearest("x", ["float16", "int8"]) == ""


def complete(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what TAB offers behind a command line."""
    monkeypatch.setenv("_VLA_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    with pytest.raises(SystemExit):
        run_app(app, [])
    return [line.split('"')[1].replace("\\", "") for line in capsys.readouterr().out.splitlines() if '"' in line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("vla featurize --backbone eff", ["efficientnet"]),
        ("vla featurize --dtype bf", ["bfloat16"]),
        ("vla featurize --source ler", ["lerobot:"]),
        ("vla featurize --source syn", ["synthetic", "synthetic:"]),
        ("vla train-head pi", ["pi0", "pi05"]),
        ("vla heads tr", ["track"]),
        ("vla rollout runs/a --env meta", ["metaworld:"]),
        ("vla record rob", ["robosuite"]),
        ("vla import rep", ["replay-buffer"]),
        ("vla train-head fm --store sto", ["stores/", "stores/toy"]),
        ("vla verify stores/t", ["stores/toy"]),
        ("vla inspect ", ["stores/", "stores/toy"]),
        ("vla evaluate ru", ["runs/", "runs/fm-toy"]),
        ("vla evaluate runs/g", ["runs/group/"]),
        ("vla export runs/group/", ["runs/group/dim-2"]),
        ("vla train-head fm --from runs/f", ["runs/fm-toy"]),
    ],
)
def test_tab_offers_names_and_what_is_on_disk(
    words: str,
    offered: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("stores/toy/zarr.json", "runs/fm-toy/run.json", "runs/group/dim-2/run.json", "other/x"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    assert sorted(complete(words, monkeypatch, capsys)) == offered


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["--version"]) == 0
    assert capsys.readouterr().out == f"vla {__version__}\n"


LIGHT = """
import json, sys
from vla.cli import app
from vla.terminal.run_app import run_app
try:
    run_app(app, sys.argv[1:])
finally:
    sys.stderr.write(json.dumps(sorted(sys.modules.keys() & {"torch", "numpy", "pydantic", "zarr"})))
"""


def test_neither_the_version_nor_tab_imports_torch() -> None:
    environment = {**os.environ, "_VLA_COMPLETE": "", "_TYPER_COMPLETE_ARGS": ""}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LIGHT, "--version"], capture_output=True, text=True, env=environment)
    assert time.perf_counter() - began < 5  # 0.2 s on a quiet machine
    assert json.loads(done.stderr) == []
    for words in ("vla featurize --backbone e", "vla train-head p", "vla rollout runs/x --env m"):
        environment |= {"_VLA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, env=environment)
        assert done.stdout.strip()
        assert "torch" not in json.loads(done.stderr)
