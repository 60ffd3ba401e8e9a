"""What the commands have beyond typer's. Nothing heavy is imported to tell about a command."""

from __future__ import annotations

import signal
from typing import Any

from typer.core import TyperCommand

from vla.terminal.options import SETTINGS

KEPT = "what was committed is kept, --resume goes on"


class InterruptedCommand(BaseException):
    """A signal ended a command. No `KeyboardInterrupt`: typer turns those into a bare exit code 130.

    `number` is the signal's; `left` says what the command left and what to type.
    """

    def __init__(self, number: int, left: str) -> None:
        super().__init__(number, left)
        self.number, self.left = number, left


class Command(TyperCommand):
    """A command whose `--help` stands beside `--json` and `--set`, not in a panel of its own above all others."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return typer's option, with a panel."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = SETTINGS
        return option

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn a signal that ended the command into `InterruptedCommand`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            notes = getattr(error, "__notes__", [])
            left = KEPT if "resume" in ctx.params else "the same command begins again"
            number = getattr(error, "number", signal.SIGINT)
            raise InterruptedCommand(number, "; ".join(notes) or left) from error

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse flags of which one would throw away what the other is to keep."""
        rest = super().parse_args(ctx, args)
        if ctx.params.get("resume") and ctx.params.get("overwrite"):
            ctx.fail("--resume and --overwrite; expected one of them")
        return rest


class HeadCommand(Command):
    """A command whose first argument names a head: its help says where that head's own settings are told."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look at the words before `--help` ends the parsing."""
        named = next((word for word in args if not word.startswith("-")), None)
        if named is not None:
            self.epilog = f"Every setting of {named}, its default and its meaning: vla heads {named}"
        return super().parse_args(ctx, args)
