"""The command `vla`: parse, call, render. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 data, 4 environment, 128 + n after signal n (130 after Ctrl-C).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vla.stores.interrupt import explain_interrupt
from vla.terminal import options as opt
from vla.terminal import reports
from vla.terminal.help import Command, HeadCommand
from vla.terminal.output import emit, figures, open_log, show_facts, show_plan
from vla.terminal.progress import show_progress, show_training, show_workers
from vla.terminal.run_app import run_app
from vla.terminal.safe_text import guard_stderr, safe_line
from vla.terminal.streams import end_output, protect_streams

app = typer.Typer(
    help="Run a frozen backbone once over demonstrations; train heads from the cache; act.",
    callback=opt.before_any_command,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = partial(app.command, cls=Command)


@command()
def featurize(
    backbone: opt.Backbone = None,
    out: Annotated[str, opt.comes_out("Folder or s3:// URL that gets the store OUT/NAME.")] = "stores",
    source: opt.Source = None,
    weights: Annotated[str | None, opt.goes_in("Folder, hub id, or random: a tiny network for trial runs.")] = None,
    name: Annotated[str | None, opt.comes_out("Name of the store. Left out: the backbone's.")] = None,
    format_: Annotated[str | None, opt.comes_out("zarr (the default), or h5: a file a unit.", "--format")] = None,
    dtype: opt.Dtype = None,
    augment: opt.Copies = None,
    mapping: opt.Map = None,
    skip_bad: opt.SkipBad = False,
    workers: opt.Workers = None,
    scheduler: opt.Scheduler = None,
    unit_index: opt.UnitIndex = None,
    dry_run: opt.DryRun = False,
    yes: opt.Yes = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    config: opt.Config = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
) -> None:
    """Run a frozen backbone over demonstrations, once, into a store."""
    from vla.featurize.backbones.registry import load_backbone_class
    from vla.featurize.job import FeaturizeConfig, begun_store, prepare
    from vla.featurize.launch import Where, launch, outlook
    from vla.featurize.skipped import require_few_skipped, skipped_in
    from vla.stores.inspect import rounding_of
    from vla.stores.memory import keep_freed_memory
    from vla.stores.owned import require_name
    from vla.stores.settings import read_pairs
    from vla.stores.writer import refuse_existing

    keep_freed_memory()
    short = {"store.format": format_, "store.dtype": dtype, "augment.copies": augment}
    name = None if name is None else require_name(name, "--name")
    begun = begun_store(out, name, required=not set_) if resume and backbone is None and config is None else None
    settings = FeaturizeConfig.from_sources(
        begun or config,
        [*opt.as_set(short), *(set_ or ())],
        backbone=backbone,
        source=source,
        weights=weights,
        map=read_pairs(mapping),
        skip_bad=skip_bad or None,
    )
    where = Where(workers, scheduler, unit_index)
    load_backbone_class(settings.backbone)  # a wrong name is none of a store
    place = name or settings.backbone
    root = begun or (f"{out.rstrip('/')}/{place}" if "://" in out else Path(out, place))
    if isinstance(root, Path) and not (dry_run or unit_index):
        refuse_existing(root, resume=resume, overwrite=overwrite)  # before the backbone is loaded
    job = prepare(settings)
    plan = job.plan.to_json() | {"out": str(root), **outlook(job, root, where, overwrite=overwrite)}
    log = open_log()
    if dry_run or not as_json:
        show_plan(plan, as_json)
    if dry_run:
        return
    if job.plan.manifest.random_weights:
        log.print("RANDOM WEIGHTS: these features test the pipeline, they carry no knowledge.", style="bold red")
    left = partial(reports.committed_so_far, root, job.plan.manifest.units)
    with explain_interrupt(left), show_workers("featurize", "frames") as progress:
        report = launch(job, root, where, resume=resume, overwrite=overwrite, accept=yes, progress=progress)
    skipped = skipped_in(root, report.skipped) if settings.skip_bad else report.skipped
    total = len(job.plan.episodes) + len(job.plan.skipped)
    facts = report.to_json()
    if any(info.dtype == "int8" for info in job.plan.manifest.features.values()):
        facts["rounding"] = rounding_of(str(root))
    reports.show_featurized(root, facts, {**job.plan.skipped, **skipped}, total, as_json)
    require_few_skipped(job.plan, skipped, settings.max_skipped)


@command("import")
def import_(
    kind: opt.Cache,
    path: Annotated[Path, typer.Argument(help="The cache.")],
    out: Annotated[Path, opt.comes_out("Folder of the new store.")],
    source: Annotated[str | None, opt.goes_in("Demonstrations that give the actions a cache lacks.")] = None,
    skip_bad: opt.SkipBad = False,
    dry_run: opt.DryRun = False,
    yes: opt.Yes = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    config: opt.Config = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
) -> None:
    """Turn a feature cache that others made into a store."""
    from vla.featurize.caches.job import ImportConfig, prepare, run
    from vla.featurize.skipped import require_few_skipped, skipped_in
    from vla.stores.inspect import rounding_of

    settings = ImportConfig.from_sources(
        config, set_ or (), kind=kind, path=str(path), source=source, skip_bad=skip_bad or None
    )
    job = prepare(settings)
    plan = job.plan.to_json() | {"out": str(out)}
    if dry_run or not as_json:
        show_plan(plan, as_json)
    if dry_run:
        return
    left_behind = partial(reports.committed_so_far, out, job.plan.manifest.units)
    with explain_interrupt(left_behind), show_progress("import", "frames") as progress:
        report = run(job, out, resume=resume, overwrite=overwrite, accept=yes, progress=progress)
    skipped = skipped_in(out, report.skipped) if settings.skip_bad else report.skipped
    left_out = {**job.plan.skipped, **skipped}
    said = f"{report.frames} frames in {report.units} units; {len(left_out)} episodes left out"
    rounding = rounding_of(out)
    facts = {**report.__dict__, "rounding": rounding, "skipped": left_out, "out": str(out)}
    reports.show_made(out, facts, said, as_json, left_out)
    if not as_json:
        reports.show_rounding(rounding)
    require_few_skipped(job.plan, skipped, settings.max_skipped)


@command()
def inspect(
    store: opt.MaybeStore = None,
    source: Annotated[str | None, opt.goes_in("Raw demonstrations to check instead: exit code 1 if bad.")] = None,
    norm_stats: Annotated[Path | None, opt.comes_out("Also write openpi's norm_stats.json here.")] = None,
    pictures: Annotated[Path | None, opt.comes_out("New folder for contact sheets (PNG) of --source.")] = None,
    all_frames: Annotated[bool, opt.runs("Decode every frame of --source, not a sample.", "--all-frames")] = False,
    mapping: opt.Map = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
) -> None:
    """Say what a store holds and where it came from; or check raw demonstrations before any backbone runs."""
    from vla.stores.errors import UsageError
    from vla.stores.inspect import describe
    from vla.stores.norm_stats import norm_stats_of, write_norm_stats
    from vla.stores.store import open_store

    if source is not None and store is None:
        how = {"sheets": pictures, "all_frames": all_frames or None}
        _check_source(source, norm_stats, mapping or [], set_ or [], as_json, **how)
        return
    if store is None or source is not None or mapping or set_ or pictures is not None or all_frames:
        raise UsageError("vla inspect", expected="a store, or --source DIR with options")
    facts = describe(store)
    if norm_stats is not None:
        write_norm_stats(norm_stats, norm_stats_of(open_store(store)))
    emit(facts) if as_json else show_facts(facts)


def _check_source(
    source: str, norm_stats: Path | None, mapping: list[str], set_: list[str], as_json: bool, **how: Any
) -> None:
    from vla.featurize.check_source import CheckConfig, check_source
    from vla.stores.norm_stats import write_norm_stats
    from vla.stores.settings import read_pairs

    with show_progress("inspect", "episodes") as progress:
        config = CheckConfig.from_sources(None, set_, source=source, map=read_pairs(mapping), **how)
        report = check_source(config, progress)
    found = [f"{finding.check}: {finding.found}" for finding in report.findings]
    emit(report.to_json()) if as_json else reports.show_check(report.facts, found, source)
    if report.findings:
        raise typer.Exit(1)
    if norm_stats is not None:
        write_norm_stats(norm_stats, report.stats)


@command()
def verify(
    store: opt.AStore,
    repair: Annotated[bool, opt.runs("Drop what is damaged, for --resume to compute.", "--repair")] = False,
    as_json: opt.Json = False,
) -> None:
    """Read a store back and compare every byte with what was committed."""
    from vla.stores.verify import verify_store

    if repair:
        _repair(store, as_json)
        return
    with show_progress("verify", "units") as progress:
        report = verify_store(store, progress)
    sound = f"{store}: sound; {report.files} files, {report.bytes / 2**20:.1f} MiB compared with their commits"
    emit(report.to_json()) if as_json else reports.show_findings(report.findings or [sound])
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
    dropped, missing = ranges(report.dropped), ranges(report.pending)
    reports.show_repair(store, report.found.findings, report.removed, dropped, missing)


@command()
def convert(
    store: Annotated[str, typer.Argument(help="A complete store: folder or URL.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    format_: Annotated[str, opt.comes_out("zarr, h5, or plain-zarr: arrays alone, without commits.", "--format")],
    compression: Annotated[str, opt.comes_out("none or zstd.")] = "none",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Write a store in another form, bit for bit."""
    from vla.stores.convert import ConvertOptions, convert_store

    options = ConvertOptions.build({"format": format_, "compression": compression}, where="vla convert")
    with show_progress("convert", "units") as progress:
        report = convert_store(store, out, options, resume=resume, overwrite=overwrite, progress=progress)
    said = f"{report.rows} frames in {report.units} units, {report.bytes / 2**20:.1f} MiB, {format_}"
    reports.show_made(out, report.to_json(), said, as_json)


