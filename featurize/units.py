"""Some units of a store, whoever asks for them: a worker of a cluster, one job of an array.

A unit that fails is set aside, the others are made, and it is tried again, a bounded number of times. Its reason is
reported; what was committed stays. What the disk refuses all units ends the work at once.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vla.featurize.job import Job, batch_size_on, make_units, refuse_shadowing, take_device
from vla.featurize.run import Progress, RunReport
from vla.stores.errors import MachineError, UsageError, VlaError
from vla.stores.remote.options import is_url
from vla.stores.shared_writer import SharedWriter, open_shared_writer

TRIES = 3
"""Times a unit is tried before it counts as failed: a network disk hiccups once, a broken video stays broken."""

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What a disk says to every unit alike, however often it is asked."""


@dataclass
class UnitsReport:
    """What became of the units asked for. `failed` {unit: reason}; `elsewhere` are claimed by other processes."""

    run: RunReport = field(default_factory=RunReport)
    failed: dict[int, str] = field(default_factory=dict)
    elsewhere: list[int] = field(default_factory=list)


class UnitMaker:
    """A job ready to make units of a store that others write too: backbone on its device, store joined. One thread."""

    def __init__(self, job: Job, writer: SharedWriter) -> None:
        self._job, self.writer = job, writer
        self._device = take_device(job)
        self._batch_size = batch_size_on(job, self._device)

    def make(self, units: Sequence[int], progress: Progress = lambda done, total: None) -> UnitsReport:
        """Make those of `units` that nobody has made or is making. Raises nothing that one unit can be blamed for.

        Raises `MachineError` where the disk is full or may not be written.
        """
        writer, began, busy = self.writer, time.perf_counter(), Counter[str]()
        already, rows = set(writer.made), {unit: len(writer.manifest.unit_range(unit)) for unit in units}
        total, failed = sum(rows.values()), dict[int, str]()

        def frames() -> int:
            return sum(rows[unit] for unit in rows.keys() & (writer.made - already))

        if self._attempt(units, busy, progress) is not None:  # whose fault it was is found by making them one by one
            for unit in units:
                self._try(unit, failed, busy, partial(_shift, progress, frames(), total))
        made = sorted(writer.made - already)
        seconds = time.perf_counter() - began
        run = RunReport(0, len(made), seconds, {stage: spent / seconds for stage, spent in busy.items()})
        for unit in made:
            skipped, unit_rows = writer.commits[unit].skipped, writer.manifest.unit_range(unit)
            run.frames += rows[unit] - int(self._job.plan.episodes.rows_of(skipped, unit_rows).sum())
            run.skipped |= skipped
        elsewhere = [unit for unit in units if unit not in failed and not writer.committed(unit)]
        return UnitsReport(run, failed, elsewhere)

    def _try(self, unit: int, failed: dict[int, str], busy: Counter[str], progress: Progress) -> None:
        for _ in range(TRIES):
            reason = self._attempt([unit], busy, progress)
            if reason is None:
                failed.pop(unit, None)
                return
            failed[unit] = reason

    def _attempt(self, units: Sequence[int], busy: Counter[str], progress: Progress) -> str | None:
        """Make units. Return what went wrong, as text: the error itself holds on to the network's memory."""
        try:
            report = make_units(self._job, self.writer, self._device, self._batch_size, units=units, progress=progress)
        except VlaError as error:
            if isinstance(error, MachineError) and getattr(error.__cause__, "errno", None) in REFUSED:
                raise
            return str(error)
        finally:
            for unit in units:  # these alone: the writer may have more in hand
                self.writer.release(unit)
        busy.update({stage: share * report.seconds for stage, share in report.busy.items()})
        return None


def _shift(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


@contextmanager
def open_unit_maker(job: Job, root: Path) -> Iterator[UnitMaker]:
    """Join the writers of the store at `root`, making it where it is not there. Raises as `open_shared_writer` does."""
    refuse_shadowing(root)
    with open_shared_writer(root, job.plan.manifest, job.plan.episodes) as writer:
        yield UnitMaker(job, writer)


def require_shared_folder(root: Path | str) -> Path:
    """Return the folder that several processes write to. Raises `UsageError` for a URL."""
    if is_url(root):
        raise UsageError(
            f"{root} written by several processes",
            expected="a folder that all of them see",
            fix="write to a shared file system, then copy the store; or one process",
        )
    return Path(root)


def share_of(units: Sequence[int], text: str) -> list[int]:
    """Return the units of share "i/n", i from 0 to n - 1: neighbours, because a video is read from end to end.

    Raises `UsageError` for anything else.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--unit-index {text!r}", expected="i/n with i from 0 to n - 1, such as 3/16")
    i, n = int(index), int(count)
    return list(units[i * len(units) // n : (i + 1) * len(units) // n])
