"""Progress: bars on a terminal, one line in a while off it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vla.terminal.output import figures, open_log

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

LOG_SECONDS = 30.0
"""Off a terminal, progress is one line in this many seconds."""

Progress = Callable[..., None]
"""Called with done, total, and sometimes a text."""


@contextmanager
def show_progress(title: str, unit: str, *, extra: bool = False) -> Iterator[Progress]:
    """Show a bar with time left on a terminal, one line per 30 s elsewhere."""
    console = open_log()
    if not console.is_terminal:
        yield _line_by_line(title, unit, console)
        return
    with _bars(unit, text=extra) as bars:
        task = bars.add_task(title, total=None, text="")
        yield lambda done, total, text="": bars.update(task, completed=done, total=total, text=text)


@contextmanager
def show_workers(title: str, unit: str) -> Iterator[Callable[[Mapping[str, int], int], None]]:
    """Like `show_progress`, from what each worker has done: a row a worker on a terminal, where there are several."""
    console = open_log()
    if not console.is_terminal:
        line = _line_by_line(title, unit, console)

        def say(done: Mapping[str, int], total: int) -> None:
            each = ", ".join(f"worker {name}: {count}" for name, count in done.items())
            line(sum(done.values()), total, each if len(done) > 1 else "")

        yield say
        return
    with _bars(unit) as bars:
        rows = {"": bars.add_task(title, total=None)}

        def show(done: Mapping[str, int], total: int) -> None:
            bars.update(rows[""], completed=sum(done.values()), total=total)
            for name in done if len(done) > 1 else ():
                if name not in rows:
                    rows[name] = bars.add_task(f"worker {name}", total=None)
                bars.update(rows[name], completed=done[name], total=total)

        yield show


@contextmanager
def show_training() -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Like `_progress`, with loss, speed and data wait of the last log line beside the bar."""
    shown = ("loss", "action_mae", "sim_gap", "steps_per_s", "data_wait_share")
    with show_progress("train", "steps", extra=True) as progress:
        yield lambda step, total, metrics: progress(
            step, total, figures({name: metrics[name] for name in shown if name in metrics})
        )


def _line_by_line(title: str, unit: str, console: Console) -> Progress:
    last = time.monotonic()
    began, before, said = 0.0, 0, False

    def show(done: int, total: int, text: str = "") -> None:
        nonlocal began, before, last, said
        now = time.monotonic()
        if not began:  # what went before the first frames (processes, weights) says nothing of the pace
            began, before = now, done
        if said or (now - last < LOG_SECONDS and done < total):
            return
        last, said = now, done >= total
        if done == before:
            console.print(f"{title}: {done}/{total} {unit} {text}".rstrip())
            return
        rate = (done - before) / max(now - began, 1e-9)
        left = f"{(total - done) / rate:.0f} s left"
        console.print(f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {left} {text}".rstrip())

    return show


def _bars(unit: str, *, text: bool = False) -> RichProgress:
    """Return bars with what is done, how long it took, and how long it will."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    return Bars(*columns, *([TextColumn("{task.fields[text]}", markup=False)] if text else []), console=open_log())
