"""`hier`: pi0.5's hierarchy. A language model says what to do next, an expert does it.

What is seen and the high-level prompt -> the subtask, as text (cross-entropy with teacher forcing). What is seen and the
low-level prompt, which holds the subtask -> a chunk of actions (flow matching in pi0's convention, fm.py). The loss is
L_text + alpha L_action, and the gradient of L_action reaches no parameter of the language model.

Two variants with the same losses: "light", small networks from scratch over any cached features (hier_light.py); and
"full", PaliGemma's language model over cached SigLIP tokens with pi0.5's expert (hier_full.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.encoders import EncoderConfig
from vla.heads.fast import FastTokenizer, read_mapping
from vla.heads.fm import integrate
from vla.heads.model import MAX_LAYERS, SMALL_NET, HeadConfig, HeadModel, masked_mean, noise_like, real_dims
from vla.heads.needs import Need
from vla.heads.nets.speech import Prompt, TokenErrors, say, teach
from vla.heads.normalize import Mode, Normalizer
from vla.heads.prompts import action_prompt, clean, discretise, subtask_prompt, tokenise
from vla.stores.errors import DataError, UsageError

if TYPE_CHECKING:
    from vla.heads.data import HeadData

LABELS = ("high_level_task", "subtask")
"""What a source of tasks that have parts says of an episode (featurize/sources/hierarchical.py)."""
FULL = {"steps": 30_000, "lr": 2.5e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "warmup_steps": 1000}
"""The optimiser of LeRobot's pi05 (configuration_pi05.py), its schedule but for the floor."""


class HierConfig(HeadConfig):
    """Settings of the hierarchical head.

    `variant`: "light" or "full", see the module. `mode`: "joint" trains L_text + alpha L_action; "high-level" the text
    alone, no action branch exists; "fast" text and FAST action ids as text (`fast`: a folder of `vla fit-fast` or of
    physical-intelligence/fast); "expert" the actions alone, from the subtask that is told, and needs no labels.
    `alpha`: weight of the action loss. `subtask_interval`: environment steps until the subtask is chosen anew.
    `max_subtask`, `max_prompt`: most tokens of a subtask, and of a prompt with its answer (a FAST answer comes on top).
    `time`, `sample_steps`: as in `fm`, Euler. `fast_mapping`: JSON of the language model's id for each FAST id, of a
    vocabulary that was extended for a domain transfer; None: behind the text's ids (light), before the last 128 ids
    from the end as in openpi (full).

    Light: `encoder` reads the features (state and task come in the prompt: its `use_state`, `use_task` do not count,
    `state_columns` does); `width`, `layers`, `heads`: sizes of the language model and of the expert each.
    """

    horizon: int = Field(50, ge=1)
    n_action: int = Field(25, ge=1)
    action_norm: Mode = "quantile"
    state_norm: Mode = "quantile"
    variant: Literal["light", "full"] = "light"
    mode: Literal["joint", "high-level", "fast", "expert"] = "joint"
    alpha: float = Field(10.0, gt=0, allow_inf_nan=False)
    subtask_interval: int = Field(50, ge=1)
    max_subtask: int = Field(64, ge=1)
    max_prompt: int = Field(264, ge=8)
    time: Literal["beta", "uniform"] = "beta"
    sample_steps: int = Field(10, ge=1)
    fast: str | None = None
    fast_mapping: str | None = None
    encoder: EncoderConfig = EncoderConfig(dim=128, queries=16)
    width: int = Field(128, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> HierConfig:
        if self.state_norm not in ("quantile", "limits"):
            raise ValueError(f"state_norm {self.state_norm!r}: the bins of the prompt are those of -1..1")
        if (self.mode == "fast") != (self.fast is not None):
            raise ValueError("mode 'fast' and a folder `fast` (vla fit-fast) go together")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} with {self.heads} heads: an even multiple of the heads")
        return self


@dataclass(frozen=True)
class HierOutput:
    """One training pass, element by element. What a mode does not train is None.

    `total`: the scalar loss. `text`, `fast`: errors of the subtask's tokens and of the FAST ids. `action` [B, H, A]:
    squared errors of the velocity, counted where `action_valid` and `action_dims` of the batch say so.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    text: TokenErrors | None = None
    fast: TokenErrors | None = None
    action: Tensor | None = None


class HierHead(HeadModel):
    """See the module. `language`: what reads and speaks, None in mode "expert" of the light variant; `net`: velocity
    [B, H, A], None where no actions are trained."""

    Config: ClassVar[type[HeadConfig]] = HierConfig
    config: HierConfig

    def __init__(self, config: HierConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        self.speaks, self.moves = config.mode != "expert", config.mode in ("joint", "expert")
        lacking = [name for name in LABELS if not io.labels or any(name not in label for label in io.labels)]
        if self.speaks and lacking:
            raise UsageError(
                f"mode {config.mode!r} needs labels, and the episodes have no {lacking[0]}",
                expected="a store of --source hierarchical runs",
                fix="--set model.mode=expert to train the actions alone",
            )
        self._columns = io.state_columns(config.encoder.state_columns)
        self.proprio = Normalizer(io.state_dim) if self._columns else None
        self._texts(io)
        self.fast = self._load_fast() if config.mode == "fast" else None
        self._build()

    def _texts(self, io: HeadIO) -> None:
        """Collect what is told: for each instruction that `Batch.task` may name, its task and its subtask."""
        highs = {label["subtask"]: label["high_level_task"] for label in reversed(io.labels) if label.keys() >= {*LABELS}}
        tasks = io.tasks or ("",)
        further = tuple(dict.fromkeys(high for high in highs.values() if high not in tasks)) if self.speaks else ()
        self._instructions = tasks + further
        self._high = [highs.get(task, task) for task in tasks] + list(further)

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """See `HeadModel.needs`."""
        return (Need("siglip", "siglip-prefix"),) if config.variant == "full" else ()

    @classmethod
    def defaults(cls, model: Mapping[str, Any]) -> dict[str, Any]:
        """See `HeadModel.defaults`. Without an action branch the best checkpoint is the one that speaks best."""
        best = {"best_metric": "subtask_perplexity"} if model.get("mode") == "high-level" else {}
        return {**(FULL if model.get("variant") == "full" else {**SMALL_NET, "lr": 1e-3}), **best}

    @property
    def acts(self) -> bool:
        """See `HeadModel.acts`."""
        return self.config.mode != "high-level"

    @property
    def instructions(self) -> tuple[str, ...]:
        """See `HeadModel.instructions`: the data's own, behind them the high-level tasks."""
        return self._instructions

    @property
    def plan_interval(self) -> int | None:
        """See `HeadModel.plan_interval`."""
        return self.config.subtask_interval if self.speaks else None

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return self._columns

    @property
    def state(self) -> Normalizer | None:
        """See `HeadModel.state`."""
        return self.proprio
