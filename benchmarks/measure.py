"""How every benchmark here measures: contestants interleaved in one process, medians of per-round ratios, spread.

One OpenMP thread, because two of them spinning on a busy machine slow a copy a hundredfold; memory once freed is kept,
because on a virtual machine the first touch of a page costs more than the copy. Both are set before torch is imported,
and hold for every contestant alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vla.stores.memory import keep_freed_memory

keep_freed_memory()


def arguments(description: str, **switches: str) -> argparse.Namespace:
    """Parse `--quick` (under 40 s, smaller sizes), `--json` (one object on stdout), and a script's own switches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 40 s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the log on stderr")
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def interleave(
    contestants: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Time each contestant once a round, in alternating order; return seconds per round. The first round is dropped.

    `before` is called before each, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for name in names:
            before()
            began = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> dict[str, float]:
    """How many times as fast as `peer` is `ours`: median of the per-round ratios, and their range."""
    ratios = [theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def report(figures: dict[str, Any], *, as_json: bool) -> None:
    """Print the figures: JSON alone on stdout, or one `key: value` a line."""
    figures = {
        **figures,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    if as_json:
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    for key, value in figures.items():
        print(f"{key}: {round(value, 3) if isinstance(value, float) else value}")
