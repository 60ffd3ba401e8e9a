"""Settings of `pi0`, and whether they fit the stores and the checkpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from vla.heads.batch import HeadIO
from vla.heads.flow import Sampler, TimeDistribution
from vla.heads.model import HeadConfig
from vla.heads.normalize import Mode
from vla.pretrained.pi0 import Pi0Sizes
from vla.stores.errors import UsageError
from vla.stores.user_given import WEIGHTS, PlainText

IMAGES, RAYS, RAY_CHANNELS = "siglip", "ray", 6
"""The features read, and the channels of DA3's ray map: origin and direction."""


class Pi0Config(HeadConfig):
    """Settings of `pi0`, beside those of every head.

    `weights`: the folder or hub id of a pi0 or PaliGemma checkpoint (a PaliGemma gets a fresh expert), or "random" for
    tiny networks. `tokenizer`: the folder with PaliGemma's tokenizer.json; None: `weights`. `max_tokens`: the longest
    prompt; a longer one is refused. `seed`: of a random language model. `freeze_language_model`: false trains it too,
    and puts it into every checkpoint. `freeze_vision_tower`: has to stay true. `expert_width`, `expert_mlp`: of a
    fresh expert (pi0's own sizes). `time`, `sampler`, `sample_steps`: as of `fm` (flow.py).

    `use_geom_prefix`: add geometry tokens from DA3's `ray` to the prefix; can be switched off for a trained head as
    well. `geom_model_id`: the model that the store's rays have to come from. `geom_target_hw`: rows and columns that
    they are resized to. `geom_views`: which cameras of the store, by position; None: all. `geom_init_alpha`: the scale
    that geometry tokens begin with; `geom_alpha_warmup`: optimiser steps of its ramp from 0.
    `geom_modality_embedding`: add a learnt vector to geometry tokens. `freeze_geom_model`: has to stay true.
    """

    horizon: int = Field(50, ge=1)
    n_action: int = Field(25, ge=1)
    action_norm: Mode = "zscore"
    state_norm: Mode = "zscore"
    weights: Annotated[str, WEIGHTS] = "lerobot/pi0_base"
    tokenizer: Annotated[str | None, WEIGHTS] = None
    max_tokens: int = Field(48, ge=2)
    seed: int = Field(0, ge=0)
    freeze_language_model: bool = True
    freeze_vision_tower: bool = True
    expert_width: int = Field(1024, ge=2, multiple_of=2)
    expert_mlp: int = Field(4096, ge=1)
    time: TimeDistribution = "beta"
    sampler: Sampler = "euler"
    sample_steps: int = Field(10, ge=1)
    use_geom_prefix: bool = False
    geom_model_id: Annotated[str, PlainText()] = "depth-anything/DA3-LARGE"
    geom_target_hw: tuple[int, int] = (14, 14)
    geom_views: tuple[int, ...] | None = None
    geom_init_alpha: float = 0.1
    geom_alpha_warmup: int = Field(0, ge=0)
    geom_modality_embedding: bool = False
    freeze_geom_model: bool = True

    @field_validator("freeze_vision_tower", "freeze_geom_model")
    @classmethod
    def _is_frozen_in_the_cache(cls, value: bool) -> bool:
        if not value:
            raise ValueError("the store holds what that network made: without its pictures nothing can train it")
        return value

    @field_validator("geom_target_hw")
    @classmethod
    def _has_cells(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("rows and columns")
        return value


def check_fit(kind: str, config: Pi0Config, sizes: Pi0Sizes, io: HeadIO, state_dim: int) -> None:
    """Raise `UsageError` where stores and checkpoint do not fit a head `kind` that reads `state_dim` of the state."""
    check_kind(kind, config.weights, sizes)
    width, images = sizes.language.hidden_size, io.features[IMAGES].channels
    if images != width:
        found = f"{IMAGES!r} is {images} wide, the language model of {config.weights} {width}"
        fix = "vla featurize --backbone siglip-prefix with the same --weights"
        raise UsageError(found, expected="image tokens of the same checkpoint", fix=fix)
    if not io.tasks:
        raise UsageError("the demonstrations have no instruction", expected="at least one")
    for name, dim, limit in (("action", io.action_dim, sizes.max_action), ("state", state_dim, sizes.max_state)):
        if dim > limit:
            raise UsageError(f"{name}s of {dim} dimensions", expected=f"at most {limit}, as {config.weights}")
    if config.use_geom_prefix:
        check_rays(config, io)


def check_kind(kind: str, weights: str, sizes: Pi0Sizes) -> None:
    """Raise `UsageError` where a checkpoint's expert is the other head's."""
    if sizes.adaptive is not None and sizes.adaptive != (kind == "pi05"):
        other = "pi05" if sizes.adaptive else "pi0"
        raise UsageError(
            f"{weights} holds an expert of {other}", expected=f"one of {kind}", fix=f"vla train-head {other}"
        )


def check_rays(config: Pi0Config, io: HeadIO) -> None:
    """Raise `UsageError` where `ray` is no map of rays, or lacks a camera that is asked for."""
    rays = io.features[RAYS]
    if rays.channels != RAY_CHANNELS:
        found = f"{RAYS!r} is {list(rays.shape)} with the axes view, {', '.join(rays.dims)}"
        raise UsageError(found, expected=f"[views, y, x, {RAY_CHANNELS}], channels last")
    wrong = [view for view in config.geom_views or () if not 0 <= view < rays.views]
    if wrong or config.geom_views == ():
        found = f"geom_views {list(config.geom_views or ())} of {rays.views} cameras"
        raise UsageError(found, expected=f"positions 0 to {rays.views - 1}; `vla inspect` lists them in order")
