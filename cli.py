"""The command `vla`: parse, call, render. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 data, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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

Progress = Callable[..., None]
"""Called with done, total, and sometimes a text."""


@app.command()
def featurize(
    backbone: Annotated[str | None, typer.Option(help="A name of `vla backbones`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets the store OUT/NAME.")] = Path("stores"),
    source: Source = None,
    weights: Annotated[str | None, typer.Option(help="Folder, hub id, or random.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the store. Left out: the backbone's.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="zarr (the default), or h5: a file a unit.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16, float32, int8. Left out: the backbone's.")
    ] = None,
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
    from vla.stores.memory import keep_freed_memory

    keep_freed_memory()
    pairs = dict(_pair(text) for text in mapping) if mapping else None
    stored = [f"store.{key}={value}" for key, value in (("format", format_), ("dtype", dtype)) if value is not None]
    settings = FeaturizeConfig.from_sources(
        config,
        [*stored, *(set_ or ())],
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
    if report.units:
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report.busy.items())
        log.print(
            f"{root}: {report.frames} frames in {report.units} units, {report.frames_per_s:.1f} frames/s ({busy})"
        )
    else:
        log.print(f"{root}: was complete")
    for episode, reason in left_out.items():
        log.print(f"left out {episode}: {reason}")


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(help="opentrackvla, rgb2pc-windows, replay-buffer, robomimic or arrays.")],
    path: Annotated[Path, typer.Argument(help="The cache.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store.")],
    source: Annotated[str | None, typer.Option(help="Demonstrations that give the actions a cache lacks.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable episodes out; count them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Turn a feature cache that others made into a store."""
    from vla.featurize.caches.job import ImportConfig, prepare, run

    settings = ImportConfig.from_sources(
        config, set_ or (), kind=kind, path=str(path), source=source, skip_bad=skip_bad or None
    )
    job = prepare(settings)
    plan = job.plan.to_json() | {"out": str(out)}
    if dry_run or not as_json:
        _show_plan(plan, as_json)
    if dry_run:
        return
    with _progress("import", "frames") as progress:
        report = run(job, out, resume=resume, overwrite=overwrite, progress=progress)
    left_out = {**job.plan.skipped, **report.skipped}
    if as_json:
        _emit({**report.__dict__, "skipped": left_out, "out": str(out)})
        return
    _log().print(f"{out}: {report.frames} frames in {report.units} units; {len(left_out)} episodes left out")
    for episode, reason in left_out.items():
        _log().print(f"left out {episode}: {reason}")


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
def verify(
    store: Annotated[Path, typer.Argument(help="A store.")],
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is damaged, for --resume to compute.")] = False,
    as_json: Json = False,
) -> None:
    """Read a store back and compare every byte with what was committed."""
    from vla.stores.verify import verify_store

    if repair:
        _repair(store, as_json)
        return
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


def _repair(store: Path, as_json: bool) -> None:
    from vla.stores.repair import repair_store
    from vla.stores.verify import ranges

    with _progress("verify", "units") as progress:
        report = repair_store(store, progress)
    if as_json:
        _emit(report.to_json())
        return
    for finding in report.found.findings:
        _log().print(finding, highlight=False)
    for path in report.removed:
        _log().print(f"removed {path}", highlight=False)
    dropped = f"dropped units {ranges(report.dropped)}" if report.dropped else "nothing was damaged"
    lacking = f"; units {ranges(report.pending)} are missing: the same `vla featurize` with --resume"
    _log().print(f"{store}: {dropped}; free of damage{lacking if report.pending else ''}")


