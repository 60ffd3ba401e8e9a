"""`vla train-head HEAD --help`: the command's help, and below it where that head's own settings are told."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class HeadHelp(TyperCommand):
    """A command whose first argument names what it makes. Nothing heavy is imported to tell about it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look at the words before `--help` ends the parsing."""
        named = next((word for word in args if not word.startswith("-")), None)
        if named is not None:
            self.epilog = f"Every setting of {named}, its default and its meaning: vla heads {named}"
        return super().parse_args(ctx, args)
