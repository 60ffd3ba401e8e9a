"""What runs on a worker of a cluster: the job prepared once, then units by their numbers."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla.featurize.job import FeaturizeConfig, Job, prepare
from vla.featurize.units import UnitMaker, open_unit_maker
from vla.stores.fingerprint import canonical

TOPIC = "vla-featurize"
"""Under which running tasks tell how far they are."""
REPORT_SECONDS = 1.0


@dataclass
class _Kept:
    """What a worker has ready: one backbone and one store at a time, as a cluster may outlive many runs."""

    held: ExitStack = field(default_factory=ExitStack)
    config: bytes = b""
    root: str = ""
    job: Job | None = None
    maker: UnitMaker | None = None


_kept, _loading = _Kept(), threading.Lock()


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
    """Return the maker of a store, the last one if it is the same; of another, at least the backbone stays loaded."""
    asked = canonical(config)
    if (asked, root) != (_kept.config, _kept.root) or _kept.maker is None:
        _kept.held.close()
        if asked != _kept.config or _kept.job is None:
            _kept.job = prepare(FeaturizeConfig.build(config, where="the run"))
        _kept.held, _kept.config, _kept.root = ExitStack(), asked, root
        _kept.maker = _kept.held.enter_context(open_unit_maker(_kept.job, Path(root)))
    return _kept.maker