@app.command()
def convert(
    store: Annotated[Path, typer.Argument(help="A complete store.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    format_: Annotated[str, typer.Option("--format", help="zarr, h5, or plain-zarr: arrays alone, without commits.")],
    compression: Annotated[str, typer.Option(help="none or zstd.")] = "none",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a store in another form, bit for bit."""
    from vla.stores.convert import ConvertOptions, convert_store

    options = ConvertOptions.build({"format": format_, "compression": compression}, where="vla convert")
    with _progress("convert", "units") as progress:
        report = convert_store(store, out, options, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        _emit(report.to_json())
        return
    _log().print(f"{out}: {report.rows} frames in {report.units} units, {report.bytes / 2**20:.1f} MiB, {format_}")


@app.command()
def record(
    simulator: Annotated[str, typer.Argument(help="metaworld")],
    task: Annotated[str, typer.Option(help="Such as push-v3.")],
    out: Annotated[Path, typer.Option(help="Folder of the new LeRobot v3.0 data set.")],
    episodes: Annotated[int, typer.Option(help="Successful demonstrations to keep.")] = 100,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal files.")] = 0,
    noise: Annotated[float, typer.Option(help="On the executed action; the label stays clean.")] = 0.1,
    camera: Annotated[list[str] | None, typer.Option(help="Repeat for several. Left out: corner3, topview.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels. Left out: 128.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Record a simulator's scripted expert as a LeRobot v3.0 data set."""
    from vla.rollout.record import record as run

    with _progress("record", "episodes") as progress:
        report = run(
            f"{simulator}:{task}",
            episodes,
            out,
            seed=seed,
            noise=noise,
            cameras=camera,
            image_size=image_size,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        _emit(report.to_json())
        return
    dropped = len(report.failed_seeds)
    _log().print(f"{out}: {report.episodes} episodes, {report.frames} frames; {dropped} failed attempts were dropped")


@app.command()
def train_head(
    head: Annotated[str, typer.Argument(help="A name of `vla heads`.")],
    store: Annotated[list[str] | None, typer.Option(help="A store; repeat to join several of one source.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Left out: runs/HEAD-STORE.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    features: Annotated[str | None, typer.Option(help="Comma-separated names. Left out: all of the store's.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train a head from stores. Its settings: --set model.KEY=…, --set train.KEY=…, --set data.KEY=…."""
    from vla.heads.registry import head_class
    from vla.heads.train import HeadTrainConfig
    from vla.heads.train import train_head as run
    from vla.stores.memory import keep_freed_memory

    head_class(head)
    overrides = [f"train.steps={steps}"] if steps is not None else []
    overrides += [f"data.stores={json.dumps(store)}"] if store else []
    overrides += [f"data.features={json.dumps(features.split(','))}"] if features else []
    settings = HeadTrainConfig.from_sources(config, [*overrides, *(set_ or ())], head=head)
    run_dir = out or Path("runs") / "-".join([head, *(Path(path).name for path in settings.data.stores)])
    keep_freed_memory()
    with _training_progress() as progress:
        report = run(settings, run_dir, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        _emit({"run": str(run_dir), "step": report.step, **report.metrics})
    else:
        _log().print(f"{run_dir}: step {report.step}, {_figures(report.metrics)}")


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="rgb2pc")],
    store: Annotated[list[str] | None, typer.Option(help="Grids of a backbone; repeat to join several.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Embeddings: a store, zarr arrays, or .npy files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Left out: runs/STUDENT.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    skip_unpaired: Annotated[
        bool, typer.Option("--skip-unpaired", help="Leave steps without an embedding out; count them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Pair and print the plan, write nothing.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train a student on cached grids against a teacher's embeddings. --set model.KEY=…, loss.KEY=…, train.KEY=…."""
    from vla.featurize.distill.train import DistillConfig, prepare
    from vla.featurize.distill.train import distill as run
    from vla.stores.memory import keep_freed_memory

    overrides = [f"train.steps={steps}"] if steps is not None else []
    overrides += [f"data.stores={json.dumps(store)}"] if store else []
    overrides += [f"data.teacher={json.dumps(teacher)}"] if teacher else []
    overrides += ["data.skip_unpaired=true"] if skip_unpaired else []
    keep_freed_memory()
    job = prepare(DistillConfig.from_sources(config, [*overrides, *(set_ or ())], student=student))
    run_dir = out or Path("runs") / student
    if dry_run:
        _emit(job.to_json() | {"out": str(run_dir)}) if as_json else _table(job.to_json() | {"out": str(run_dir)})
        return
    with _training_progress() as progress:
        report = run(job, run_dir, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        _emit({"run": str(run_dir), "step": report.step, **report.metrics, "pairing": job.artefact.pairing})
        return
    _log().print(f"{run_dir}: step {report.step}, {_figures(report.metrics)}; steps: {_figures(job.artefact.pairing)}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")],
    store: Annotated[list[str] | None, typer.Option(help="Other stores. Left out: held-out episodes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare sampled actions with demonstrated ones, per dimension, in the data's units."""
    from vla.heads.checkpoint import load_head
    from vla.heads.evaluate import evaluate_head

    head = load_head(run)
    error = evaluate_head(head, tuple(store) if store else None, seed=seed)
    facts = {"checkpoint": str(head.folder), "step": head.step, **error.to_json()}
    if as_json:
        _emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("dimension", "error, executed steps", "error, whole horizon", "always the mean action")
    for name, *values in zip(error.names, error.executed_mae, error.mae, error.baseline_mae, strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    Console().print(table)
    Console().print(f"mean absolute error over {error.windows} windows; {head.folder}, step {head.step}")


@app.command()
def rollout(
    run: Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")],
    env: Annotated[str, typer.Option(help="Such as metaworld:push-v3.")],
    episodes: Annotated[int, typer.Option(help="Unseen scenes to play.")] = 20,
    seed: Annotated[int, typer.Option(help="Which unseen scenes.")] = 0,
    n_action: Annotated[int | None, typer.Option(help="Actions executed per decision. Left out: the head's.")] = None,
    video: Annotated[Path | None, typer.Option(help=".mp4 of the first three episodes.")] = None,
    as_json: Json = False,
) -> None:
    """Run backbone and head live in a simulator: success on unseen scenes, latency, a video."""
    from vla.rollout.envs.registry import make_env
    from vla.rollout.evaluate import roll_out
    from vla.rollout.policy import Policy
    from vla.stores.memory import keep_freed_memory

    keep_freed_memory()
    policy = Policy.from_run(run, n_action=n_action)
    world = make_env(env, **policy.env_options())
    try:
        with _progress("rollout", "episodes") as progress:
            report = roll_out(world, policy, episodes, seed=seed, video=video, progress=progress)
    finally:
        world.close()
    if as_json:
        _emit(report.to_json())
        return
    _log().print(f"{env}: success {report.success} (95 % Wilson interval); {_figures(report.latency)}")


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the frozen backbones: what they make, their licences, and what this machine lacks for them."""
    from rich.console import Console
    from rich.table import Table

    from vla.featurize.backbones.registry import BACKBONES, missing

    entries = {name: {**entry._asdict(), "missing": missing(name)} for name, entry in BACKBONES.items()}
    if as_json:
        _emit(entries)
        return
    titles = ("backbone", "features a view", "parameters", "licences (code; weights)", "missing here")
    table = Table(*titles, show_lines=True)
    for name, entry in entries.items():
        licences = f"{entry['code_licence']}; {entry['weights_licence']}"
        lacks = "\n".join(entry["missing"]) or "nothing"
        table.add_row(f"{name}\n[dim]{entry['summary']}[/]", entry["features"], entry["parameters"], licences, lacks)
    Console().print(table)


@app.command()
def heads(as_json: Json = False) -> None:
    """List the trainable heads."""
    from vla.heads.registry import HEADS, SUMMARIES

    _list({name: SUMMARIES[name] for name in HEADS}, as_json)


def _list(entries: dict[str, str], as_json: bool) -> None:
    if as_json:
        _emit(entries)
    else:
        _table(entries)


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


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
def _progress(title: str, unit: str, *, extra: bool = False) -> Iterator[Progress]:
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

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    columns += [TextColumn("{task.fields[text]}")] if extra else []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, text="")
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)


@contextmanager
def _training_progress() -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Like `_progress`, with loss, speed and data wait of the last log line beside the bar."""
    shown = ("loss", "action_mae", "sim_gap", "steps_per_s", "data_wait_share")
    with _progress("train", "steps", extra=True) as progress:
        yield lambda step, total, metrics: progress(
            step, total, _figures({name: metrics[name] for name in shown if name in metrics})
        )


def _line_progress(title: str, unit: str, console: Console) -> Progress:
    began = last = time.monotonic()

    def show(done: int, total: int, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_SECONDS and done < total:
            return
        last = now
        rate = done / max(now - began, 1e-9)
        left = f"{(total - done) / max(rate, 1e-9):.0f} s left"
        console.print(f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {left} {text}".rstrip())

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
