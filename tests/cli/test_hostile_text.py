"""Text that others wrote, full of control characters, reaches the terminal without one of them."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.cli import main
from vla.terminal import reports
from vla.terminal.output import emit, open_log, open_out, show_facts, show_plan, show_rows
from vla.terminal.safe_text import guard_stderr, safe, safe_line
from vla.terminal.tables import draw_table

Write = Callable[..., Path]
EVIL = "\x1b[31mred\x1b]0;title\x07 \x9b31m \x7f \x08 \r over \u202egnp.exe\u202c \u2066 \ud800 [bold]b[/bold] :smile:"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(autouse=True)
def _plain_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets hooks of the process; a test leaves them as they were."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging, "lastResort", type(logging.lastResort)(logging.WARNING))  # stderr as it is then


def clean(text: str) -> str:
    """Return `text` after asserting that it holds no control character."""
    assert CONTROL.search(text) is None, ascii(text)
    return text


def test_control_characters_are_written_as_escapes_and_other_text_stays() -> None:
    assert clean(safe(EVIL)).startswith(r"\x1b[31mred\x1b]0;title\x07 \x9b31m \x7f \x08 \r over \u202egnp.exe")
    assert safe("pick – the cup\n\té 杯 🙂") == "pick – the cup\n\té 杯 🙂"
    assert safe_line("a\nvla: sound") == r"a\nvla: sound"


def _shown() -> list[Callable[[], None]]:
    """Return a call of everything that prints, with hostile text in every place."""
    facts = {EVIL: EVIL, "list": [EVIL], "table": {EVIL: EVIL}}
    plan = {"out": EVIL, "features": {EVIL: [1, EVIL]}, "weights_licence": EVIL, "assumed": {EVIL: EVIL}}
    plan |= dict.fromkeys(("episodes", "frames", "views", "units", "unit_rows", "bytes", "files"), 1)
    run = {"units": 0, "frames": 0, "busy": {}}
    errors: dict[str, Any] = {"per_dimension": {"mae": {EVIL: 1.0}, "executed_mae": {EVIL: 1.0}}}
    errors |= {"per_task": {EVIL: 1.0}, "windows": 1, "checkpoint": EVIL, "step": 1}
    return [
        lambda: show_facts(facts),
        lambda: show_rows(EVIL, [{"name": EVIL, EVIL: 1.0}]),
        lambda: show_plan(plan, False),
        lambda: show_plan(plan, True),
        lambda: emit(facts),
        lambda: open_log().print(EVIL),
        lambda: open_out().print(EVIL),
        lambda: draw_table(open_out(), (EVIL, EVIL), [(EVIL, EVIL)], whole=[0]),
        lambda: reports.show_featurized(EVIL, run, {EVIL: EVIL}, 2, False),
        lambda: reports.show_made(EVIL, facts, EVIL, False, {EVIL: EVIL}),
        lambda: reports.show_findings([EVIL]),
        lambda: reports.show_repair(EVIL, [EVIL], [EVIL], EVIL, EVIL),
        lambda: reports.show_errors(errors, {EVIL: 1.0}),
        lambda: reports.show_check({**facts, "statistics": {"action": [{"name": EVIL, "min": 0.0}]}}, [EVIL], EVIL),
        lambda: reports.show_parameters({EVIL: (1, 1)}),
        lambda: reports.show_fields([{"name": EVIL, "default": EVIL, "text": EVIL, "type": EVIL}], EVIL),
    ]


@pytest.mark.parametrize("number", range(len(_shown())))
def test_nothing_that_prints_passes_a_control_character_on(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    _shown()[number]()
    for text in capsys.readouterr():
        clean(text)
        assert "red" in text or not text


def test_markup_in_a_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts({"task": "[bold]b[/bold] :smile: [link=x]y"})
    assert "[bold]b[/bold] :smile: [link=x]y" in capsys.readouterr().out


def test_the_log_warnings_and_tracebacks_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    guard_stderr()
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.LogRecord("vla", logging.WARNING, "file.py", 1, "%s", (EVIL,), None))
    sys.excepthook(ValueError, ValueError(EVIL), None)
    sys.stderr.write(warnings.formatwarning(EVIL, UserWarning, "file.py", 1))
    assert clean(capsys.readouterr().err).count("red") == 3


@pytest.fixture
def vla(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """`vla(*arguments)` runs a command as `main` does and returns its exit code, stdout and stderr, both clean."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["vla", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, clean(out), clean(err)

    return run


def test_a_hostile_data_set_goes_through_every_command_without_a_control_byte(
    tmp_path: Path, write_lerobot: Write, vla: Callable[..., tuple[Any, str, str]]
) -> None:
    evil = EVIL.replace("\ud800", "").replace("/", "|")
    root = write_lerobot(tmp_path / f"set {evil}", tasks=[[evil]] * 3, lengths=(6, 7, 8))
    (root / "README.md").write_text(f"---\nlicense: {json.dumps(evil)}\n---\n", encoding="utf-8")
    store = tmp_path / "stores/pixels"
    code, _, err = vla("inspect", "--source", root)
    assert code == 0, err
    assert "red" in vla("action-dims", "--source", root)[1]
    assert vla("featurize", "--source", root, "--backbone", "pixels", "--out", tmp_path / "stores")[0] == 0
    for more in ((), ("--json",)):
        assert "red" in vla("inspect", store, *more)[1]
    assert vla("verify", store)[0] == 0
    small = ("--steps", 2, "--set", "train.batch_size=2", "--set", "model.hidden=8", "--set", "data.validation=0.3")
    assert vla("train-head", "mlp", "--store", store, "--out", tmp_path / f"run {evil}", *small)[0] == 0
    assert vla("evaluate", tmp_path / f"run {evil}")[0] == 0
    (root / "meta/info.json").write_text("{" + evil, encoding="utf-8")
    for command in ("inspect", "action-dims", "featurize"):
        assert vla(command, "--source", root, *(("--backbone", "toy") if command == "featurize" else ()))[0] in (1, 3)
    for command in (
        ["evaluate", evil],
        ["verify", evil],
        ["inspect", evil],
        ["heads", evil],
        [evil],
        ["export", evil, "--out", evil],
    ):
        assert vla(*command)[0] in (2, 3), command
