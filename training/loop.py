"""The one training loop: batches in, a run folder out. It knows neither features nor actions.

Optimiser step s consumes the batches s * accumulate * processes … of the stream, so that a batch is a function of the
step alone: a resumed run sees exactly what an uninterrupted one would have seen, and on a CPU gives the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from transformers import get_scheduler

from vla.stores.errors import CheckpointError, DataError, MachineError, UsageError
from vla.stores.filesystem import explaining, sweep_partial, write_atomic
from vla.stores.fingerprint import require_equal
from vla.training import checkpoint
from vla.training.config import NEUTRAL, TrainConfig
from vla.training.ema import WarmAverage
from vla.training.metrics import MetricsLog, StepClock

log = logging.getLogger(__name__)


class Batch(Protocol):
    """Anything that moves to a device."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on `device`."""
        ...


Batches = Callable[[int, int], Iterator[Any]]
"""`batches(first, stride)` yields batches first, first + stride, …, each a function of its number alone."""

Validate = Callable[[torch.nn.Module, int], dict[str, float]]
Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class FitReport:
    """How a run ended: its folder, the last step, and the last figures logged."""

    run_dir: Path
    step: int
    metrics: dict[str, float]


class _LossModule(torch.nn.Module):
    """Calls `module.loss` from `forward`, which is where DistributedDataParallel hooks in."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss: tuple[torch.Tensor, dict[str, torch.Tensor]] = self.module.loss(batch)  # type: ignore[operator]
        return loss


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from the global generator
    random.seed(seed)


def fit(
    module: torch.nn.Module,
    batches: Batches,
    config: TrainConfig,
    run_dir: Path,
    *,
    artefact: Mapping[str, Any],
    validate: Validate | None = None,
    param_groups: list[dict[str, Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda step, total, metrics: None,
) -> FitReport:
    """Train `module`, which has `loss(batch) -> (scalar, {name: detached scalar})`, and write checkpoints.

    `artefact` is kept in every checkpoint; on resuming it has to be equal. `validate(averaged module, step)` returns
    figures; `config.best_metric` among them picks the best checkpoint (lower is better).
    Raises `UsageError` where `run_dir` exists and neither flag is given, `FingerprintError` where a resumed run was
    made with other settings, `DataError` where the loss is no longer finite. On Ctrl-C it writes a checkpoint first.
    """
    artefact = json.loads(json.dumps(artefact))
    start_from = _prepare_folder(run_dir, config, artefact, resume, overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = _accelerator(config, run_dir)
    groups = param_groups or [{"params": [p for p in module.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    schedule = get_scheduler(
        "cosine" if config.schedule == "cosine" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=min(config.warmup_steps, config.steps // 10),
        num_training_steps=config.steps,
    )
    module.to(accelerator.device)
    ema = WarmAverage(module, config.ema_power, config.ema_max) if config.ema else None
    wrapped, prepared = accelerator.prepare(_LossModule(module), optimizer)
    run = _Run(accelerator, module, wrapped, prepared, optimizer, schedule, ema, config, run_dir, artefact)
    step = run.restore(start_from) if start_from is not None else 0
    try:
        return run.train(batches, step, validate, progress)
    finally:
        accelerator.end_training()


@dataclass
class _Run:
    accelerator: Accelerator
    module: torch.nn.Module
    wrapped: Any
    prepared: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: WarmAverage | None
    config: TrainConfig
    run_dir: Path
    artefact: Mapping[str, Any]
    best: float = math.inf

    def train(self, batches: Batches, start: int, validate: Validate | None, progress: Progress) -> FitReport:
        config, world = self.config, self.accelerator.num_processes
        first = start * config.accumulate * world + self.accelerator.process_index
        stream = batches(first, world)
        metrics: dict[str, float] = {}
        step = saved = start
        self.module.train()
        with MetricsLog(self.run_dir, start, self.accelerator) as metrics_log:
            clock = StepClock()
            try:
                while step < config.steps:
                    clock.add(*self._step(stream, clock))
                    step += 1
                    last = step == config.steps
                    if step % config.log_every == 0 or last:
                        metrics = clock.summary(self.schedule.get_last_lr()[0])
                        if not math.isfinite(metrics["loss"]):
                            raise DataError(f"the loss is {metrics['loss']} near step {step}", fix="a smaller train.lr")
                        metrics_log.write(step, metrics)
                        clock = StepClock()
                    if validate is not None and (step % config.validate_every == 0 or last):
                        metrics |= self._validate(validate, step)
                        metrics_log.write(step, metrics)
                        clock.restart()
                    if step % config.checkpoint_every == 0 or last:
                        self._save(step, metrics)
                        saved = step
                        clock.restart()
                    progress(step, config.steps, metrics)
            except KeyboardInterrupt:
                if step > saved:
                    self._save(step, {})
                raise
            finally:
                close = getattr(stream, "close", None)
                if close is not None:
                    close()
        return FitReport(self.run_dir, step, metrics)

    def _step(self, stream: Iterator[Any], clock: StepClock) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
        """Run one optimiser step; return loss, metrics and gradient norm, all still on the device."""
        config, total = self.config, None
        parts: dict[str, torch.Tensor] = {}
        for micro in range(config.accumulate):
            with clock.waiting():
                # Copied before this call returns: the ring behind a batch is refilled once the next one is asked for.
                batch = next(stream).to(self.accelerator.device)
            hold = micro < config.accumulate - 1
            with self.accelerator.no_sync(self.wrapped) if hold else nullcontext(), self.accelerator.autocast():
                loss, parts = self.wrapped(batch)
            self.accelerator.backward(loss / config.accumulate)
            total = loss.detach() if total is None else total + loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), config.grad_clip)
        self.prepared.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.prepared.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.module)
        assert total is not None  # accumulate is at least 1
        return total / config.accumulate, parts, norm

    def _validate(self, validate: Validate, step: int) -> dict[str, float]:
        model = self.ema.averaged if self.ema is not None else self.module
        model.eval()
        # Validation draws random numbers (samplers do); training must go on as if it had not.
        with torch.random.fork_rng(devices=[self.accelerator.device] if self.accelerator.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            with torch.inference_mode():
                figures = validate(model, step)
        self.module.train()
        return figures

    def _save(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        value = metrics.get(self.config.best_metric)
        better = value is not None and value < self.best
        if better and value is not None:
            self.best = value
        extra = {
            "scheduler": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": self.best if math.isfinite(self.best) else None,
        }
        averaged = self.ema.averaged if self.ema is not None else None
        folder = checkpoint.save(self.run_dir, step, self.module, averaged, self.optimizer, extra, self.artefact)
        if better and value is not None:
            checkpoint.write_best(self.run_dir, folder, self.config.best_metric, value)
        self._prune()

    def _prune(self) -> None:
        best = self.run_dir / "best.json"
        keep = {json.loads(best.read_bytes())["checkpoint"]} if best.is_file() else set()
        for folder in checkpoint.checkpoints(self.run_dir)[self.config.keep_checkpoints :]:
            if folder.name not in keep:
                shutil.rmtree(folder)

    def restore(self, folder: Path) -> int:
        averaged = self.ema.averaged if self.ema is not None else None
        state = checkpoint.restore(folder, self.module, averaged, self.optimizer)
        self.schedule.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.best = math.inf if state["best"] is None else float(state["best"])
        step = int(state["step"])
        if self.ema is not None:
            self.ema.n_averaged.fill_(step + 1)
        log.info("going on from %s", folder)
        return step


def _prepare_folder(
    run_dir: Path, config: TrainConfig, artefact: Mapping[str, Any], resume: bool, overwrite: bool
) -> Path | None:
    """Make the run folder ready; return the checkpoint to go on from, or None for a fresh start."""
    settings = {"train": config.model_dump(mode="json", exclude=NEUTRAL), "artefact": artefact}
    file = run_dir / "run.json"
    if run_dir.exists() and any(run_dir.iterdir()):
        if not file.is_file():
            raise UsageError(f"{run_dir} exists and is no run of ours", fix="another --out")
        if resume:
            fix = "the settings it was begun with, or another --out"
            require_equal(json.loads(file.read_bytes()), settings, what=str(run_dir), fix=fix)
            sweep_partial(run_dir)
            try:
                return checkpoint.newest_complete(run_dir)
            except CheckpointError:
                log.warning("%s has no complete checkpoint yet: starting from step 0", run_dir)
                return None
        if not overwrite:
            raise UsageError(f"{run_dir} exists", fix="--resume to go on, --overwrite to replace it, or another --out")
        shutil.rmtree(run_dir)
    with explaining(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(settings, indent=1).encode())
    return None


def _accelerator(config: TrainConfig, run_dir: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=config.device == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=str(run_dir),
        )
    except (ImportError, ValueError) as error:
        raise MachineError(
            f"accelerate refuses these settings: {error}", fix="pip install the tracker, or drop it"
        ) from None
    if config.device == "cuda" and accelerator.device.type != "cuda":
        raise MachineError("device 'cuda' is not there", expected="a GPU that torch sees", fix="--set train.device=cpu")
    if config.trackers:
        accelerator.init_trackers("vla", config=json.loads(config.model_dump_json(exclude={"betas", "trackers"})))
    return accelerator
