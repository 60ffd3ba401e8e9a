"""stdout and stderr that are full, closed, or of an encoding that lacks a character: one line, the right exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from vla.cli import app
from vla.stores.errors import VlaError
from vla.terminal import output, reports, tables
from vla.terminal.progress import show_training, show_workers
from vla.terminal.run_app import run_app
from vla.terminal.streams import LogStream, ResultStream, end_output

CHINESE = "把红色方块放进盒子 │ é \udcff"
"""The last is a byte of a file's name that is no UTF-8, as Python decodes one."""
MAIN = "from vla.cli import main; main()"

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def make_named_store(folder: Path, make_store: Callable[..., Any]) -> Path:
    """A store whose name, columns and path lack an ASCII form."""
    return cast(Path, make_store(folder / "红色", features={"grid": ((1, 2), "float16")}).root)


class Full(io.BytesIO):
    """A file on a full disk. (A file object over /dev/full warns as it is closed.)"""

    def write(self, data: Any, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Screen(io.BytesIO):
    def isatty(self) -> bool:
        return True


class FullScreen(Screen, Full):
    pass


def streams(monkeypatch: pytest.MonkeyPatch, out: BinaryIO, err: BinaryIO, encoding: str = "ascii") -> None:
    monkeypatch.setattr(sys, "stdout", ResultStream(cast(Any, out), encoding, "backslashreplace"))
    monkeypatch.setattr(sys, "stderr", LogStream(cast(Any, err), encoding, "backslashreplace"))


def run_shell(line: str, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `vla` by a shell, whose redirections stand in `line` after "$@"."""
    command = ["bash", "-c", line, "bash", sys.executable, "-c", MAIN, *words]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("words", [["backbones"], ["heads"], ["heads", "mlp"], ["--help"], ["train-head", "--help"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_stdout_is_one_line_and_exit_code_4(
    words: list[str], as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.BytesIO()
    streams(monkeypatch, Full(), said)
    assert run_app(app, [*words, "--json"] if as_json and "--help" not in words else words) == 4
    sys.stdout.flush()  # as Python does at the end
    sys.stderr.flush()
    assert said.getvalue().count(b"\n") == 1
    assert said.getvalue().startswith(b"vla: ")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", [["--version"], ["backbones", "--json"]])
def test_a_full_stdout_is_exit_code_4_in_an_unbuffered_process_too(words: list[str], buffered: str) -> None:
    """Container images set PYTHONUNBUFFERED, and typer writes nothing to a stream to find out what the stream takes."""
    done = run_shell('"$@" >/dev/full', *words, PYTHONUNBUFFERED=buffered)
    assert (done.returncode, done.stderr.count(b"\n")) == (4, 1), done.stderr


@pytest.mark.parametrize(("code", "ends"), [(0, 4), (1, 1), (3, 3)])
def test_a_lost_result_hides_no_failure(code: int, ends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(monkeypatch, Full(), io.BytesIO())
    sys.stdout.write("a result that is still in the buffer")
    assert end_output(code) == ends


@pytest.mark.parametrize(
    ("line", "words", "code", "lines"),
    [
        ('"$@" >/dev/full', ["inspect", "STORE"], 4, 1),
        ('"$@" >&-', ["inspect", "STORE", "--json"], 4, 1),
        ('"$@" >&- 2>&-', ["inspect", "STORE"], 4, 0),
        ('"$@" <&- >&- 2>/dev/full', ["verify", "/nonexistent"], 3, 0),
        ('"$@" 2>&-', ["verify", "/nonexistent"], 3, 0),
        ('"$@" >&-', ["verify", "STORE"], 0, 2),  # its result is the exit code; the lines are the log
        ('set -o pipefail; "$@" | true', ["inspect", "STORE", "--json"], 0, 0),
    ],
)
def test_the_exit_code_says_what_became_of_the_result(
    line: str, words: list[str], code: int, lines: int, tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    store = make_named_store(tmp_path, make_store)
    done = run_shell(line, *(str(store) if word == "STORE" else word for word in words))
    assert (done.returncode, done.stderr.count(b"\n")) == (code, lines), done.stderr
    assert b"Traceback" not in done.stderr


def test_a_closed_stdout_is_not_the_number_of_a_file_that_is_written(tmp_path: Path) -> None:
    """The first file opened would be descriptor 1, and what a library prints would go into it."""
    source = ["featurize", "--backbone", "toy", "--source", "synthetic:episodes=2,length=[3,3],cameras=1"]
    code = MAIN.replace("main()", "import os, threading; threading.Timer(0, lambda: os.write(1, b'x')); main()")
    line = '"$@" >&- 2>&-'
    command = ["bash", "-c", line, "bash", sys.executable, "-c", code, *source, "--out", str(tmp_path)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        streams(patch, io.BytesIO(), io.BytesIO())
        assert run_app(app, ["verify", str(tmp_path / "toy")]) == 0


def test_json_in_an_ascii_locale_is_escaped_and_nothing_is_replaced(
    tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    store = make_named_store(tmp_path, make_store)
    done = run_shell('"$@"', "verify", str(store), "--json", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"] == []
    done = run_shell('"$@"', "inspect", str(store), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


SHOWN: dict[str, Callable[[], None]] = {
    "facts": lambda: output.show_facts({"tasks": CHINESE, CHINESE: [CHINESE]}),
    "rows": lambda: output.show_rows(CHINESE, [{"name": CHINESE, "mean": 1.0}]),
    "table": lambda: tables.draw_table(output.open_out(), [CHINESE], [[CHINESE]]),
    "line": lambda: reports.print_line(CHINESE),
    "findings": lambda: reports.show_findings([CHINESE]),
    "left out": lambda: reports.show_left_out({CHINESE: CHINESE}),
    "heads": lambda: reports.show_heads([{"head": "fm", "summary": CHINESE, "needs": [CHINESE], "commands": []}]),
    "json": lambda: output.emit({CHINESE: CHINESE}),
}


@pytest.mark.parametrize("what", SHOWN)
def test_a_character_that_the_encoding_lacks_is_escaped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    streams(monkeypatch, out, err)
    SHOWN[what]()
    sys.stdout.flush()
    sys.stderr.flush()
    shown = out.getvalue() + err.getvalue()
    assert shown.isascii()
    assert b"\\u7ea2" in shown


@pytest.mark.parametrize("full", [False, True])
def test_progress_bars_draw_on_an_ascii_screen_and_are_dropped_on_a_full_one(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = FullScreen() if full else Screen()
    streams(monkeypatch, io.BytesIO(), screen)
    with show_workers("featurize", CHINESE) as workers, show_training() as training:
        workers({CHINESE: 1, "b": 2}, 3)
        training(1, 2, {"loss": 1.0})
    sys.stderr.flush()
    assert full or (screen.getvalue().isascii() and b"featurize" in screen.getvalue())


def test_an_error_that_names_a_path_is_one_line_on_an_ascii_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.BytesIO()
    streams(monkeypatch, io.BytesIO(), err)
    with pytest.raises(VlaError) as caught:
        run_app(app, ["inspect", f"/nonexistent/{CHINESE}"])
    sys.stderr.write(f"vla: {caught.value}\n")
    sys.stderr.flush()
    assert (err.getvalue().isascii(), err.getvalue().count(b"\n")) == (True, 1)
