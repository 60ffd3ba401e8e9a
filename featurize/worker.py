"""What runs on a worker of a cluster: the job prepared once, then units by their numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla.featurize.job import FeaturizeConfig, Job, prepare
from vla.featurize.units import UnitMaker, UnitsReport, open_unit_maker
from vla.stores.fingerprint import canonical

TOPIC = "vla-featurize"
"""Under which running tasks tell how far they are."""
REPORT_SECONDS = 1.0
LINGER_SECONDS = 60.0
"""Without a task for so long, a worker lets go of its store by itself: a run that is killed tells nobody."""


@dataclass
class _Kept:
    """What a worker has ready: one backbone and one store at a time, as a cluster may outlive many runs."""

    held: ExitStack = field(default_factory=ExitStack)
    asked: tuple[bytes, str] | None = None
    root: str = ""
    job: Job | None = None
    maker: UnitMaker | None = None
    closing: threading.Timer | None = None

    def close(self) -> None:
        """Let go of the store and its lock. The backbone stays loaded."""
        self.maker = None
        self.held.close()


_kept, _making = _Kept(), threading.Lock()
_over: set[str] = set()
"""Runs that have ended."""


def make_on_worker(config: dict[str, Any], root: str, plan: str, run: str, units: list[int]) -> dict[str, Any]:
    """Run on a worker: make some units and return a `UnitsReport` as plain values.

    `plan` is the digest of what the run has planned, `run` the name under which it is ended. A worker of several
    threads makes the units of one task at a time: backbone and store are the process's.
    """
    from distributed import get_worker

    worker, last = get_worker(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS or done == total:
            last = time.monotonic()
            worker.log_event(TOPIC, {"name": str(worker.name), "units": units, "frames": done})

    try:
        with _making, _closing_later():
            over = run in _over
            report = UnitsReport(elsewhere=units) if over else _maker(config, root, plan).make(units, show)
    finally:
        if run in _over:  # ended meanwhile
            _close_if_idle()
    return asdict(report) | {"worker": str(worker.name)}


def end_on_worker(run: str) -> None:
    """Run on a worker, on its event loop: a run is over, its store is let go of, at the latest by the task at work."""
    _over.add(run)
    _close_if_idle()


@contextmanager
def _closing_later() -> Iterator[None]:
    if _kept.closing is not None:
        _kept.closing.cancel()
    try:
        yield
    finally:
        _kept.closing = threading.Timer(LINGER_SECONDS, _close_if_idle)
        _kept.closing.daemon = True
        _kept.closing.start()


def _close_if_idle() -> None:
    if _making.acquire(blocking=False):
        try:
            _kept.close()
        finally:
            _making.release()


def _maker(config: dict[str, Any], root: str, plan: str) -> UnitMaker:
    """Return the maker of a store, the last one if it is the same; for another store of a plan the backbone is there.

    The plan, because the same settings mean another store once the source has changed.
    """
    asked = (canonical(config), plan)
    if _kept.job is None or asked != _kept.asked:
        _kept.close()
        _kept.job = _kept.asked = None  # two backbones at once may not fit
        _kept.job = prepare(FeaturizeConfig.build(config, where="the run"))
    if _kept.maker is None or root != _kept.root or not _kept.maker.writer.in_place():
        _kept.close()
        _kept.maker = _kept.held.enter_context(open_unit_maker(_kept.job, Path(root)))
    _kept.asked, _kept.root = asked, root
    return _kept.maker