@command()
def record(
    simulator: opt.Simulator,
    task: Annotated[str, opt.goes_in("Such as push-v3; of robosuite: lift, handover, or a demo.hdf5.")],
    out: Annotated[Path, opt.comes_out("Folder of the new LeRobot v3.0 data set.")],
    episodes: Annotated[int | None, opt.runs("To keep. Left out: 100 successes, or all recorded.")] = None,
    seed: Annotated[int | None, opt.runs("Equal seeds give equal files. Left out: 0.")] = None,
    noise: Annotated[float | None, opt.runs("On the executed action, not the label. Left out: 0.1.")] = None,
    camera: Annotated[list[str] | None, opt.goes_in("Repeat for several. Left out: the simulator's.")] = None,
    image_size: Annotated[int | None, opt.comes_out("Pixels. Left out: 128.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Record a simulator's scripted expert, or draw recorded states, as a LeRobot v3.0 data set."""
    from vla.stores.errors import UsageError
    from vla.stores.settings import nearest

    if simulator not in opt.SIMULATORS:
        found = f"unknown simulator {simulator!r}{nearest(simulator, opt.SIMULATORS)}"
        raise UsageError(found, expected=" or ".join(opt.SIMULATORS))
    shown: dict[str, Any] = {"cameras": camera, "image_size": image_size, "overwrite": overwrite}
    with show_progress("record", "frames" if simulator == "robosuite" else "episodes") as progress:
        if simulator == "robosuite":
            if seed is not None or noise is not None:
                found = "--seed or --noise with robosuite"
                raise UsageError(found, expected="neither: human demonstrations are fixed")
            from vla.rollout.replay import record_replay

            made: Any = record_replay(task, out, progress=progress, episodes=episodes, **shown)
            said = f"in {made.seconds:.0f} s"
        else:
            from vla.rollout.record import record as run
            from vla.rollout.recording_card import NOISE

            how: dict[str, Any] = {"seed": seed or 0, "noise": NOISE if noise is None else noise, "progress": progress}
            made = run(f"{simulator}:{task}", 100 if episodes is None else episodes, out, **how, **shown)
            said = f"; {len(made.failed_seeds)} failed attempts were dropped"
    said = f"{made.episodes} episodes, {made.frames} frames {said}".replace(" ;", ";")
    reports.show_made(out, made.to_json(), said, as_json)


@app.command(cls=HeadCommand)
def train_head(
    head: opt.Head = None,
    store: opt.Stores = None,
    out: Annotated[Path | None, opt.comes_out("Run folder. Left out: runs/HEAD-STORE.")] = None,
    steps: opt.Steps = None,
    features: Annotated[str | None, opt.goes_in("Comma-separated names. Left out: all of the store's.")] = None,
    cache: Annotated[str | None, opt.goes_in("Folder that caches what comes from s3:// stores.")] = None,
    from_: opt.From = None,
    group_by: Annotated[str | None, opt.comes_out("action-dim: one model for each set, in OUT/dim-N.")] = None,
    online: Annotated[bool, opt.runs("Run the backbones in the loop: slow; see docs.", "--online")] = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    config: opt.Config = None,
    set_: opt.TrainSet = None,
    as_json: opt.Json = False,
) -> None:
    """Train a head from stores. Its settings: --set model.KEY=…, --set train.KEY=…, --set data.KEY=…."""
    from vla.heads import train
    from vla.heads.registry import head_class
    from vla.stores.memory import keep_freed_memory

    if head is not None:
        head_class(head)
    if resume and config is None and not (head and store):
        config = train.begun_head(out, head, required=not (head or set_), grouped=group_by is not None)
    online = online or train.is_online(config)  # a saved run records how its features were computed
    named = None if features is None else [name.strip() for name in features.split(",")]
    short = {"train.steps": steps, "data.stores": store, "data.features": named, "data.remote.cache": cache}
    kind: Any = train.HeadTrainConfig
    run: Any = train.train_head
    if online:
        from vla.rollout import online as loop

        kind, run = loop.OnlineTrainConfig, loop.train_online
    settings = kind.from_sources(config, [*opt.as_set(short), *(set_ or ())], head=head, init_from=from_)
    run_dir = out or Path("runs") / "-".join([settings.head, *(Path(path).name for path in settings.data.stores)])
    keep_freed_memory()
    counts: dict[str, tuple[int, int]] = {}
    shown = reports.counting(counts)
    if group_by is not None:
        from vla.heads.groups import train_groups_by

        with show_training() as progress:
            how = {"resume": resume, "overwrite": overwrite, "begun": shown, "progress": lambda group: progress}
            trained = train_groups_by(group_by, settings, run_dir, online=online, **how)
        reports.show_groups(run_dir, {name: (r.run_dir, r.step, r.metrics) for name, r in trained.items()}, as_json)
        return
    with show_training() as progress:
        report = run(settings, run_dir, resume=resume, overwrite=overwrite, begun=shown, progress=progress)
    reports.show_trained(run_dir, report.step, report.metrics, {"parameters": counts}, as_json)


@command()
def fit_fast(
    store: opt.SomeStores,
    out: Annotated[Path, opt.comes_out("Folder of tokenizer.json and its settings.")],
    overwrite: opt.Overwrite = False,
    config: opt.Config = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
) -> None:
    """Fit FAST action tokens to a store's training split, for `hier` in mode fast. --set horizon=…, scale=…."""
    from vla.heads.fit_fast import FitFastConfig
    from vla.heads.fit_fast import fit_fast as run

    settings = FitFastConfig.from_sources(config, [*opt.as_set({"data.stores": store}), *(set_ or ())])
    report = run(settings, out, overwrite=overwrite).to_json()
    emit(report) if as_json else open_log().print(f"{out}: {figures(report)}")


@command()
def distill(
    student: Annotated[str | None, typer.Argument(help="rgb2pc")] = None,
    store: opt.Stores = None,
    teacher: Annotated[str | None, opt.goes_in("Embeddings: a store, zarr arrays, or .npy files.")] = None,
    out: Annotated[Path | None, opt.comes_out("Run folder. Left out: runs/STUDENT.")] = None,
    steps: opt.Steps = None,
    skip_unpaired: Annotated[bool, opt.goes_in("Leave steps without one out.", "--skip-unpaired")] = False,
    dry_run: opt.DryRun = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    config: opt.Config = None,
    set_: opt.TrainSet = None,
    as_json: opt.Json = False,
) -> None:
    """Train a student on cached grids against a teacher's embeddings. --set model.KEY=…, loss.KEY=…, train.KEY=…."""
    from vla.featurize.distill.train import DistillConfig, prepare
    from vla.featurize.distill.train import distill as run
    from vla.stores.memory import keep_freed_memory
    from vla.stores.settings import begun_in

    short = {"train.steps": steps, "data.stores": store, "data.teacher": teacher}
    short |= {"data.skip_unpaired": skip_unpaired or None}
    keep_freed_memory()
    if resume and not (config or store):
        config = begun_in(out, "run.json", required=not set_)
    job = prepare(DistillConfig.from_sources(config, [*opt.as_set(short), *(set_ or ())], student=student))
    run_dir = out or Path("runs") / job.config.student
    if dry_run:
        emit(job.to_json() | {"out": str(run_dir)}) if as_json else show_facts(job.to_json() | {"out": str(run_dir)})
        return
    with show_training() as progress:
        report = run(job, run_dir, resume=resume, overwrite=overwrite, progress=progress)
    if not as_json:
        open_log().print(f"steps paired: {figures(job.artefact.pairing)}")
    reports.show_trained(run_dir, report.step, report.metrics, {"pairing": job.artefact.pairing}, as_json)


@command()
def evaluate(
    run: opt.Run,
    store: opt.OtherStores = None,
    seed: Annotated[int, opt.runs("Of the sampler.")] = 0,
    set_: opt.ModelSet = None,
    as_json: opt.Json = False,
) -> None:
    """Compare sampled actions with demonstrated ones, per dimension, in the data's units."""
    from vla.heads.checkpoint import load_head
    from vla.heads.evaluate import EvaluateSettings, evaluate_head

    settings = EvaluateSettings.from_sources(None, set_ or ())
    head = load_head(run, settings=settings.model)
    error = evaluate_head(head, store or None, seed=seed, data=settings.data)
    facts = {"checkpoint": str(head.folder), "step": head.step, **error.to_json()}
    emit(facts) if as_json else reports.show_errors(facts, error.extra)


@command()
def export(
    run: opt.Run,
    out: Annotated[Path, opt.comes_out("File .pt2; what its inputs are goes to the .json beside it.")],
    batch: Annotated[int, opt.comes_out("Observations at once.", min=1)] = 1,
    overwrite: opt.Overwrite = False,
    set_: opt.ModelSet = None,
    as_json: opt.Json = False,
) -> None:
    """Write a head as one file for torch.export: sampler and normalisation inside. --set model.sampler=…."""
    from vla.heads.checkpoint import HeadSettings, load_head
    from vla.heads.export import export_head

    settings = HeadSettings.from_sources(None, set_ or ())
    made = export_head(load_head(run, settings=settings.model), out, batch=batch, overwrite=overwrite)
    said = f"inputs {', '.join(made['inputs'])}; largest difference to the live head {made['largest_difference']:.1g}"
    reports.show_made(out, made, said, as_json)


@command()
def rollout(
    run: opt.Run,
    env: opt.Environment,
    episodes: Annotated[int, opt.runs("Unseen scenes to play.", min=1)] = 20,
    seed: Annotated[int, opt.runs("Which unseen scenes.", min=0)] = 0,
    n_action: Annotated[int | None, opt.runs("Actions executed per decision. Left out: the head's.", min=1)] = None,
    video: Annotated[Path | None, opt.comes_out(".mp4 of the first three episodes.")] = None,
    overwrite: opt.Overwrite = False,
    set_: opt.ModelSet = None,
    as_json: opt.Json = False,
) -> None:
    """Run backbone and head live in a simulator: success on unseen scenes, latency, a video."""
    from vla.rollout.envs.registry import make_env
    from vla.rollout.evaluate import roll_out
    from vla.rollout.policy import Policy, RolloutSettings
    from vla.stores.memory import keep_freed_memory

    keep_freed_memory()
    settings = RolloutSettings.from_sources(None, set_ or ())
    how: dict[str, Any] = {"backbones": settings.backbones, "far_state": settings.policy.far_state}
    policy = Policy.from_run(run, n_action=n_action, settings=settings.model, **how)
    world = make_env(env, **policy.env_options())
    try:
        with show_progress("rollout", "episodes") as progress:
            how = {"seed": seed, "video": video, "overwrite": overwrite, "progress": progress}
            report = roll_out(world, policy, episodes, **how)
    finally:
        world.close()
    said = f"success {report.success} (95 % Wilson interval); {figures(report.latency)}"
    reports.show_made(env, report.to_json(), said, as_json)


@command()
def action_dims(
    source: opt.Source = None,
    mapping: opt.Map = None,
    skip_bad: opt.SkipBad = False,
    config: opt.Config = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
) -> None:
    """Group the tasks of raw demonstrations by the size of action and state."""
    from vla.featurize.action_dims import DimsConfig, group, measure, to_json
    from vla.stores.settings import read_pairs

    short: dict[str, Any] = {"source": source, "map": read_pairs(mapping), "skip_bad": skip_bad or None}
    tasks = measure(DimsConfig.from_sources(config, set_ or (), **short))
    emit(to_json(tasks)) if as_json else reports.show_dims(group(tasks))


@command()
def backbones(
    backbone: opt.OneBackbone = None,
    as_json: opt.Json = False,
) -> None:
    """List the frozen backbones: what they make, their licences, what this machine lacks; or every option of one."""
    from vla.featurize.backbones.registry import BACKBONES, backbone_fields, missing

    fields = [] if backbone is None else [field.to_json() for field in backbone_fields(backbone)]
    names = list(BACKBONES) if backbone is None else [backbone]
    entries = {name: {**BACKBONES[name]._asdict(), "missing": missing(name)} for name in names}
    if as_json:
        emit(entries if backbone is None else {"backbone": backbone, **entries[backbone], "options": fields})
        return
    reports.show_backbones(entries)
    if backbone is None:
        reports.print_line("vla backbones BACKBONE lists a backbone's options.")
    else:
        how = "vla featurize takes them as --set options.NAME=VALUE;\nweights as --weights PLACE."
        reports.show_fields(fields, how)


@command()
def heads(
    head: opt.OneHead = None,
    as_json: opt.Json = False,
) -> None:
    """List the trainable heads and the features they need; or every setting of one head."""
    from vla.heads.compatibility import head_fields, table

    if head is None:
        emit({row.pop("head"): row for row in table()}) if as_json else reports.show_heads(table())
        return
    fields = [field.to_json() for field in head_fields(head)]
    emit({"head": head, "settings": fields}) if as_json else reports.show_fields(
        fields,
        f"{head} takes them as --set NAME=VALUE or from --config;\ntrain.* are those with defaults of its own.",
    )


def main() -> NoReturn:
    """Run the command line; turn errors into one line and an exit code."""
    # Spinning OpenMP threads on a busy machine slow a 6 ms step to 400 ms; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    protect_streams()
    from vla.stores.errors import VlaError

    guard_stderr()
    try:
        sys.exit(run_app(app, sys.argv[1:], process=True))
    except VlaError as error:
        sys.stderr.write(f"vla: {safe_line(str(error))}\n")
        sys.exit(end_output(error.exit_code))


if __name__ == "__main__":
    main()
