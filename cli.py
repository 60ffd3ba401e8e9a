"""The command `vla`: parse, call, render. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 data, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vla.terminal.output import emit, figures, list_entries, open_log, show_facts, show_plan, show_rows
from vla.terminal.progress import show_progress, show_training, show_workers

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


@app.command()
def featurize(
    backbone: Annotated[str | None, typer.Option(help="A name of `vla backbones`.")] = None,
    out: Annotated[str, typer.Option(help="Folder or s3:// URL that gets the store OUT/NAME.")] = "stores",
    source: Source = None,
    weights: Annotated[str | None, typer.Option(help="Folder, hub id, or random.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the store. Left out: the backbone's.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="zarr (the default), or h5: a file a unit.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16, float32, int8. Left out: the backbone's.")
    ] = None,
    augment: Annotated[
        int | None, typer.Option(metavar="K", help="Cache K augmented copies of each frame for training.")
    ] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, such as action=actions.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable episodes out; count them.")] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes on this machine: one a GPU, or a group of cores.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="tcp://HOST:PORT of a running dask cluster.")] = None,
    unit_index: Annotated[
        str | None, typer.Option("--unit-index", metavar="I/N", help="Share I of N, for one job of an array.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write whatever the disk seems to have room for.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over demonstrations, once, into a store."""
    from vla.featurize.job import FeaturizeConfig, prepare
    from vla.featurize.launch import Where, launch, outlook
    from vla.stores.memory import keep_freed_memory

    keep_freed_memory()
    pairs = dict(_pair(text) for text in mapping) if mapping else None
    short = (("store.format", format_), ("store.dtype", dtype), ("augment.copies", augment))
    stored = [f"{key}={value}" for key, value in short if value is not None]
    settings = FeaturizeConfig.from_sources(
        config,
        [*stored, *(set_ or ())],
        backbone=backbone,
        source=source or (None if config else str(_shipped())),
        weights=weights,
        map=pairs,
        skip_bad=skip_bad or None,
    )
    where = Where(workers, scheduler, unit_index)
    job = prepare(settings)
    root = f"{out.rstrip('/')}/{name or settings.backbone}" if "://" in out else Path(out, name or settings.backbone)
    plan = job.plan.to_json() | {"out": str(root), **outlook(job, root, where)}
    log = open_log()
    if dry_run:
        show_plan(plan, as_json)
        return
    if not as_json:
        show_plan(plan, False)
    if job.plan.manifest.random_weights:
        log.print("[bold red]RANDOM WEIGHTS: these features test the pipeline, they carry no knowledge.[/]")
    with show_workers("featurize", "frames") as progress:
        report = launch(job, root, where, resume=resume, overwrite=overwrite, accept=yes, progress=progress)
    left_out = {**job.plan.skipped, **report.skipped}
    if as_json:
        emit({**report.to_json(), "skipped": left_out, "out": str(root)})
        return
    if report.units:
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report.busy.items())
        log.print(
            f"{root}: {report.frames} frames in {report.units} units, {report.frames_per_s:.1f} frames/s ({busy}; "
            f"bottleneck: {report.bottleneck})"
        )
    else:
        log.print(f"{root}: nothing was missing")
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
        show_plan(plan, as_json)
    if dry_run:
        return
    with show_progress("import", "frames") as progress:
        report = run(job, out, resume=resume, overwrite=overwrite, progress=progress)
    left_out = {**job.plan.skipped, **report.skipped}
    if as_json:
        emit({**report.__dict__, "skipped": left_out, "out": str(out)})
        return
    open_log().print(f"{out}: {report.frames} frames in {report.units} units; {len(left_out)} episodes left out")
    for episode, reason in left_out.items():
        open_log().print(f"left out {episode}: {reason}")


