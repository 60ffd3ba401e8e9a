"""How a head is trained: everything the one loop can be told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from vla.stores.settings import Settings

WARMUP_STEPS = 500
"""Diffusion Policy's (Chi et al. 2023, `lr_warmup_steps` of its image workspaces)."""

NEUTRAL = {
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "best_metric",
    "trackers",
    "device",
    "threads",
}
"""Settings that a resumed run may change: none of them is part of the mathematics. (Another device, or another number
of threads, rounds differently: the run then goes on, but not bit for bit.)"""


class TrainConfig(Settings):
    """Settings of the loop. Defaults are Diffusion Policy's, but for `steps`.

    `steps`: optimiser steps; each takes `accumulate` batches of `batch_size` windows in every process.
    `lr`, `betas`, `eps`, `weight_decay`: AdamW's learning rate after the warm-up, and its other numbers.
    `schedule`: "cosine" falls to zero at `steps`, so that a resumed run cannot raise `steps`; "constant" can.
    `warmup_steps`: linear warm-up from zero; None: 500, or a tenth of `steps` where that is less; a resumed constant
    run keeps what it was begun with.
    `grad_clip`: largest norm of the gradient of all trained weights together.
    `precision`: autocast of the forward pass; the weights stay float32.
    `ema`: keep an exponential moving average of the weights, used for validation and saved beside them, with decay
    min(ema_max, 1 - (1 + k)^-ema_power) at update k = 0, 1, …
    `ema_power`, `ema_max`: of that decay.
    `seed`: of the first weights, the order of the batches and the noise.
    `log_every`, `checkpoint_every`: steps between lines of the log, and between regular checkpoints.
    `validate_every`: steps between validations; every regular checkpoint is validated as well.
    `keep_checkpoints`: newest ones kept, besides the one whose `best_metric` is lowest.
    `best_metric`: the figure of the validation by which the best checkpoint is told.
    `device`: "auto" takes a GPU where there is one; else cpu, cuda, cuda:N, mps, as torch calls it.
    `threads`: torch's threads on a CPU, which the caller of the loop sets (0: as they are); small heads are fastest
    with one.
    `trackers`: names accelerate knows, such as "tensorboard" or "wandb".
    """

    steps: int = Field(2000, ge=1)
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.95, 0.999)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(1e-6, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: bool = True
    ema_power: float = Field(0.75, gt=0, allow_inf_nan=False)
    ema_max: float = Field(0.9999, ge=0, lt=1)
    seed: int = Field(42, ge=0)
    log_every: int = Field(50, ge=1)
    validate_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    best_metric: str = "action_mae"
    device: str = "auto"
    threads: int = Field(1, ge=0)
    trackers: tuple[str, ...] = ()

    @field_validator("warmup_steps")
    @classmethod
    def _warms_up_before_the_end(cls, value: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps")
        if value is not None and steps is not None and value >= steps:
            raise ValueError(f"the learning rate would never be reached in {steps} steps")
        return value

    @property
    def warmup(self) -> int:
        """Steps of warm-up, with the default resolved."""
        return min(WARMUP_STEPS, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def mathematics(self) -> dict[str, Any]:
        """Return, JSON-able, the settings that decide the weights after a given step: a resumed run must have them."""
        fields = self.model_dump(mode="json", exclude=NEUTRAL) | {"warmup_steps": self.warmup}
        if self.schedule == "constant":  # its learning rate at a step does not depend on how many will follow
            del fields["steps"]
        return fields
