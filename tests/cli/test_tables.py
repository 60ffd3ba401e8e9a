"""Tables of every command at 80 and at 60 columns: words, commands and paths are whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.text import Text

from vla.cli import app
from vla.featurize.backbones.registry import BACKBONES, missing
from vla.heads.compatibility import table
from vla.terminal import output, reports
from vla.terminal.run_app import run_app
from vla.terminal.tables import WORD, wrap

COMMAND = "vla featurize --backbone da3 --set options.picture=[480,640] --set options.features=ray_full"
FOLDER = "/data/of several words/runs/pi05-siglip-prefix-da3/checkpoints/step-00010000"
NAME = "left_arm_shoulder_pitch_joint_velocity_command"
TEXT = "lift the cup from the counter and put it on the upper shelf, then close the door of the cupboard"
DIMS = [SimpleNamespace(task=f"{TEXT} {number}", episodes=3, names=(NAME, "gripper")) for number in range(2)]
ERRORS = {"mae": {NAME: 1.0, "dx": 2.0}, "executed_mae": {NAME: 1.0, "dx": 2.0}, "baseline_mae": {NAME: 1.0, "dx": 2.0}}
FACTS = {"per_dimension": ERRORS, "per_task": {TEXT: 1.0, COMMAND: 2.0}, "windows": 9, "checkpoint": FOLDER, "step": 1}
FIELD = {"name": f"model.{NAME}", "default": '["a b", "c"]', "text": f"{TEXT}: `{COMMAND}`", "type": "str"}
ENTRY = {"summary": TEXT, "features": "grid [14, 14, 112]", "parameters": "1 M", "code_licence": "MIT"}
ENTRY |= {"weights_licence": "MIT"}
STATISTICS = {"name": NAME, "min": -1.23456e-7, "max": 1e9, "mean": 0.1, "std": 0.2, "q01": 0.3, "q99": 0.4}
PLAN = {"out": FOLDER, "episodes": 1, "frames": 2, "views": 1, "features": {NAME: [1, "float16"]}, "units": 1}
PLAN |= {"unit_rows": 2, "bytes": 1, "files": 1, "weights_licence": TEXT}

SHOWN: dict[str, tuple[Callable[[], None], list[str]]] = {
    "backbones": (lambda: reports.show_backbones({"da3": {**ENTRY, "missing": [COMMAND, "cd x"]}}), [COMMAND, "cd x"]),
    "heads": (
        lambda: reports.show_heads([{"head": "fm", "summary": TEXT, "needs": [NAME], "commands": [COMMAND]}]),
        [COMMAND],
    ),
    "settings": (lambda: reports.show_fields([FIELD], "how"), [f"model.{NAME}", COMMAND, '= ["a b", "c"]']),
    "inspect": (lambda: output.show_facts({"store": FOLDER, "tasks": [TEXT, FOLDER]}), [FOLDER, f'"{FOLDER}"']),
    "inspect --source": (
        lambda: reports.show_check({"statistics": {"action": [STATISTICS]}}, [f"{FOLDER}: {TEXT}"], FOLDER),
        [NAME, "-1.235e-07", f"{FOLDER}: {TEXT}"],
    ),
    "evaluate": (lambda: reports.show_errors(FACTS, {}), [NAME, FOLDER]),
    "rollout": (lambda: reports.show_made(FOLDER, {}, TEXT, False, {FOLDER: TEXT}), [f"{FOLDER}: {TEXT}"]),
    "verify": (lambda: reports.show_findings([f"{FOLDER}: {COMMAND}"]), [f"{FOLDER}: {COMMAND}"]),
    "action-dims": (lambda: reports.show_dims({(2, 3): DIMS}), [NAME, "gripper"]),
    "featurize": (lambda: output.show_plan(PLAN, False), [FOLDER]),
}


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("what", SHOWN)
def test_words_commands_and_paths_of_a_table_are_whole(
    what: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show, whole = SHOWN[what]
    show()
    shown = "".join(capsys.readouterr())
    assert [text for text in whole if text not in shown] == []
    assert "…" not in shown
    words = {word.strip('"`:[],') for word in re.sub("[│┃]", " ", shown).split()}
    assert what in ("inspect --source", "verify") or set(TEXT.replace(",", "").split()) <= words


@pytest.mark.parametrize("columns", [80, 60])
def test_the_listings_hold_every_command_and_every_word(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run_app(app, ["backbones"]) == 0
    shown = capsys.readouterr().out
    for name, entry in BACKBONES.items():
        assert all(command in shown for command in missing(name))
        texts = f"{name} {entry.summary} {entry.features} {entry.parameters} {entry.code_licence}"
        words = shown.replace(";", " ").split()
        assert [word for word in texts.replace(";", " ").split() if word not in words] == []
    assert run_app(app, ["heads"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for row in table() for command in row["commands"])


def test_lines_that_can_be_broken_fit_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for words in (["backbones"], ["heads"], ["heads", "pi05"]):
        assert run_app(app, words) == 0
        too_long = [line for line in capsys.readouterr().out.splitlines() if cell_len(line) > 60]
        commands = ("git clone", "hf download", "pip install", "vla ")
        assert [line for line in too_long if not any(command in line for command in commands)] == []


def test_text_is_wrapped_by_its_width_on_the_screen_and_loses_nothing() -> None:
    text = f'{TEXT} 红色方块 {NAME} `{COMMAND}` ["{TEXT}"] [1, 2, 3]'
    for width in range(1, 120):
        lines = [line.plain for line in wrap(Text(text), width)]
        assert [word for line in lines for word in WORD.findall(line)] == WORD.findall(text)
        assert all(cell_len(line) <= width or len(WORD.findall(line)) == 1 for line in lines)
