"""Tables, JSON and the log of the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vla.terminal.safe_text import safe_json
from vla.terminal.tables import draw_pairs, draw_table

if TYPE_CHECKING:  # rich is imported when something is shown
    from rich.console import Console


def figures(values: Mapping[str, float]) -> str:
    """Write named numbers in a row."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def open_log() -> Console:
    """Return the console on stderr; see `SafeConsole`."""
    from vla.terminal.console import SafeConsole

    return SafeConsole(stderr=True, soft_wrap=True)


def open_out() -> Console:
    """Return the console on stdout; see `SafeConsole`."""
    from vla.terminal.console import SafeConsole

    return SafeConsole()


def emit(value: Any) -> None:
    """Print one JSON value on stdout."""
    sys.stdout.write(safe_json(value) + "\n")


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print what `vla featurize` is about to write."""
    if as_json:
        emit(plan)
        return
    features = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in plan["features"].items())
    open_log().print(
        f"{plan['out']}: {plan['episodes']} episodes, {plan['frames']} frames x {plan['views']} views -> {features}; "
        f"{plan['units']} units of {plan['unit_rows']} frames, {plan['bytes'] / 2**20:.1f} MiB in {plan['files']} files"
        f"; weights: {plan['weights_licence']}"
    )
    for line in plan.get("warnings", ()):
        open_log().print(f"warning: {line}", markup=False)
    for name, value in plan.get("assumed", {}).items():
        open_log().print(f"ASSUMED: {name} = {value}", style="bold")
    if plan.get("frames_per_s"):
        open_log().print(
            f"{plan['pending_units']} units to make, about {_duration(plan['hours'] * 3600)} at "
            f"{plan['frames_per_s']:.1f} frames/s (three batches tried)"
        )


def _duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_facts(facts: dict[str, Any]) -> None:
    """Print names and values in two columns. A text with a slash may be a path, and no space in it ends a line."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in facts.values()]
    paths = [at for at, value in enumerate(facts.values()) if isinstance(value, str) and "/" in value]
    names = [key.replace("_", " ") for key in facts]
    draw_pairs(open_out(), list(zip(names, texts, strict=True)), whole=paths)


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table whose columns are the keys of the first row; `title` heads the column of names."""
    if rows:
        columns = [title, *(key for key in rows[0] if key != "name")]
        cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
        draw_table(open_out(), columns, cells)
