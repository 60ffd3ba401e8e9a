"""Worker processes of one machine, each on its own cores: they share no cache line, and none decodes on another's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin


def core_groups(cores: Sequence[int], workers: int) -> list[list[int]]:
    """Divide cores among workers, neighbours together, as evenly as may be; none where there are more workers."""
    if workers > len(cores):
        return []
    return [list(cores[at * len(cores) // workers : (at + 1) * len(cores) // workers]) for at in range(workers)]


class StayOnCores(WorkerPlugin):
    """Keep the worker that is called "0", "1", … (and whatever replaces it) on the cores of that number."""

    name = "vla-cores"

    def __init__(self, groups: list[list[int]]) -> None:
        self.groups = groups

    def setup(self, worker: Any) -> None:
        """Bind every thread that the worker has; those to come inherit it."""
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(int(thread.name), self.groups[int(worker.name)])
