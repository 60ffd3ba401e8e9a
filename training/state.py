"""What training changes and a checkpoint holds: weights, their average, optimiser, schedule, random generators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import get_scheduler

from vla.pretrained.weights import first_not_finite
from vla.stores.errors import CheckpointError, DataError
from vla.training.checkpoint import load_weights, read_state, read_tensors, save_checkpoint
from vla.training.config import TrainConfig
from vla.training.ema import WarmAverage
from vla.training.metrics import TIMING, Window
from vla.training.optimizer_state import dump_optimizer, load_optimizer, parameter_names
from vla.training.run_folder import Best, prune, write_best
from vla.training.seeding import random_state, restore_random_state, seed_everything

_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")
"""What changes in a torch LambdaLR. The rest of its state is the settings', and is not read from a file."""


class TrainState:
    """The state of one run, on the accelerator's device. `step` counts finished optimiser steps.

    `latest` holds the last figures of each name, `best` the checkpoint with the lowest validation metric.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        config: TrainConfig,
        param_groups: list[dict[str, Any]] | None,
    ) -> None:
        self.accelerator, self.module, self.config = accelerator, module, config
        module.to(accelerator.device).train()
        self.optimizer = torch.optim.AdamW(
            param_groups or [{"params": [p for p in module.parameters() if p.requires_grad]}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            # One kernel for all tensors: 7.6 ms instead of 15.5 a step for 60 layers of width 64 on a CPU.
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.names = parameter_names(module, self.optimizer)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.schedule = get_scheduler(
            "cosine" if config.schedule == "cosine" else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        self.ema = WarmAverage(module, config.ema_power, config.ema_max) if config.ema else None
        self.step = 0
        self.best: Best | None = None
        self.latest: dict[str, float] = {}
        self.window = Window(self._mean_over_processes, scaled=accelerator.scaler is not None)
        self._saved = self._finite = -1  # the step of the last checkpoint, and of the last `require_finite`
        seed_everything(config.seed, 1 + accelerator.process_index)

    def update(self) -> torch.Tensor:
        """Clip, step, advance the schedule, average, forget the gradient; return its norm before clipping."""
        scaler = self.accelerator.scaler
        if scaler is None:
            norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
            self.optimizer.step()
            self.schedule.step()
        else:
            scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
            scale = scaler.get_scale()
            scaler.step(self.optimizer)  # skipped where a gradient overflowed; update then lowers the scale
            scaler.update()
            if scaler.get_scale() >= scale:
                self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.module)
        return norm

    @property
    def averaged(self) -> torch.nn.Module:
        """The model to validate: of averaged weights, or the trained one where averaging is off."""
        return self.ema.averaged if self.ema is not None else self.module

    def require_finite(self) -> None:
        """Raise `DataError` naming the first tensor of the model, its average or the optimiser that is not finite.

        Losses and gradients do not show what the newest update did to the weights: no batch has passed them yet.
        """
        if self._finite == self.step:
            return
        tensors = {f"the model's {name}": values for name, values in self.module.state_dict().items()}
        if self.ema is not None:
            average = self.ema.averaged.state_dict()
            tensors |= {f"the averaged model's {name}": values for name, values in average.items()}
        for name, parameter in zip(self.names, self.trained, strict=True):
            for slot, values in self.optimizer.state.get(parameter, {}).items():
                if slot != "step":  # a count
                    tensors[f"the optimiser's {name}.{slot}"] = values
        wrong = first_not_finite(tensors)
        if wrong is not None:
            raise DataError(
                f"{wrong} is not finite after step {self.step}",
                expected="finite numbers; the step is not saved",
                fix="a smaller train.lr, then --resume from the last checkpoint or --overwrite",
            )
        self._finite = self.step

    def save(self, run_dir: Path, artefact: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Write the checkpoint of this step, unless it is there; keep the newest ones and the best.

        `figures` are this step's validation. Raises `DataError` where a loss or anything to be saved is not finite.
        """
        if self._saved == self.step:
            return
        self.window.drain(self.step)
        self.require_finite()
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            metric = self.config.best_metric
            value = figures.get(metric)
            finite = value is not None and math.isfinite(value)
            if value is not None and finite and (self.best is None or value < self.best.value):
                self.best = Best(checkpoint=f"step-{self.step:08d}", metric=metric, value=value)
            models = {"model": self.module} | ({"ema": self.ema.averaged} if self.ema is not None else {})
            tensors, rest = dump_optimizer(self.optimizer, self.names)
            state = self._json_state() | {"optimizer": rest, "random": random_states}
            save_checkpoint(run_dir, self.step, models, tensors, state, artefact)
            write_best(run_dir, self.best)
            prune(run_dir, self.config.keep_checkpoints, self.step, self.best)
        self._saved = self.step
        self.accelerator.wait_for_everyone()

    def restore(self, run_dir: Path, folder: Path) -> None:
        """Go back to a verified checkpoint. Raises `CheckpointError` where it does not fit the module."""
        state = read_state(folder)
        load_weights(self.module, folder / "model.safetensors")
        if self.ema is not None:
            load_weights(self.ema.averaged, folder / "ema.safetensors")
        tensors = read_tensors(folder / "optimizer.safetensors")
        try:
            load_optimizer(self.optimizer, self.names, tensors, state["optimizer"])
            self._restore_json(state)
        except CheckpointError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            found = f"{folder / 'state.json'} cannot be restored ({reason})"
            raise CheckpointError(found, fix="--overwrite to start again") from None
        # The best one may have been found after this checkpoint, or by another metric.
        best = self.best
        if best is not None and (
            best.metric != self.config.best_metric or not (run_dir / "checkpoints" / best.checkpoint).is_dir()
        ):
            self.best = None
        self.require_finite()
        if self.accelerator.is_main_process:
            write_best(run_dir, self.best)

    def _json_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        schedule = self.schedule.state_dict()
        return {
            "config": self.config.model_dump(mode="json"),
            "metrics": {name: value for name, value in self.latest.items() if name not in TIMING},
            "window": self.window.state(),
            "schedule": {key: schedule[key] for key in _SCHEDULE},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_updates": self.ema.updates if self.ema is not None else None,
            "best": self.best.model_dump() if self.best is not None else None,
        }

    def _restore_json(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(self.schedule.state_dict() | {key: state["schedule"][key] for key in _SCHEDULE})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.resume(int(state["ema_updates"]))
        self.window.restore(state["window"])
        self.latest = dict(state["metrics"])
        self.best = None if state["best"] is None else Best(**state["best"])
        restore_random_state(state["random"][self.accelerator.process_index])
        self.step = self._saved = int(state["step"])

    def _mean_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self.accelerator.reduce(values, "mean")
        return mean
