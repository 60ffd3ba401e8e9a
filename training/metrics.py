"""`metrics.jsonl`: one JSON object a line, always; and the clock behind its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from vla.stores.filesystem import explaining


class StepClock:
    """Sums over the steps since the last log line. Tensors stay on the device until `summary`."""

    def __init__(self) -> None:
        self.steps = 0
        self._began = time.perf_counter()
        self._waited = self._paused = 0.0
        self._loss: torch.Tensor | None = None
        self._parts: dict[str, torch.Tensor] = {}
        self._norm: Any = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor], norm: Any) -> None:
        """Count one step."""
        self.steps += 1
        self._loss = loss if self._loss is None else self._loss + loss
        for name, value in parts.items():
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        self._norm = norm

    def restart(self) -> None:
        """Leave what happened since the last step (validation, a checkpoint) out of the speed."""
        if self.steps == 0:
            self._began = time.perf_counter()

    def summary(self, lr: float) -> dict[str, float]:
        """Return mean loss and metrics, gradient norm of the last step, lr, steps/s, share of time spent waiting."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        assert self._loss is not None  # at least one step was added
        means = {name: float(value) / self.steps for name, value in self._parts.items()}
        return {
            **means,
            "loss": float(self._loss) / self.steps,
            "lr": lr,
            "grad_norm": float(self._norm),
            "steps_per_s": self.steps / seconds,
            "data_wait_share": self._waited / seconds,
        }


class MetricsLog:
    """Appends to `metrics.jsonl` and to the trackers. Lines after the step that a run resumes from are dropped."""

    def __init__(self, run_dir: Path, start: int, accelerator: Any) -> None:
        self._path, self._accelerator = run_dir / "metrics.jsonl", accelerator
        with explaining(self._path):
            kept = [line for line in self._lines() if json.loads(line)["step"] <= start]
            if accelerator.is_main_process:
                self._path.write_text("".join(kept))
            self._file = self._path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the figures of a step."""
        if self._accelerator.is_main_process:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        if self._accelerator.trackers:
            self._accelerator.log(dict(metrics), step=step)

    def _lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        # A killed run may leave half a line at the end.
        return [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
