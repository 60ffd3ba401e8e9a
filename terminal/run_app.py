"""Running the commands so that whatever typer would end in its own way ends in ours: one line, one exit code."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from vla.stores.interrupt import catch_signals
from vla.terminal.help import KEPT, InterruptedCommand
from vla.terminal.safe_text import safe_line
from vla.terminal.streams import OutputError, end_output


def run_app(app: typer.Typer, arguments: Sequence[str], *, process: bool = False) -> int:
    """Run the command that `arguments` name and return its exit code; without any, show the help.

    Where they are wrong, one line on stderr says what was found and what to type, and 2 is returned; 128 + n after
    signal n, 130 after Ctrl-C; 4 where the result cannot be written to stdout. What a command raises on purpose is
    raised. `process`: the command is all that this process does; a second signal ends the process.
    """
    # No shell but zsh expands the tilde of `--out=~/stores`, and a folder named ~ is dangerous to delete.
    arguments = [re.sub(r"^(--[a-z-]+=)~(?=/|$)", lambda flag: f"{flag[1]}{Path.home()}", word) for word in arguments]
    wrong: Any = typer.BadParameter.__base__  # click's UsageError, which typer exports under no name
    try:
        with catch_signals(process=process):
            code = app(list(arguments) or ["--help"], prog_name="vla", standalone_mode=False)
    except wrong as error:
        sys.stderr.write(f"vla: {safe_line(_one_line(error))}\n")
        return 2
    except InterruptedCommand as ended:
        code = _interrupted(ended.number, ended.left)
    except KeyboardInterrupt as error:
        code = _interrupted(getattr(error, "number", signal.SIGINT), KEPT)
    except OutputError as error:
        return end_output(0, error)
    else:
        if code == 128 + signal.SIGINT:  # typer's own answer to Ctrl-C outside a command of ours
            code = _interrupted(signal.SIGINT, KEPT)
    return end_output(code or 0)


def _interrupted(number: int, left: str) -> int:
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    sys.stderr.write(f"vla: interrupted{by}; {left}\n")
    return 128 + number


def _one_line(error: Any) -> str:
    """Write a complaint of typer's about the command line as ours are written."""
    said = " ".join(error.format_message().split()).rstrip(".?")
    return f"{said}. Try: {error.ctx.command_path if error.ctx else 'vla'} --help"
