"""What runs on a worker of a cluster: the job prepared once, then units by their numbers."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla.featurize.job import FeaturizeConfig, prepare
from vla.featurize.units import UnitMaker, open_unit_maker
from vla.stores.fingerprint import canonical

TOPIC = "vla-featurize"
"""Under which running tasks tell how far they are."""
REPORT_SECONDS = 1.0

_ready: dict[bytes, tuple[ExitStack, UnitMaker]] = {}
_loading = threading.Lock()


def make_on_worker(config: dict[str, Any], root: str, units: list[int]) -> dict[str, Any]:
    """Run on a worker: make some units and return a `UnitsReport` as plain values."""
    from distributed import get_worker

    with _loading:
        maker = _maker(config, root)
    worker, last = get_worker(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS or done == total:
            last = time.monotonic()
            worker.log_event(TOPIC, {"name": str(worker.name), "units": units, "frames": done})

    return asdict(maker.make(units, show)) | {"worker": str(worker.name)}


def _maker(config: dict[str, Any], root: str) -> UnitMaker:
    key = canonical({"root": root, "config": config})
    if key not in _ready:
        for held, _ in _ready.values():  # a cluster that outlives runs: one backbone at a time
            held.close()
        _ready.clear()
        held = ExitStack()
        job = prepare(FeaturizeConfig.build(config, where="the run"))
        _ready[key] = held, held.enter_context(open_unit_maker(job, Path(root)))
    return _ready[key][1]
