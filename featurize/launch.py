"""Where a run runs: this process, worker processes of this machine, a cluster, or one job of an array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.featurize.estimate import probe
from vla.featurize.job import Job, run
from vla.featurize.run import RunReport
from vla.featurize.spread import run_on_cluster, run_share
from vla.featurize.units import share_of
from vla.stores.commits import committed_units
from vla.stores.errors import UsageError
from vla.stores.remote.options import is_url
from vla.stores.writer import require_store, with_tables

Progress = Callable[[Mapping[str, int], int], None]
"""Called with frames done by each process by name, and frames in all."""


@dataclass(frozen=True)
class Where:
    """At most one of: `workers` processes here, the dask `scheduler` to join, `unit_index` "i/n" of the units."""

    workers: int | None = None
    scheduler: str | None = None
    unit_index: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise UsageError(" and ".join(f"--{name.replace('_', '-')}" for name in given), expected="one of them")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers}", expected="1 or more")
        if self.unit_index is not None:
            share_of((), self.unit_index)


def launch(
    job: Job,
    root: Path | str,
    where: Where,
    *,
    resume: bool,
    overwrite: bool,
    accept: bool,
    progress: Progress = lambda frames, total: None,
) -> RunReport:
    """Make the store at `root`. All ways write the same bytes (on a CPU: with as many threads a process).

    With a `unit_index` an existing store is joined: its jobs start together, and the first makes it. Raises
    `UsageError` for flags that contradict that, and what `run`, `run_on_cluster` and `run_share` raise.
    """

    def alone(done: int, total: int) -> None:
        progress({"": done}, total)

    if where.unit_index is not None:
        if overwrite:
            raise UsageError("--overwrite with --unit-index", expected="a new --out, or the old store removed first")
        return run_share(job, root, where.unit_index, accept=accept, progress=alone)
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "accept": accept}
    if where.workers is None and where.scheduler is None:
        return run(job, root, **how, progress=alone)
    return run_on_cluster(job, root, workers=where.workers, scheduler=where.scheduler, **how, progress=progress)


def outlook(job: Job, root: Path | str, where: Where, *, overwrite: bool = False) -> dict[str, Any]:
    """Return what the plan says of time: {"pending_units", "pending_frames", "frames_per_s", "hours"}.

    With a `unit_index`, of that share alone. The pace is that of one process, from three batches of the first unit that
    is missing, times the workers asked for; a cluster's workers are not counted. Nothing is pending: no probe, hours 0.
    Raises `FingerprintError` where the store there was made with other settings, unless it is to be overwritten.
    """
    manifest = job.plan.manifest
    committed = set()
    if not (is_url(root) or overwrite) and Path(root).exists():
        require_store(Path(root), with_tables(manifest, job.plan.episodes))
        committed = committed_units(Path(root))
    asked = range(manifest.units) if where.unit_index is None else share_of(range(manifest.units), where.unit_index)
    units = [unit for unit in asked if unit not in committed]
    frames = sum(len(manifest.unit_range(unit)) for unit in units)
    facts: dict[str, Any] = {"pending_units": len(units), "pending_frames": frames, "frames_per_s": None, "hours": 0.0}
    if units:
        pace = probe(job, units[0])
        facts["frames_per_s"] = (where.workers or 1) / max(pace.seconds_per_frame, 1e-9)
        facts["hours"] = pace.hours(frames, where.workers or 1)
    return facts
