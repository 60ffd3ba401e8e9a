"""The one training loop: batches in, a run folder out. It knows neither features nor actions.

Optimiser step s (0, 1, …) of process r takes the batches (s * accumulate + micro) * processes + r, micro = 0 …
accumulate - 1. A batch is a function of its number alone, so that a resumed run sees exactly what an uninterrupted one
would have seen, and on a CPU gives the same bits. The loss of a step is one sum over one count for each of its terms,
over all batches of the step (processes.py); of a module without counts it is the mean of the batches' losses.

accelerate gives device, processes, autocast, gradient scaler and trackers. Its optimiser wrapper is left out: it looks
up a package in every step, which costs 0.17 ms, 3 % of a 6 ms step.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import broadcast_object_list

from vla.pretrained.weights import first_not_finite
from vla.stores.errors import DataError, UsageError
from vla.stores.interrupt import Interrupted
from vla.stores.settings import nearest
from vla.training.config import TrainConfig
from vla.training.devices import accelerated
from vla.training.feed import Feed
from vla.training.interrupt import stopping
from vla.training.metrics import Clock, MetricsLog
from vla.training.processes import Divisors, step_divisors
from vla.training.run_folder import begun_warmup, can_resume, prepare_run
from vla.training.seeding import random_aside, seed_everything
from vla.training.state import TrainState

__all__ = ["Batches", "FitReport", "Progress", "Trainable", "Validate", "fit", "seed_everything"]


class Trainable(Protocol):
    """What is asked of a module: a scalar loss, and detached scalars worth logging (the same names in every step)."""

    def loss(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss of a batch, which is on the module's device."""
        ...


