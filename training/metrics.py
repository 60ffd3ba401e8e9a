"""`metrics.jsonl`: one JSON object a line, always; and what is gathered between two lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch

from vla.stores.errors import DataError
from vla.stores.filesystem import explaining, write_atomic
from vla.training.feed import Feed

LOSS, NORM = "loss", "grad_norm"
TIMING = ("steps_per_s", "data_wait_share")
"""Figures of the machine's moment: shown and logged, and in no checkpoint, so that equal runs give equal files."""

Series = dict[str, list[float]]


class Window:
    """Figures of every step since the last log line: loss, gradient norm and the module's own metrics.

    They stay on the device until `drain`, so that a step never waits for the GPU. Drained ones are part of a
    checkpoint: the first line after resuming is the mean over the same steps as in an uninterrupted run.
    `average` is the mean over processes; `scaled` says that a gradient scaler deals with overflowing gradients.
    """

    def __init__(self, average: Callable[[torch.Tensor], torch.Tensor], *, scaled: bool) -> None:
        self._average, self._scaled = average, scaled
        self._pending: dict[str, list[torch.Tensor]] = {}
        self._known: Series = {}

    def add(self, loss: torch.Tensor, norm: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Take the figures of one step, detached scalars."""
        for name, value in ((LOSS, loss), (NORM, norm), *parts.items()):
            self._pending.setdefault(name, []).append(value)

    def drain(self, step: int) -> None:
        """Fetch what is pending; `step` is the newest. Raises `DataError` naming the first step that is not finite."""
        if not self._pending:
            return
        fresh = {name: self._fetch(values) for name, values in sorted(self._pending.items())}
        self._pending = {}
        first = step - len(fresh[LOSS]) + 1
        # An overflow under fp16 is the scaler's everyday business: it skips the step and lowers the scale.
        for name, what in ((LOSS, "loss"),) if self._scaled else ((LOSS, "loss"), (NORM, "gradient's norm")):
            for offset, value in enumerate(fresh[name]):
                if not math.isfinite(value):
                    raise DataError(
                        f"the {what} is {value} at step {first + offset}",
                        expected="a finite number",
                        fix="vla verify on the store, a smaller train.lr, or train.precision=no",
                    )
        for name, values in fresh.items():
            self._known.setdefault(name, []).extend(values)

    def means(self) -> dict[str, float]:
        """Return the means over the window. Overflows under fp16 are left out and counted."""
        means = {}
        for name, values in self._known.items():
            finite = [value for value in values if math.isfinite(value)] if name == NORM else values
            if finite:
                means[name] = math.fsum(finite) / len(finite)
            if len(finite) < len(values):
                means["skipped_steps"] = float(len(values) - len(finite))
        return means

    def begin(self) -> None:
        """Begin a new window."""
        self._known = {}

    def state(self) -> Series:
        """Return what was drained since the last line, JSON-able."""
        return self._known

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Put back what `state` returned."""
        self._known = {name: [float(value) for value in values] for name, values in state.items()}

    def _fetch(self, values: list[torch.Tensor]) -> list[float]:
        floats: list[float] = self._average(torch.stack(values).float()).tolist()
        return floats


class Clock:
    """Speed of the steps since the last log line; validation and checkpoints are left out. `steps` counts them."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._begin()

    def _begin(self) -> None:
        self.steps, self._paused, self._began = 0, 0.0, perf_counter()
        self._feed.waited = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out."""
        began = perf_counter()
        yield
        self._paused += perf_counter() - began

    def close(self) -> dict[str, float]:
        """Return steps per second and the share of the time spent waiting for data, and begin anew."""
        seconds = max(perf_counter() - self._began - self._paused, 1e-9)
        figures = dict(zip(TIMING, (self.steps / seconds, self._feed.waited / seconds), strict=True))
        self._begin()
        return figures


class MetricsLog:
    """Appends to `metrics.jsonl` and the trackers. Lines after the step that a run resumes from are dropped."""

    def __init__(self, run_dir: Path, start: int, accelerator: Any) -> None:
        self._accelerator, self._file = accelerator, None
        if not accelerator.is_main_process:
            return
        path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= start]
        write_atomic(path, "".join(kept).encode())
        with explaining(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the figures of a step; what is not finite becomes null, as JSON has no word for it."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with explaining(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        self._accelerator.log(dict(metrics), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with explaining(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    # A killed run may leave half a line at the end, a crashed machine a line of zeros.
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n") and _step(line) >= 0]


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
