"""What `hier` can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vla.heads.encoders import EncoderConfig
from vla.heads.model import MAX_LAYERS, HeadConfig
from vla.heads.normalize import Mode
from vla.stores.user_given import WEIGHTS, UserGiven


class HierConfig(HeadConfig):
    """Settings of the hierarchical head.

    `variant`: "light" or "full", see the module. `mode`: "joint" trains L_text + alpha L_action; "high-level" the text
    alone, no action branch exists; "fast" text and FAST action ids as text (`fast`: a folder of `vla fit-fast` or of
    physical-intelligence/fast); "expert" the actions alone, from the subtask that is told, and needs no labels.
    `alpha`: weight of the action loss. `subtask_interval`: environment steps until the subtask is chosen anew.
    `max_subtask`, `max_tokens`: most tokens of a subtask, and of a prompt with its subtask (200 + 64 in pi0.5's code).
    `time`, `sample_steps`: as in `fm`, Euler. `fast_mapping`: JSON of the language model's id for each FAST id, of a
    vocabulary that was extended for a domain transfer; None: behind the text's ids (light), before the last 128 ids
    from the end as in openpi (full).

    Light: `encoder` reads the features (state and task come in the prompt: its `use_state`, `use_task` do not count,
    `state_columns` does); `width`, `layers`, `heads`: sizes of the language model and of the expert each;
    `dropout`: the expert's.

    Full: `weights`: folder or hub id of a pi0.5 or PaliGemma checkpoint, or "random" for tiny networks; its language
    model trains along unless `mode` is "expert". `tokenizer`: folder of tokenizer.json; None: that of `weights`. `seed`
    of random weights.
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
    max_tokens: int = Field(264, ge=8)
    time: Literal["beta", "uniform"] = "beta"
    sample_steps: int = Field(10, ge=1)
    fast: Annotated[str | None, UserGiven()] = None
    fast_mapping: Annotated[str | None, UserGiven()] = None
    encoder: EncoderConfig = EncoderConfig()
    width: int = Field(128, ge=8)
    layers: int = Field(3, ge=1, le=MAX_LAYERS)
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    weights: Annotated[str, WEIGHTS] = "google/paligemma-3b-pt-224"
    tokenizer: Annotated[str | None, WEIGHTS] = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> HierConfig:
        if self.state_norm not in ("quantile", "limits"):
            raise ValueError(f"state_norm {self.state_norm!r}: the bins of the prompt are those of -1..1")
        if (self.mode == "fast") != (self.fast is not None):
            raise ValueError("mode 'fast' and a folder `fast` (vla fit-fast) go together")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} with {self.heads} heads: an even multiple of the heads")
        return self