@runtime_checkable
class CountedLoss(Protocol):
    """A `Trainable` whose loss counts some elements and masks others. `stepped` is called after each optimiser step."""

    def counts(self, batch: Any) -> Mapping[str, torch.Tensor]:
        """Return how many elements of a batch each masked sum of the loss counts, by name, scalars."""
        ...

    def loss(self, batch: Any, divisors: Divisors | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, each sum divided by its entry in `divisors`, or by its own count where there are none."""
        ...

    def stepped(self) -> None:
        """Advance what follows the count of optimiser steps, such as a ramp."""
        ...


Batches = Callable[[int, int], Iterator[Any]]
"""`batches(first, stride)` yields the batches first, first + stride, … for ever, each a function of its number alone.

A batch has `to(device, *, non_blocking)`, and may live in memory that is reused once the next one is asked for."""

Validate = Callable[[torch.nn.Module, int], dict[str, float]]
Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class FitReport:
    """How a run ended: its folder, the last step, and the last figures of each name.

    `resumed_from` is the checkpoint it went on from; `passed_over` says why newer ones were not it.
    """

    run_dir: Path
    step: int
    metrics: dict[str, float]
    resumed_from: Path | None = None
    passed_over: tuple[str, ...] = ()


def fit(
    module: torch.nn.Module,
    batches: Batches,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    artefact: Mapping[str, Any],
    places: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    validate: Validate | None = None,
    param_groups: list[dict[str, Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda step, total, metrics: None,
) -> FitReport:
    """Train `module`, a `Trainable`, with AdamW, and write checkpoints.

    `artefact` (JSON-able) is kept in every checkpoint, and has to be equal on resuming; leave `config` out of it, whose
    neutral settings may change; `places` names the entries in it that only say where something is ("stores.path": the
    `path` of every one of `stores`), which may be another then. `settings` (JSON-able) are all that the caller was
    configured with, kept in `run.json` with `config` as their "train", to replay the run from. `param_groups` are
    AdamW's, of the module's own parameters; None: all that require a gradient. `validate(module, step)` returns figures
    of the averaged weights (of the weights, where averaging is off), under no_grad and in evaluation mode; the random
    numbers that it draws do not change the training. `progress(step, total, latest figures)` is called after each step.

    The stream of random numbers begins at `config.seed` here, not before: on a CPU equal modules, batches and settings
    give equal checkpoints. torch's number of threads is the caller's business.

    Raises `UsageError` where `run_dir` exists and neither flag is given, where a resumed run was begun with other
    settings (naming the field), and where `best_metric` is not among the figures; `DataError` where loss or gradient
    is no longer finite (naming the step) or the batches end; `CheckpointError` where a checkpoint does not fit;
    `MachineError` where device, tracker or disk refuse. On Ctrl-C, SIGTERM and the other `SIGNALS` it finishes the
    step, writes a checkpoint and raises `Interrupted`, a `KeyboardInterrupt`; several processes stop after one step.
    """
    run_dir = Path(run_dir)
    kept = json.loads(json.dumps(artefact))
    if not (resume and can_resume(run_dir)):  # a checkpoint holds every tensor
        wrong = first_not_finite(module.state_dict())
        if wrong is not None:
            raise DataError(f"{wrong} is not finite before the first step", expected="finite weights and statistics")
    with accelerated(config, run_dir) as accelerator:
        ready: list[Any] = [None]
        if accelerator.is_main_process:
            warmup = config.warmup
            if resume and config.warmup_steps is None and config.schedule == "constant":
                begun = begun_warmup(run_dir)  # a tenth of the steps that it was begun with, not of these
                warmup = warmup if begun is None else begun
            train = config.model_copy(update={"warmup_steps": warmup}).mathematics()
            decides = {"train": train, "processes": accelerator.num_processes, "artefact": kept}
            named = [f"artefact.{place}" for place in places]
            how: Any = {"resume": resume, "overwrite": overwrite, "places": named}
            how["settings"] = None if settings is None else {**settings, "train": _replayable(config, warmup, validate)}
            ready = [(warmup, *prepare_run(run_dir, decides, **how))]
        warmup, resumed_from, passed_over = broadcast_object_list(ready)[0]
        config = config.model_copy(update={"warmup_steps": warmup})
        state = TrainState(accelerator, module, config, param_groups)
        if resumed_from is not None:
            state.restore(run_dir, resumed_from)
        if config.trackers:
            # Trackers take flat numbers and strings.
            flat = config.model_dump(exclude={"betas", "trackers"}) | {"warmup_steps": config.warmup}
            accelerator.init_trackers("vla", config=flat, init_kwargs={"wandb": {"name": run_dir.name}})
        _Loop(state, run_dir, kept, validate, progress).run(batches)
    return FitReport(run_dir, state.step, state.latest, resumed_from, passed_over)


def _replayable(config: TrainConfig, warmup: int, validate: Validate | None) -> dict[str, Any]:
    """Return the settings that begin this run again: a best metric alone asks for a validation."""
    excluded = {"best_metric"} if validate is None else set()
    return config.model_dump(mode="json", exclude=excluded) | {"warmup_steps": warmup}


class _LossModule(torch.nn.Module):
    """Calls `module.loss` from `forward`, where DistributedDataParallel and autocast hook in."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, divisors: Divisors | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]] = self.module.loss  # type: ignore[assignment]
        return loss(batch) if divisors is None else loss(batch, divisors)


class _Loop:
    def __init__(
        self,
        state: TrainState,
        run_dir: Path,
        artefact: Mapping[str, Any],
        validate: Validate | None,
        progress: Progress,
    ) -> None:
        self.state, self.config, self.accelerator = state, state.config, state.accelerator
        self.run_dir, self.artefact, self.validate, self.progress = run_dir, artefact, validate, progress
        self.forward = self.accelerator.prepare(_LossModule(state.module))

    def run(self, batches: Batches) -> None:
        state, processes = self.state, self.accelerator.num_processes
        if state.step >= self.config.steps:
            return
        first = state.step * self.config.accumulate * processes + self.accelerator.process_index
        feed = Feed(batches(first, processes), self.accelerator.device)
        try:
            with (
                MetricsLog(self.run_dir, state.step, self.accelerator) as metrics_log,
                stopping(self.accelerator) as stop,
            ):
                clock = Clock(feed)
                while state.step < self.config.steps:
                    lr = state.optimizer.param_groups[0]["lr"]
                    state.window.add(*self._step(feed))
                    state.step += 1
                    self._boundary(lr, metrics_log, clock)
                    self.progress(state.step, self.config.steps, state.latest)
                    signal = stop.after_step()
                    if signal:
                        state.save(self.run_dir, self.artefact, {})
                        interrupted = Interrupted(signal)
                        interrupted.add_note(f"step {state.step} is saved in {self.run_dir}; --resume goes on")
                        raise interrupted
        finally:
            feed.close()

    def _step(self, feed: Feed) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Make one optimiser step; return loss, gradient norm and metrics, all still on the device."""
        accumulate, accelerator = self.config.accumulate, self.accelerator
        losses, parts = [], []
        batches, divisors = self._batches(feed)
        for micro, batch in enumerate(batches):
            # Gradients are exchanged between processes once a step.
            with accelerator.no_sync(self.forward) if micro < accumulate - 1 else nullcontext():
                loss, figures = self.forward(batch, divisors)
                accelerator.backward(loss)  # divides by `accumulate`
            losses.append(loss.detach())
            parts.append({name: value.detach() for name, value in figures.items()})
        if isinstance(self.state.module, CountedLoss):
            self.state.module.stepped()  # before the average copies the module's buffers
        norm = self.state.update()
        if accumulate == 1:
            return losses[0], norm, parts[0]
        means = {name: torch.stack([figures[name] for figures in parts]).mean() for name in parts[0]}
        return torch.stack(losses).mean(), norm, means

    def _batches(self, feed: Feed) -> tuple[list[Any], Divisors | None]:
        """Return the micro-batches of one optimiser step, and the divisors of the loss (None: the batch's counts)."""
        accumulate, module = self.config.accumulate, self.state.module
        batches = [feed.next(self.state.step + 1)]
        for _ in range(accumulate - 1):
            # On a CPU a batch lives in the loader's ring, which is refilled once the next batch is asked for.
            if self.accelerator.device.type == "cpu":
                batches[-1] = copy.deepcopy(batches[-1])
            batches.append(feed.next(self.state.step + 1))
        if not isinstance(module, CountedLoss) or accumulate * self.accelerator.num_processes == 1:
            return batches, None
        return batches, step_divisors([module.counts(batch) for batch in batches])

    def _boundary(self, lr: float, metrics_log: MetricsLog, clock: Clock) -> None:
        """Log, validate and save what is due after this step: one line in the log, then the checkpoint."""
        state, config = self.state, self.config
        clock.steps += 1
        last = state.step == config.steps
        due_log = last or state.step % config.log_every == 0
        due_save = last or state.step % config.checkpoint_every == 0
        due_validation = self.validate is not None and (due_save or state.step % config.validate_every == 0)
        if not (due_log or due_save or due_validation):
            return
        state.window.drain(state.step)  # nothing is validated or saved unless every loss so far was finite
        if due_validation or due_save:
            state.require_finite()
        line = state.window.means() | {"lr": lr} | clock.close() if due_log else {}
        if state.step % config.log_every == 0:  # after the last step it stays open: a run may be given more steps
            state.window.begin()
        with clock.paused():
            figures = self._validation() if due_validation else {}
            line |= figures
            if line:
                metrics_log.write(state.step, line)
                state.latest |= line
            if due_save:
                state.save(self.run_dir, self.artefact, figures)

    def _validation(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.accelerator.is_main_process and self.validate is not None:
            model = self.state.averaged.eval()
            with random_aside(self.config.seed), torch.no_grad():
                figures = {name: float(value) for name, value in self.validate(model, self.state.step).items()}
            self.state.module.train()
            wanted = self.config.best_metric
            if wanted not in figures:
                found = f"validation gives no train.best_metric {wanted!r}{nearest(wanted, figures)}"
                raise UsageError(found, expected=f"one of {', '.join(sorted(figures)) or '(nothing)'}")
        self.accelerator.wait_for_everyone()
        return figures
