"""Running the commands so that whatever typer would end in its own way ends in ours: one line, one exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from vla.terminal.streams import OutputError, end_output

INTERRUPTED = 130


def run_app(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name and return its exit code; without any, show the help.

    Where they are wrong, one line on stderr says what was found and what to type, and 2 is returned; 130 after Ctrl-C;
    4 where the result cannot be written to stdout. What a command raises on purpose is raised.
    """
    wrong: Any = typer.BadParameter.__base__  # click's UsageError, which typer exports under no name
    try:
        code = app(list(arguments) or ["--help"], prog_name="vla", standalone_mode=False)
    except wrong as error:
        sys.stderr.write(f"vla: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OutputError as error:
        return end_output(0, error)
    if code == INTERRUPTED:
        sys.stderr.write("vla: interrupted; what was committed is kept, --resume goes on\n")
    return end_output(code or 0)


def _one_line(error: Any) -> str:
    """Write a complaint of typer's about the command line as ours are written."""
    said = " ".join(error.format_message().split()).rstrip(".?")
    return f"{said}. Try: {error.ctx.command_path if error.ctx else 'vla'} --help"