@app.command()
def inspect(
    store: Annotated[str | None, typer.Argument(help="A store: folder or URL.")] = None,
    source: Annotated[str | None, typer.Option(help="Raw demonstrations to check instead: exit code 1 if bad.")] = None,
    norm_stats: Annotated[Path | None, typer.Option(help="Also write openpi's norm_stats.json here.")] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, such as action=actions.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a store holds and where it came from; or check raw demonstrations before any backbone runs."""
    from vla.stores.errors import UsageError
    from vla.stores.inspect import describe
    from vla.stores.norm_stats import norm_stats_of, write_norm_stats
    from vla.stores.store import open_store

    if source is not None and store is None:
        _check_source(source, norm_stats, mapping or [], set_ or [], as_json)
        return
    if store is None or source is not None or mapping or set_:
        raise UsageError("vla inspect", expected="a store, or --source DIR with --map and --set")
    facts = describe(store)
    if norm_stats is not None:
        write_norm_stats(norm_stats, norm_stats_of(open_store(store)))
    if as_json:
        emit(facts)
        return
    show_facts(facts)


def _check_source(source: str, norm_stats: Path | None, mapping: list[str], set_: list[str], as_json: bool) -> None:
    from vla.featurize.check_source import CheckConfig, check_source
    from vla.stores.norm_stats import write_norm_stats

    pairs = dict(_pair(text) for text in mapping)
    with show_progress("inspect", "episodes") as progress:
        report = check_source(CheckConfig.from_sources(None, set_, source=source, map=pairs or None), progress)
    if as_json:
        emit(report.to_json())
    else:
        show_facts({name: fact for name, fact in report.facts.items() if name != "statistics"})
        statistics = report.facts.get("statistics", {})
        for name in ("action", "state"):
            show_rows(name, statistics.get(name, []))
        for finding in report.findings:
            open_log().print(f"{finding.check}: {finding.found}", highlight=False, markup=False)
        open_log().print(f"{source}: {len(report.findings) or 'no'} findings")
    if report.findings:
        raise typer.Exit(1)
    if norm_stats is not None:
        write_norm_stats(norm_stats, report.stats)


@app.command()
def verify(
    store: Annotated[str, typer.Argument(help="A store: folder or URL.")],
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is damaged, for --resume to compute.")] = False,
    as_json: Json = False,
) -> None:
    """Read a store back and compare every byte with what was committed."""
    from vla.stores.verify import verify_store

    if repair:
        _repair(store, as_json)
        return
    with show_progress("verify", "units") as progress:
        report = verify_store(store, progress)
    if as_json:
        emit(report.to_json())
    elif not report.findings:
        open_log().print(
            f"{store}: sound; {report.files} files, {report.bytes / 2**20:.1f} MiB compared with their commits"
        )
    else:
        for finding in report.findings:
            open_log().print(finding, highlight=False)
    if report.findings:
        raise typer.Exit(1)


def _repair(store: str, as_json: bool) -> None:
    from vla.stores.repair import repair_store
    from vla.stores.verify import ranges

    with show_progress("verify", "units") as progress:
        report = repair_store(store, progress)
    if as_json:
        emit(report.to_json())
        return
    for finding in report.found.findings:
        open_log().print(finding, highlight=False)
    for path in report.removed:
        open_log().print(f"removed {path}", highlight=False)
    dropped = f"dropped units {ranges(report.dropped)}" if report.dropped else "nothing was damaged"
    lacking = f"; units {ranges(report.pending)} are missing: the same `vla featurize` with --resume"
    open_log().print(f"{store}: {dropped}; free of damage{lacking if report.pending else ''}")


@app.command()
def convert(
    store: Annotated[str, typer.Argument(help="A complete store: folder or URL.")],
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
    with show_progress("convert", "units") as progress:
        report = convert_store(store, out, options, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        emit(report.to_json())
        return
    open_log().print(f"{out}: {report.rows} frames in {report.units} units, {report.bytes / 2**20:.1f} MiB, {format_}")


@app.command()
def record(
    simulator: Annotated[str, typer.Argument(help="metaworld, or robosuite: its human demonstrations.")],
    task: Annotated[str, typer.Option(help="Such as push-v3; of robosuite: lift, handover, or a demo.hdf5.")],
    out: Annotated[Path, typer.Option(help="Folder of the new LeRobot v3.0 data set.")],
    episodes: Annotated[int | None, typer.Option(help="To keep. Left out: 100 successes, or all recorded.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal files. Left out: 0.")] = None,
    noise: Annotated[float | None, typer.Option(help="On the executed action, not the label. Left out: 0.1.")] = None,
    camera: Annotated[list[str] | None, typer.Option(help="Repeat for several. Left out: the simulator's.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels. Left out: 128.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Record a simulator's scripted expert, or draw recorded states, as a LeRobot v3.0 data set."""
    from vla.rollout.record import record as run
    from vla.rollout.recording_card import NOISE

    if simulator == "robosuite":
        if seed is not None or noise is not None:
            from vla.stores.errors import UsageError

            raise UsageError("--seed or --noise with robosuite", expected="neither: human demonstrations are fixed")
        _replay(task, out, as_json, episodes=episodes, cameras=camera, image_size=image_size, overwrite=overwrite)
        return
    with show_progress("record", "episodes") as progress:
        report = run(
            f"{simulator}:{task}",
            100 if episodes is None else episodes,
            out,
            seed=seed or 0,
            noise=NOISE if noise is None else noise,
            cameras=camera,
            image_size=image_size,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        emit(report.to_json())
        return
    dropped = len(report.failed_seeds)
    open_log().print(
        f"{out}: {report.episodes} episodes, {report.frames} frames; {dropped} failed attempts were dropped"
    )


def _replay(task: str, out: Path, as_json: bool, **options: Any) -> None:
    from vla.rollout.replay import record_replay

    with show_progress("record", "frames") as progress:
        report = record_replay(task, out, progress=progress, **options)
    if as_json:
        emit(report.to_json())
        return
    open_log().print(f"{out}: {report.episodes} episodes, {report.frames} frames in {report.seconds:.0f} s")


@app.command()
def train_head(
    head: Annotated[str, typer.Argument(help="A name of `vla heads`.")],
    store: Annotated[list[str] | None, typer.Option(help="A store; repeat to join several of one source.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Left out: runs/HEAD-STORE.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    features: Annotated[str | None, typer.Option(help="Comma-separated names. Left out: all of the store's.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder that caches what comes from s3:// stores.")] = None,
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
    overrides += [f"data.remote.cache={json.dumps(cache)}"] if cache else []
    settings = HeadTrainConfig.from_sources(config, [*overrides, *(set_ or ())], head=head)
    run_dir = out or Path("runs") / "-".join([head, *(Path(path).name for path in settings.data.stores)])
    keep_freed_memory()
    with show_training() as progress:
        report = run(settings, run_dir, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        emit({"run": str(run_dir), "step": report.step, **report.metrics})
    else:
        open_log().print(f"{run_dir}: step {report.step}, {figures(report.metrics)}")


@app.command()
def fit_fast(
    store: Annotated[list[str], typer.Option(help="A store; repeat to join several of one source.")],
    out: Annotated[Path, typer.Option(help="Folder of tokenizer.json and its settings.")],
    overwrite: Overwrite = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Fit FAST action tokens to a store's training split, for `hier` in mode fast. --set horizon=…, scale=…."""
    from vla.heads.fit_fast import FitFastConfig
    from vla.heads.fit_fast import fit_fast as run

    settings = FitFastConfig.from_sources(config, [f"data.stores={json.dumps(store)}", *(set_ or ())])
    report = run(settings, out, overwrite=overwrite).to_json()
    emit(report) if as_json else open_log().print(f"{out}: {figures(report)}")


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
        emit(job.to_json() | {"out": str(run_dir)}) if as_json else show_facts(job.to_json() | {"out": str(run_dir)})
        return
    with show_training() as progress:
        report = run(job, run_dir, resume=resume, overwrite=overwrite, progress=progress)
    if as_json:
        emit({"run": str(run_dir), "step": report.step, **report.metrics, "pairing": job.artefact.pairing})
        return
    open_log().print(
        f"{run_dir}: step {report.step}, {figures(report.metrics)}; steps: {figures(job.artefact.pairing)}"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")],
    store: Annotated[list[str] | None, typer.Option(help="Other stores. Left out: held-out episodes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Compare sampled actions with demonstrated ones, per dimension, in the data's units."""
    from vla.heads.checkpoint import load_head
    from vla.heads.evaluate import evaluate_head

    head = load_head(run, settings=_model_settings(set_))
    error = evaluate_head(head, tuple(store) if store else None, seed=seed)
    facts = {"checkpoint": str(head.folder), "step": head.step, **error.to_json()}
    if as_json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("dimension", "error, executed steps", "error, whole horizon", "always the mean action")
    for name, *values in zip(error.names, error.executed_mae, error.mae, error.baseline_mae, strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    if error.acted:
        Console().print(table)
    if error.extra:
        Console().print(figures(error.extra))
    Console().print(f"mean absolute error over {error.windows} windows; {head.folder}, step {head.step}")


@app.command()
def rollout(
    run: Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")],
    env: Annotated[str, typer.Option(help="Such as metaworld:push-v3.")],
    episodes: Annotated[int, typer.Option(help="Unseen scenes to play.")] = 20,
    seed: Annotated[int, typer.Option(help="Which unseen scenes.")] = 0,
    n_action: Annotated[int | None, typer.Option(help="Actions executed per decision. Left out: the head's.")] = None,
    video: Annotated[Path | None, typer.Option(help=".mp4 of the first three episodes.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run backbone and head live in a simulator: success on unseen scenes, latency, a video."""
    from vla.rollout.envs.registry import make_env
    from vla.rollout.evaluate import roll_out
    from vla.rollout.policy import Policy
    from vla.stores.memory import keep_freed_memory

    keep_freed_memory()
    policy = Policy.from_run(run, n_action=n_action, settings=_model_settings(set_))
    world = make_env(env, **policy.env_options())
    try:
        with show_progress("rollout", "episodes") as progress:
            report = roll_out(world, policy, episodes, seed=seed, video=video, progress=progress)
    finally:
        world.close()
    if as_json:
        emit(report.to_json())
        return
    open_log().print(f"{env}: success {report.success} (95 % Wilson interval); {figures(report.latency)}")


@app.command()
def action_dims(
    source: Source = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, such as action=actions.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable episodes out.")] = False,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Group the tasks of raw demonstrations by the size of action and state."""
    from vla.featurize.action_dims import DimsConfig, group, measure, to_json

    settings = DimsConfig.from_sources(
        config,
        set_ or (),
        source=source or (None if config else str(_shipped())),
        map=dict(_pair(text) for text in mapping) if mapping else None,
        skip_bad=skip_bad or None,
    )
    tasks = measure(settings)
    if as_json:
        emit(to_json(tasks))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("action", "state", "task", "episodes", "components of the action")
    for (action, state), members in group(tasks).items():
        for place, dims in enumerate(members):
            sizes = (str(action), str(state)) if place == 0 else ("", "")
            table.add_row(*sizes, dims.task, str(dims.episodes), ", ".join(dims.names), end_section=dims is members[-1])
    Console().print(table)


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the frozen backbones: what they make, their licences, and what this machine lacks for them."""
    from rich.console import Console
    from rich.table import Table

    from vla.featurize.backbones.registry import BACKBONES, missing

    entries = {name: {**entry._asdict(), "missing": missing(name)} for name, entry in BACKBONES.items()}
    if as_json:
        emit(entries)
        return
    table = Table("backbone", "features a view", "parameters", "licences (code; weights)", show_lines=True)
    table.add_column("missing here", overflow="fold")  # a command that is cut short cannot be typed
    for name, entry in entries.items():
        licences = f"{entry['code_licence']}; {entry['weights_licence']}"
        lacks = "\n".join(entry["missing"]) or "nothing"
        table.add_row(f"{name}\n[dim]{entry['summary']}[/]", entry["features"], entry["parameters"], licences, lacks)
    Console().print(table)


@app.command()
def heads(as_json: Json = False) -> None:
    """List the trainable heads."""
    from vla.heads.registry import HEADS, SUMMARIES

    list_entries({name: SUMMARIES[name] for name in HEADS}, as_json)


def _model_settings(texts: list[str] | None) -> dict[str, Any]:
    """Read --set model.KEY=VALUE for a head that is trained already."""
    from vla.stores.errors import UsageError
    from vla.stores.settings import set_dotted

    values: dict[str, Any] = {"model": {}}
    for text in texts or ():
        set_dotted(values, text)
    others = values.keys() - {"model"}
    if others:
        raise UsageError(f"--set {min(others)} of a trained head", expected="model.KEY=VALUE")
    return dict(values["model"])


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
