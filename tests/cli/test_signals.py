"""SIGTERM and its kind end every command as Ctrl-C does: one line, 128 + n, and what was committed is kept."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla.cli import app
from vla.featurize.backbones.toy import Toy
from vla.stores.commits import committed_units
from vla.stores.interrupt import REPEAT_SECONDS, SIGNALS
from vla.terminal.run_app import run_app
from vla.training.state import TrainState

pytestmark = pytest.mark.usefixtures("default_signals")

SOURCE = "synthetic:episodes=2,length=[9,9],cameras=1"
TOY = ["featurize", "--backbone", "toy", "--source", SOURCE, "--set", "store.unit_rows=4", "--set", "batch_size=2"]

WAITING = """
import sys, time, typer
from vla.terminal.help import Command
from vla.terminal.run_app import run_app
app = typer.Typer()

@app.command(cls=Command)
def wait(resume: bool = False, clean_up: float = 0) -> None:
    try:
        print("ready", flush=True)
        time.sleep(50)
    finally:
        print("cleaning", flush=True)
        time.sleep(clean_up)

sys.exit(run_app(app, sys.argv[1:], process=True))
"""


def raise_at(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, call: int, number: signal.Signals) -> None:
    """Have the call of that number, from 1, of a method end in a signal to this process."""
    inner, calls = getattr(cls, method), []

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return inner(self, *arguments)

    monkeypatch.setattr(cls, method, counted)


@pytest.mark.parametrize("number", SIGNALS)
def test_featurize_keeps_whole_units_and_resumes_to_the_same_bytes(
    memory_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    files_of: Callable[[Path], dict[str, bytes]],
) -> None:
    assert run_app(app, [*TOY, "--out", str(memory_path / "whole")]) == 0
    command = [*TOY, "--out", str(memory_path / "stopped")]
    with monkeypatch.context() as patched:
        raise_at(patched, Toy, "encode", 9, number)  # three batches are the estimate's, two more make a unit
        capsys.readouterr()
        assert run_app(app, command) == 128 + number
    root = memory_path / "stopped" / "toy"
    done = len(committed_units(root))
    assert 1 <= done < 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{done} of 5 units" in last
    assert "--resume" in last
    assert (number.name in last) == (number != signal.SIGINT)
    assert run_app(app, [*command, "--resume"]) == 0
    assert files_of(root) == files_of(memory_path / "whole" / "toy")


def test_training_names_its_checkpoint_and_resumes(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, [*TOY, "--out", str(memory_path)]) == 0
    small = ["model.encoder.components=4", "model.hidden=8", "model.horizon=4", "model.encoder.dim=8"]
    small += ["train.batch_size=2", "data.validation=0", "train.steps=6"]
    run = memory_path / "run"
    command = ["train-head", "mlp", "--store", str(memory_path / "toy"), "--out", str(run)]
    command += [word for setting in small for word in ("--set", setting)]
    with monkeypatch.context() as patched:
        raise_at(patched, TrainState, "update", 4, signal.SIGTERM)
        capsys.readouterr()
        assert run_app(app, command) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search("SIGTERM.*step 4 .*--resume", last)
    assert (run / "checkpoints" / "step-00000004" / "complete.json").is_file()
    assert run_app(app, [*command, "--resume"]) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("words", [["backbones"], ["heads", "mlp"]])
def test_a_command_without_resume_does_not_advise_it(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shows in ("show_backbones", "show_fields"):
        monkeypatch.setattr(f"vla.terminal.reports.{shows}", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert run_app(app, words) == 128 + signal.SIGUSR1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--resume" not in err


def test_after_a_command_every_signal_does_what_it_did_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run_app(app, ["heads", "--json"]) == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def start(*arguments: str, ignored: str = "") -> subprocess.Popen[str]:
    """Begin the waiting command, in a shell that has some signals ignored, and wait until it runs."""
    shell = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"" if ignored else 'exec "$@"', "sh"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*shell, sys.executable, "-c", WAITING, *arguments], **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_was_inherited_as_ignored_stays_ignored_and_the_rest_is_answered() -> None:
    process = start("--resume", ignored="INT HUP")
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert "SIGTERM" in err


def test_a_second_signal_ends_a_process_at_once_but_not_one_sent_twice_in_a_moment() -> None:
    process = start("--clean-up", "50")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)  # as `timeout` does: to the process, and to its group
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(REPEAT_SECONDS + 0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_ctrl_c_twice_ends_a_process_however_fast_it_is_typed() -> None:
    process = start("--clean-up", "50")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
