"""One run over several processes: units are handed to the workers of a cluster, and what they made is counted.

A task is a few neighbouring units, named by their numbers: the graph holds no data and no network. What is made is on
disk, committed; workers send back counts. A worker that dies costs the units it had in hand, which another takes.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from vla.featurize.cluster import DEATHS, open_cluster
from vla.featurize.job import Job, refuse_shadowing
from vla.featurize.room import require_room
from vla.featurize.run import RunReport
from vla.featurize.sources.registry import refuse_overwriting_source
from vla.featurize.units import UnitsReport, open_unit_maker, require_shared_folder, share_of
from vla.featurize.worker import TOPIC, end_on_worker, make_on_worker
from vla.stores.errors import DataError, MachineError, StoreError
from vla.stores.shared_writer import SharedWriter, open_shared_writer
from vla.stores.writer import refuse_existing, with_tables

TASKS_PER_WORKER = 16
"""Tasks are as large as leaves this many for each worker, so that all end at about the same time, but no larger than
GROUP units: at a task's end the worker's pipeline runs dry once."""
GROUP = 8
POLL_SECONDS = 1.0
"""Between looks at units that another run has claimed."""

WorkerProgress = Callable[[Mapping[str, int], int], None]
"""Called with frames done by each worker so far, and frames in all."""


def run_on_cluster(
    job: Job,
    root: Path | str,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    progress: WorkerProgress = lambda frames, total: None,
) -> RunReport:
    """Make the store at `root` on `workers` processes of this machine, or on those of the dask cluster at `scheduler`.

    Two such runs of one store share its units; this one returns when all are committed, by whomever. Raises `DataError`
    naming the units that failed, when all others are made; `MachineError` where the cluster is lost or the disk full;
    `UsageError` where `root` overlaps with what is read.
    """
    refuse_overwriting_source(root, job.config.source, job.source)
    root = require_shared_folder(root)
    refuse_shadowing(root)
    require_room(job.plan, root, overwrite=overwrite, accept=accept)
    total = RunReport()
    how = {"resume": resume, "overwrite": overwrite}
    refuse_existing(root, **how)
    with ExitStack() as held:
        # First the workers: without them nothing is made or deleted.
        client = held.enter_context(open_cluster(workers, scheduler))
        writer = held.enter_context(open_shared_writer(root, job.plan.manifest, job.plan.episodes, **how))
        units, began = writer.pending(), time.perf_counter()
        if not units:
            return total
        rows = {unit: len(writer.manifest.unit_range(unit)) for unit in units}
        while units:
            report = make_on_cluster(client, job, root, units, rows, progress)
            _add(total, report.run)
            _require_made(report, root)
            units = _wait_for(writer, report.elsewhere)
        missing = writer.pending()
        if missing:
            found = f"{root} lacks units {', '.join(map(str, missing))}, though no worker failed"
            raise StoreError(found, expected="a folder that all workers see", fix="the same command with --resume")
    seconds = total.seconds = time.perf_counter() - began
    total.busy = {stage: spent / seconds for stage, spent in total.busy.items()}
    return total


def run_share(
    job: Job,
    root: Path | str,
    share: str,
    *,
    accept: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunReport:
    """Make share "i/n" of the units of the store at `root`, in this process; whoever comes first makes the store.

    Raises `DataError` naming the units that failed, when all others are made, `MachineError` where the disk is full.
    """
    root = require_shared_folder(root)
    require_room(job.plan, root, accept=accept)
    with open_unit_maker(job, root) as maker:
        units = share_of(range(maker.writer.manifest.units), share)
        report = maker.make([unit for unit in units if not maker.writer.committed(unit)], progress)
    _require_made(report, root)
    return report.run


def make_on_cluster(
    client: Any,
    job: Job,
    root: Path,
    units: list[int],
    rows: Mapping[int, int],
    progress: WorkerProgress = lambda frames, total: None,
) -> UnitsReport:
    """Make `units` on the workers of a cluster. `rows` {unit: frames}. Stages' `busy` is in seconds of all workers.

    Units that failed, or over which workers died, are reported, not raised. Raises `MachineError` where the cluster is
    lost or the disk full. Workers that go on living keep the backbone, and neither the store nor its lock.
    """
    from distributed import as_completed

    workers = max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)
    size = max(min(len(units) // (workers * TASKS_PER_WORKER), GROUP), 1)
    run, plan = uuid.uuid4().hex, with_tables(job.plan.manifest, job.plan.episodes).sha256()
    task = (job.config.model_dump(mode="json"), str(root.resolve()), plan, run)
    tally = _Tally(sum(rows[unit] for unit in units), progress)
    client.subscribe_topic(TOPIC, tally.hear)
    total, futures = UnitsReport(), dict[Any, list[int]]()
    try:
        waiting = [units[at : at + size] for at in range(0, len(units), size)]
        while waiting:
            futures = {client.submit(make_on_worker, *task, group, pure=False): group for group in waiting}
            waiting = []
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
                waiting += _take(future, futures[future], total, tally)
    finally:
        client.unsubscribe_topic(TOPIC)
        _end(client, run, futures)
    return total


def _end(client: Any, run: str, futures: Iterable[Any]) -> None:
    """Call off what is left of a run, and have the workers let go of its store."""
    if client.status != "running":  # workers do not outlive their scheduler
        return
    with suppress(OSError):  # lost just now
        client.cancel([future for future in futures if not future.done()])
        client.run(end_on_worker, run, on_error="ignore")  # a worker that cannot be asked is dead, its lock with it


def _take(future: Any, group: list[int], total: UnitsReport, tally: _Tally) -> list[list[int]]:
    """Count what a task did. Return what is to be submitted again: the units of a task over which workers died."""
    from distributed import KilledWorker

    error = future.exception() if future.status != "cancelled" else None
    if future.status == "cancelled":
        raise MachineError("the cluster was lost", fix="the same command with --resume")
    if isinstance(error, KilledWorker):
        if len(group) > 1:  # which of them it was shows when each has its own task
            return [[unit] for unit in group]
        total.failed[group[0]] = f"{DEATHS + 1} workers died over it (see their logs: memory, most often)"
        return []
    if error is not None:
        raise error
    values = future.result()
    run = RunReport(**values["run"])
    run.busy = {stage: share * run.seconds for stage, share in run.busy.items()}
    _add(total.run, run)
    total.failed |= {int(unit): reason for unit, reason in values["failed"].items()}
    total.elsewhere += values["elsewhere"]
    tally.finished(values["worker"], group, run.frames)
    return []


class _Tally:
    """Frames done by each worker: what finished tasks report, and what running ones tell of meanwhile."""

    def __init__(self, total: int, progress: WorkerProgress) -> None:
        self._total, self._progress = total, progress
        self._done: dict[str, int] = {}
        self._running: dict[str, tuple[list[int], int]] = {}
        self._finished: set[int] = set()
        self._lock = threading.Lock()

    def hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """Take a worker's word, on the client's thread."""
        said = event[1]
        with self._lock:
            if said["units"][0] not in self._finished:  # the last word of a task may come after its result
                self._running[said["name"]] = (list(said["units"]), int(said["frames"]))
                self._show()

    def finished(self, worker: str, units: list[int], frames: int) -> None:
        """Count a finished task."""
        with self._lock:
            self._done[worker] = self._done.get(worker, 0) + frames
            self._finished.add(units[0])
            if self._running.get(worker, ([], 0))[0] == units:
                del self._running[worker]
            self._show()

    def _show(self) -> None:
        workers = sorted(self._done.keys() | self._running.keys())
        frames = {name: self._done.get(name, 0) + self._running.get(name, ([], 0))[1] for name in workers}
        self._progress(frames, self._total)


def _add(total: RunReport, run: RunReport) -> None:
    """Add up runs whose `busy` is in seconds."""
    total.frames, total.units = total.frames + run.frames, total.units + run.units
    total.skipped |= run.skipped
    for stage, spent in run.busy.items():
        total.busy[stage] = total.busy.get(stage, 0.0) + spent


def _wait_for(writer: SharedWriter, units: list[int]) -> list[int]:
    """Wait until units that other runs had claimed are committed, or free again; return the free ones."""
    while units:
        units = [unit for unit in units if not writer.committed(unit)]
        free = [unit for unit in units if writer.claim(unit)]
        writer.release()
        if free:
            return free
        time.sleep(POLL_SECONDS if units else 0)
    return []


def _require_made(report: UnitsReport, root: Path) -> None:
    """Raise `DataError` naming the units that failed."""
    if report.failed:
        unit, reason = min(report.failed.items())
        others = sorted(report.failed.keys() - {unit})
        more = f"; also {', '.join(map(str, others))}" if others else ""
        raise DataError(f"{root}: unit {unit} failed: {reason}{more}", fix="mend or --skip-bad, then --resume")
