"""How a head is trained: everything the one loop can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vla.stores.settings import Settings


class TrainConfig(Settings):
    """Settings of the loop. Defaults are Diffusion Policy's, but for `steps`.

    `steps`: optimiser steps; each takes `accumulate` batches of `batch_size` windows (per process).
    `schedule`: "cosine" to zero after `warmup_steps` of linear warm-up, or "constant" after it.
    `ema`: keep an exponential moving average of the weights, used for validation and saved beside them, with decay
    min(ema_max, 1 - (1 + step)^-ema_power).
    `precision`: autocast of the forward pass. `threads`: OpenMP threads on a CPU (0: torch's choice); small heads are
    fastest with one. `best_metric`: validation metric whose lowest checkpoint is kept beside the newest ones.
    """

    steps: int = Field(2000, ge=1)
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.95, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-6, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(500, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: bool = True
    ema_power: float = Field(0.75, gt=0)
    ema_max: float = Field(0.9999, ge=0, lt=1)
    seed: int = Field(42, ge=0)
    log_every: int = Field(50, ge=1)
    validate_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    best_metric: str = "action_mae"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=0)
    trackers: tuple[str, ...] = ()


NEUTRAL = {"log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "trackers", "best_metric"}
"""Settings that a resumed run may change: none of them changes a weight."""
