"""Before a command runs: help in panels, a wrong command line in one line, Ctrl-C and a closed pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from vla.cli import app
from vla.stores.errors import UsageError
from vla.terminal import output, reports, tables
from vla.terminal.run_app import run_app

COMMANDS = sorted(command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands)


@pytest.fixture(autouse=True)
def _a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)  # its variable is read when it is imported


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_fits_a_screen_and_groups_every_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, [command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert f"Usage: vla {command}" in " ".join(lines)
    panels = [line.strip("╭╮─ ") for line in lines if line.startswith("╭")]
    assert "Options" not in panels  # an option without a panel, or --help alone above all others
    assert panels[-1] == "Settings and output"


def test_shared_options_stand_in_the_same_panels_in_all_commands() -> None:
    places: dict[str, set[str | None]] = {}
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            if option.param_type_name == "option":
                places.setdefault(option.opts[0], set()).add(option.rich_help_panel)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_without_a_word_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, []) == 0
    assert "featurize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--versoin"], "No such option: --versoin"),
        (["exprt"], "Did you mean 'export'. Try: vla --help"),
        (["export", "run"], "Missing option '--out'. Try: vla export --help"),
        (["train-head", "mlp", "--stores", "x"], "--store). Try: vla train-head --help"),
        (["rollout", "run", "--env", "e", "--episodes", "0"], "greater than or equal to 1. Try: vla rollout --help"),
        (["rollout", "run", "--env", "e", "--n-action", "0"], "greater than or equal to 1. Try: vla rollout --help"),
        (["rollout", "run", "--env", "e", "--seed", "-1"], "greater than or equal to 0. Try: vla rollout --help"),
        (["export", "run", "--out", "x.pt2", "--batch", "0"], "greater than or equal to 1. Try: vla export --help"),
        (["featurize", "--resume", "--overwrite"], "--resume and --overwrite; expected one of them"),
        (["train-head", "mlp", "--overwrite", "--resume"], "--resume and --overwrite; expected one of them"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app, arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("vla: ")) == ("", 1, True)
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train-head", "mlp"], r"^data.stores is not given. Try: --store STORE$"),
        (["distill", "rgb2pc", "--store", "x"], r"^data.teacher is not given. Try: --teacher PLACE$"),
        (["featurize"], r"^backbone is not given. Try: --backbone NAME; `vla backbones` lists them$"),
        (["evaluate", "run", "--set", "model=3"], r"^settings: model = 3: "),
        (
            ["record", "metawrld", "--task", "push-v3", "--out", "x"],
            "did you mean 'metaworld'",
        ),
    ],
)
def test_what_is_missing_or_unknown_is_named_with_what_to_type(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run_app(app, arguments)


def test_a_mistake_is_said_to_be_in_the_file_only_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[train]\nstepps = 3\n")
    begin = ["train-head", "mlp", "--store", "x", "--config", str(file)]
    with pytest.raises(UsageError, match=r"a\.toml: unknown key 'train.stepps', did you mean 'steps'"):
        run_app(app, begin)
    file.write_text("[train]\nsteps = 3\n")
    with pytest.raises(UsageError, match=r"^settings: unknown key 'train\.lrr', did you mean 'lr'"):
        run_app(app, [*begin, "--set", "train.lrr=1"])
    with pytest.raises(UsageError, match=r"^settings: train\.steps = 0"):
        run_app(app, [*begin, "--steps", "0"])


def test_a_config_file_without_a_source_means_the_shipped_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("{}\n")
    assert run_app(app, ["action-dims", "--config", str(tmp_path / "a.yaml"), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["tasks"][0]["episodes"] == 100


def test_ctrl_c_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = typer.Typer()

    @stopped.command()
    def wait(for_what: str) -> None:
        raise KeyboardInterrupt

    assert run_app(stopped, ["Godot"]) == 130
    assert capsys.readouterr().err == "vla: interrupted; what was committed is kept, --resume goes on\n"


@pytest.mark.parametrize("words", [["backbones"], ["--help"]])
def test_a_reader_that_has_had_enough_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vla.cli", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


EVIL = "put the [red] cube [/into] the :warning: [box"
DIMS = SimpleNamespace(task=EVIL, episodes=1, names=(EVIL,))
PLAN = {"out": EVIL, "episodes": 1, "frames": 2, "views": 1, "features": {EVIL: [1, "float16"]}, "units": 1}
PLAN |= {"unit_rows": 2, "bytes": 1, "files": 1, "weights_licence": EVIL}
RAN = {"units": 1, "frames": 1, "frames_per_s": 1.0, "busy": {}, "bottleneck": EVIL}
ERRORS = {"per_dimension": {}, "per_task": {EVIL: 1.0}, "windows": 1, "checkpoint": EVIL, "step": 1}
SHOWN: dict[str, Callable[[], None]] = {
    "facts": lambda: output.show_facts({"tasks": EVIL, "all": [EVIL]}),
    "rows": lambda: output.show_rows(EVIL, [{"name": EVIL, "mean": 1.0}]),
    "plan": lambda: output.show_plan(PLAN, False),
    "table": lambda: tables.draw_table(output.open_out(), [EVIL], [[EVIL]]),
    "made": lambda: reports.show_made(Path(EVIL), {}, EVIL, False, {EVIL: EVIL}),
    "featurized": lambda: reports.show_featurized(Path(EVIL), RAN, {}, 1, False),
    "nothing missing": lambda: reports.show_featurized(Path(EVIL), RAN | {"units": 0}, {}, 1, False),
    "trained": lambda: reports.show_trained(Path(EVIL), 1, {EVIL: 1.0}, {}, False),
    "groups": lambda: reports.show_groups(Path(), {"a": (Path(EVIL), 1, {EVIL: 1.0})}, False),
    "findings": lambda: reports.show_findings([EVIL]),
    "repair": lambda: reports.show_repair(EVIL, [EVIL], [], "", ""),
    "check": lambda: reports.show_check({"tasks": EVIL}, [], EVIL),
    "line": lambda: reports.print_line(EVIL),
    "fields": lambda: reports.show_fields([{"name": EVIL, "default": EVIL, "text": EVIL, "type": EVIL}], EVIL),
    "parameters": lambda: reports.show_parameters({EVIL: (1, 1)}),
    "errors": lambda: reports.show_errors(ERRORS, {EVIL: 1.0}),
    "dims": lambda: reports.show_dims({(1, 2): [DIMS]}),
}


@pytest.mark.parametrize("what", SHOWN)
def test_texts_and_paths_are_shown_as_they_are(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instruction may hold brackets and colons, and so may the name of a folder."""
    monkeypatch.setenv("COLUMNS", "400")
    SHOWN[what]()
    shown = capsys.readouterr()
    assert EVIL in shown.out + shown.err
    assert "\\" not in shown.out + shown.err


def test_a_summary_stands_dim_below_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    reports.show_heads([{"head": "fm", "summary": "a [head]", "needs": ["[V, C]"], "commands": []}])
    shown = capsys.readouterr().out
    assert "a [head]" in shown
    assert "[V, C]" in shown
    assert "dim" not in shown
