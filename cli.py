"""The command `vla`: parse, call, render. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 data, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Run a frozen backbone once over demonstrations; train heads from the cache; act.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str | None, typer.Option("--source", help="Raw demonstrations: a folder, or synthetic. Left out: examples/push.")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file with any setting.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as --set batch_size=32.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, the log on stderr.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an earlier run left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
LOG_SECONDS = 30.0
"""Off a terminal, progress is one line in this many seconds."""

Progress = Callable[[int, int], None]


@app.command()
def featurize(
    backbone: Annotated[str | None, typer.Option(help="A name of `vla backbones`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets the store OUT/NAME.")] = Path("stores"),
    source: Source = None,
    weights: Annotated[str | None, typer.Option(help="Folder, hub id, or random.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the store. Left out: the backbone's.")] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, such as action=actions.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable episodes out; count them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over demonstrations, once, into a store."""
    from vla.featurize.job import FeaturizeConfig, prepare, run

    pairs = dict(_pair(text) for text in mapping) if mapping else None
    settings = FeaturizeConfig.from_sources(
        config,
        set_ or (),
        backbone=backbone,
        source=source or (None if config else str(_shipped())),
        weights=weights,
        map=pairs,
        skip_bad=skip_bad or None,
    )
    job = prepare(settings)
    root = out / (name or settings.backbone)
    plan = job.plan.to_json() | {"out": str(root)}
    log = _log()
    if dry_run:
        _show_plan(plan, as_json)
        return
    if not as_json:
        _show_plan(plan, False)
    if job.plan.manifest.random_weights:
        log.print("[bold red]RANDOM WEIGHTS: these features test the pipeline, they carry no knowledge.[/]")
    with _progress("featurize", "frames") as progress:
        report = run(job, root, resume=resume, overwrite=overwrite, progress=progress)
    left_out = {**job.plan.skipped, **report.skipped}
    if as_json:
        _emit({**report.to_json(), "skipped": left_out, "out": str(root)})
        return
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report.busy.items())
    log.print(f"{root}: {report.frames} frames in {report.units} units, {report.frames_per_s:.1f} frames/s ({busy})")
    for episode, reason in left_out.items():
        log.print(f"left out {episode}: {reason}")


@app.command()
def inspect(store: Annotated[Path, typer.Argument(help="A store.")], as_json: Json = False) -> None:
    """Say what a store holds and where it came from."""
    from vla.stores.inspect import describe

    facts = describe(store)
    if as_json:
        _emit(facts)
        return
    _table(facts)


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A store.")], as_json: Json = False) -> None:
    """Read a store back and compare every byte with what was committed."""
    from vla.stores.verify import verify_store

    with _progress("verify", "units") as progress:
        report = verify_store(store, progress)
    if as_json:
        _emit(report.to_json())
    elif not report.findings:
        _log().print(
            f"{store}: sound; {report.files} files, {report.bytes / 2**20:.1f} MiB compared with their commits"
        )
    else:
        for finding in report.findings:
            _log().print(finding, highlight=False)
    if report.findings:
        raise typer.Exit(1)


def _pair(text: str) -> tuple[str, str]:
    from vla.stores.errors import UsageError

    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise UsageError(f"--map {text!r}", expected="OURS=THEIRS, such as --map action=actions")
    return ours, theirs


def _shipped() -> Path:
    """Return the data set that ships with a checkout."""
    from vla.stores.errors import UsageError

    path = Path(__file__).parent / "examples" / "push"
    if not path.is_dir():
        raise UsageError("no --source given", expected="a folder of demonstrations", fix="--source DIR")
    return path


def _log() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _emit(plan)
        return
    features = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in plan["features"].items())
    _log().print(
        f"{plan['out']}: {plan['episodes']} episodes, {plan['frames']} frames x {plan['views']} views -> {features}; "
        f"{plan['units']} units of {plan['unit_rows']} frames, {plan['bytes'] / 2**20:.1f} MiB in {plan['files']} files"
    )


def _table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
    Console().print(table)


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Progress]:
    """Show a bar with time left on a terminal, one line per 30 s elsewhere."""
    console = _log()
    if not console.is_terminal:
        yield _line_progress(title, unit, console)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_progress(title: str, unit: str, console: Console) -> Progress:
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_SECONDS and done < total:
            return
        last = now
        rate = done / max(now - began, 1e-9)
        console.print(f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {(total - done) / max(rate, 1e-9):.0f} s left")

    return show


def main() -> NoReturn:
    """Run the command line; turn errors into one line and an exit code."""
    # Spinning OpenMP threads on a busy machine slow a 6 ms step to 400 ms; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vla.stores.errors import VlaError

    try:
        app(standalone_mode=True)
    except VlaError as error:
        sys.stderr.write(f"vla: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("vla: interrupted; what was committed is kept, --resume goes on\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)
