"""What all heads share: normalised labels, masked losses, sampled chunks. A head adds its errors and its sampler.

Heads that read whatever features there are through an observation encoder build on encoded.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO, check_batch
from vla.heads.frozen import Frozen
from vla.heads.needs import Need, check_needs
from vla.heads.normalize import ChannelScaler, Mode, Normalizer
from vla.heads.registry import head_name
from vla.stores.errors import DataError, UsageError
from vla.stores.norm_stats import read_norm_stats
from vla.stores.ranges import is_constant
from vla.stores.settings import Settings, nearest
from vla.stores.user_given import UserGiven
from vla.stores.windows import WindowSpec
from vla.training.processes import Divisors, divisor

if TYPE_CHECKING:
    from vla.heads.data import HeadData
    from vla.heads.told import Telling

SMALL_NET = {"steps": 4000, "lr": 2e-3, "weight_decay": 1e-2, "betas": (0.9, 0.999), "warmup_steps": 100}
"""Training settings for nets of about a million parameters on thousands of frames, chosen on push-v3 (on other scenes
than benchmarks/rollout_success.py plays)."""

ACTION_COUNT = "action"
"""What `HeadModel.counts` calls the action's errors."""

MAX_LAYERS = 1000
"""More are a checkpoint made to keep a machine busy: the deepest head of the field has 18 (pi0's action expert)."""


class HeadConfig(Settings):
    """What every head can be told.

    `n_obs`: observed frames, the present one last. `horizon`: actions predicted. `n_action`: actions executed before
    the next decision. `action_norm`: "limits" maps each dimension's range to [-1, 1] (what diffusion with clipping
    needs), "quantile" its 1st to 99th percentile, "zscore" mean and deviation. `state_norm`: the same for the state.
    `norm_stats`: openpi's norm_stats.json, for both instead of the training split; then with "zscore" or "quantile".
    """

    n_obs: int = Field(1, ge=1)
    horizon: int = Field(8, ge=1)
    n_action: int = Field(2, ge=1)
    action_norm: Mode = "limits"
    state_norm: Mode = "zscore"
    norm_stats: Annotated[str | None, UserGiven(training_only=True)] = None

    @property
    def window(self) -> WindowSpec:
        """The window that the head reads."""
        return WindowSpec(n_obs=self.n_obs, horizon=self.horizon, action_offset=self.action_offset)

    @property
    def action_offset(self) -> int:
        """First predicted action relative to the last observed frame."""
        return 0

    @property
    def n_action_max(self) -> int:
        """Most actions that one prediction offers from the present on."""
        return self.horizon + self.action_offset


class HeadModel(nn.Module):
    """Base of the heads: `loss` for training, `act` for a robot. Subclasses define `errors` and `sample`.

    `reads`: the features it reads, and the last how many of the observed frames of each. `columns`: the columns of the
    state it reads. `state`: the normaliser of the state, None where none is read. `frozen`: networks that it runs and
    does not train, by name (frozen.py). `notes`: lines on the training split, for its user (notes.py).
    """

    Config: ClassVar[type[HeadConfig]] = HeadConfig
    train_defaults: ClassVar[dict[str, Any]] = {}
    """What this head is trained with where nothing else is said, over `TrainConfig`'s own defaults."""
    adjustable: ClassVar[frozenset[str]] = frozenset({"n_action", "sampler", "sample_steps"})
    """Settings that a trained head may be given others of (`adjust`)."""

    def __init__(self, config: HeadConfig, io: HeadIO) -> None:
        super().__init__()
        check_needs(head_name(type(self)), self.needs(config), io)
        check_lengths(config)
        self.config, self.io = config, io
        self.notes: tuple[str, ...] = ()
        self.frozen: dict[str, Frozen] = {}
        self.action = Normalizer(io.action_dim)

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """Return what the stores have to hold for a head of this configuration."""
        return ()

    @classmethod
    def defaults(cls, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return `train_defaults` for a head of these settings, as the user gave them."""
        return cls.train_defaults

    @property
    def acts(self) -> bool:
        """Return whether the head makes actions; one that does not is trained and measured by other figures."""
        return True

    @property
    def instructions(self) -> tuple[str, ...]:
        """Return what a policy can be told to do, indexed by `Batch.task`: the data's, then the head's own."""
        return self.io.tasks

    @property
    def plan_interval(self) -> int | None:
        """Return after how many environment steps a policy asks for another `plan`; None where there are no plans."""
        return None

    def plan(self, batch: Batch) -> Tensor | None:
        """Return a decision [B, K] int64 that holds for several chunks of actions, for `Batch.plan`; None: there are
        none. `act` stays a function of its batch alone."""
        return None

    @property
    def reads(self) -> dict[str, int]:
        """Return the features that the head reads and how many of the observed frames of each, the last ones."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[int, ...]:
        """Return which columns of the state the head reads."""
        return ()

    @property
    def state(self) -> Normalizer | None:
        """Return the normaliser of the state; None where the head reads none."""
        return None

    @property
    def meaning(self) -> dict[str, Any]:
        """Return the settings that say what the head's weights and statistics mean where no size does, {name: value}.

        A run that starts from the head's weights has to have the same (start.py). Values are resolved: columns by their
        index.
        """
        modes = {"action_norm": self.config.action_norm, "state_norm": self.config.state_norm}
        return modes if self.state is not None else {"action_norm": self.config.action_norm}

    @property
    def not_exported(self) -> str:
        """Return why `vla export` cannot write this head; empty where it can."""
        return ""

    def telling(self) -> Telling | None:
        """Return how the head makes a prompt of text and state, where it does: it then gives way to `Batch.prompt`."""
        return None

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Return the elementwise training error [B, H, A] for normalised actions [B, H, A]."""
        raise NotImplementedError

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Return normalised actions [B, H, A]."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many elements each sum of `loss` counts: "action", the valid steps in real dimensions.

        Raises `DataError` without actions.
        """
        if batch.action is None:
            raise DataError("the batch has no action", expected=f"[B, {self.config.horizon}, {self.io.action_dim}]")
        return {ACTION_COUNT: _counted(batch.action, batch).sum()}

    def loss(self, batch: Batch, divisors: Divisors | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean error over valid steps and valid dimensions, and metrics to log.

        `divisors`: of a whole optimiser step, by the names of `counts`; None: the batch's own counts.

        Padded steps and dimensions contribute neither to the loss nor to any gradient of it. What the batch holds
        there does not matter either: the nets see the nearest valid step and 0. Raises `DataError` without actions.
        """
        self.check(batch)
        action = self.labels(batch)
        return masked_mean(self.errors(batch, action), batch, divisors)

    def stepped(self) -> None:
        """Advance what follows the count of optimiser steps; the training loop calls this after each."""

    def labels(self, batch: Batch) -> Tensor:
        """Return the normalised actions [B, H, A] of a batch, edges repeated, 0 in padded dimensions."""
        if batch.action is None:
            raise DataError("the batch has no action", expected=f"[B, {self.config.horizon}, {self.io.action_dim}]")
        action, valid = batch.action, batch.action_valid
        return real_dims(batch, self.action(action if valid is None else repeat_edges(action, valid)))

    @torch.inference_mode()
    def act(self, batch: Batch, generator: torch.Generator | None = None, *, whole: bool = False) -> Tensor:
        """Return the actions from the present on, [B, n_action_max, A] in the data's units, 0 in padded dimensions.

        `whole`: the whole predicted horizon [B, H, A] instead. `generator` (on the model's device) seeds the sampler.
        Dropout and noise are off whatever mode the module is in.
        """
        self.check(batch)
        training = self.training
        try:
            if training:
                self.eval()
            return self.decide(batch, generator, whole=whole)
        finally:
            if training:
                self.train()

    def decide(self, batch: Batch, generator: torch.Generator | None, *, whole: bool = False) -> Tensor:
        """Return what `act` does, in the mode that the module is in and unchecked: what export.py records."""
        chunk = real_dims(batch, self.action.inverse(self.sample(batch, generator)))
        return chunk if whole else chunk[:, -self.config.action_offset :]

    def check(self, batch: Batch) -> None:
        """Raise `DataError` where a batch does not have the shapes that the head was built for."""
        check_batch(batch, self.io, self.config.window, self.reads, state=bool(self.columns))

    def adjust(self, values: Mapping[str, Any]) -> None:
        """Change settings of a trained head for an evaluation or a rollout.

        Raises `UsageError` for those that training has decided, and for values that no configuration could have.
        """
        may_change = self.adjustable & type(self.config).model_fields.keys()
        for name in values:
            if name not in may_change:
                known = ", ".join(sorted(may_change))
                fields = type(self.config).model_fields
                what = "is decided in training" if name in fields else f"is no setting{nearest(name, fields)}"
                raise UsageError(f"model.{name} {what}", expected=f"one of {known}")
        config = type(self.config).build({**self.config.model_dump(), **values}, where="model")
        check_lengths(config)
        self.config = config

    def measure(self, batch: Batch, chunk: Tensor) -> dict[str, Tensor]:
        """Return what else validation should report, from the chunk [B, n_action_max, A] that `act` gave: name -> [n].

        The numbers of all batches are put behind each other, and `summarise` makes figures of them.
        """
        return {}

    def summarise(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return figures of all that `measure` gave: the mean of each."""
        return {name: float(values.double().mean()) for name, values in measured.items() if len(values)}

    def param_groups(self, lr: float) -> list[dict[str, Any]] | None:
        """Return AdamW's parameter groups where some train at another rate than `lr`; None for one group of all."""
        return None

    def parameter_counts(self) -> dict[str, tuple[int, int]]:
        """Return {part: (parameters, those of them that train)}, frozen networks among them."""
        parts = dict(self.named_children()) | {name: frozen.module for name, frozen in self.frozen.items()}
        counts = {}
        for name, part in parts.items():
            sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
            if sizes:
                counts[name] = (sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains))
        return counts

    def prepare(self, data: HeadData) -> None:
        """Fit on the training split everything that is not trained. Called once, before the first step of a run."""
        self.fit_normalisers(
            data.actions(data.training), data.states(data.training), dims=data.action_dims(data.training)
        )

    def check_reach(self, data: HeadData) -> None:
        """Raise `UsageError` where the head, its statistics in place, could not make the actions of the training split.

        Called once, before the first step of a run. A dimension that the statistics of another run or of a file hold
        constant comes back as that constant: it has to be the same here.
        """
        actions, dims = data.actions(data.training), data.action_dims(data.training)
        constant, held = self.action.constant.cpu().numpy(), self.action.centre.cpu().numpy()
        apart = constant & ~is_constant(np.minimum(actions, held), np.maximum(actions, held))
        moves = np.any(apart if dims is None else apart & dims, axis=0)
        if moves.any():
            names = ", ".join(dimension_names(self.io.action_names, moves))
            raise UsageError(
                f"the statistics hold {names} of the action constant, and the training episodes move there",
                expected="statistics of these demonstrations",
                fix="no --from and no model.norm_stats",
            )

    def constants(self) -> dict[str, tuple[str, ...]]:
        """Return what the statistics hold constant: {"action" or "state": names of the dimensions}, {} for nothing.

        Channels of features are counted: {feature encoder: ("3 of 1280 channels",)}.
        """
        found = {"action": dimension_names(self.io.action_names, self.action.constant.cpu().numpy())}
        if self.state is not None:
            read = np.isin(np.arange(self.io.state_dim), self.columns)
            found["state"] = dimension_names(self.io.state_names, self.state.constant.cpu().numpy() & read)
        for name, module in self.named_modules():
            if isinstance(module, ChannelScaler):
                still = int((module.inv_std == 0).sum())
                found[name] = (f"{still} of {len(module.inv_std)} channels",) if still else ()
        return {name: dims for name, dims in found.items() if dims}

    def fit_normalisers(
        self, actions: NDArray[Any], states: NDArray[Any], *, dims: NDArray[np.bool_] | None = None
    ) -> None:
        """Fit on the training split: actions [N, A], states [N, S]. Raises `DataError` where they are not finite.

        `dims` bool [N, A] marks the dimensions that are real. With `config.norm_stats` the statistics come from that
        file, which has to have as many components.
        """
        if self.config.norm_stats is not None:
            wanted = {"actions": (self.action, self.config.action_norm)}
            if self.state is not None:
                wanted["state"] = (self.state, self.config.state_norm)
            fit_from_file(Path(self.config.norm_stats), wanted)
            return
        self.action.fit(actions, self.config.action_norm, valid=dims)
        if self.state is not None:
            self.state.fit(states, self.config.state_norm)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Take frozen networks along to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for frozen in self.frozen.values():
            frozen.to(self.action.centre.device)
        return self


def dimension_names(names: Sequence[str], chosen: NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the names of the chosen dimensions [D], or their numbers where dimensions have no names."""
    return tuple(names[place] if names else str(place) for place in np.flatnonzero(chosen).tolist())


def fit_from_file(path: Path, wanted: Mapping[str, tuple[Normalizer, Mode]]) -> None:
    """Fit normalisers {"actions" or "state": (normaliser, mode)} from a norm_stats.json.

    Raises `DataError` where the file lacks one of them, and what `Normalizer.fit_from` raises.
    """
    stats = read_norm_stats(path)
    for name, (normaliser, mode) in wanted.items():
        if name not in stats:
            raise DataError(f"{path} has no {name!r}, only {', '.join(stats)}", expected="state and actions")
        normaliser.fit_from(stats[name], mode, f"{path}, {name},")


def check_lengths(config: HeadConfig) -> None:
    """Raise `UsageError` where more actions would be executed than are predicted, or none lies ahead."""
    if config.n_action_max < 1:
        raise UsageError(
            f"a horizon of {config.horizon} that begins with the first of {config.n_obs} observed frames",
            expected=f"at least {1 - config.action_offset}, so that an action is left from the present on",
            fix=f"--set model.n_obs=1, or --set model.horizon=N, N at least {1 - config.action_offset}",
        )
    if config.n_action > config.n_action_max:
        found = f"n_action {config.n_action} of horizon {config.horizon}"
        fix = f"--set model.n_action={config.n_action_max}"
        raise UsageError(found, expected=f"at most {config.n_action_max}", fix=fix)


def masked_mean(errors: Tensor, batch: Batch, divisors: Divisors | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of errors [B, H, A] over valid steps and real dimensions, and the share of them."""
    counted = _counted(errors, batch)
    total = torch.where(counted, errors, 0.0).sum()
    return total / divisor(divisors, ACTION_COUNT, counted.sum()), {"mask_share": counted.float().mean()}


def masked_elements(errors: Tensor, batch: Batch) -> Tensor:
    """Return the errors [n] of [B, H, A] at valid steps in real dimensions, in order: their mean counts each alike."""
    return errors[_counted(errors, batch)]


def _counted(errors: Tensor, batch: Batch) -> Tensor:
    counted = torch.ones_like(errors, dtype=torch.bool)
    if batch.action_valid is not None:
        counted &= batch.action_valid[..., None]
    if batch.action_dims is not None:
        counted &= batch.action_dims[:, None]
    return counted


def real_dims(batch: Batch, x: Tensor) -> Tensor:
    """Return x [B, H, A] with 0 in the dimensions that a task pads, in training as in every step of a sampler."""
    return x if batch.action_dims is None else torch.where(batch.action_dims[:, None], x, 0.0)


def repeat_edges(action: Tensor, valid: Tensor) -> Tensor:
    """Replace padded steps of [B, H, A] by the last valid step before them, or the first valid one; valid bool [B, H].

    Convolutions and attention mix steps: what stands in padded ones has to be the same whoever made the batch. A window
    without any valid step is 0: NaN would come through the mask of the loss into every gradient, as 0 times NaN.
    """
    step = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    latest = torch.where(valid, step, -1).cummax(dim=1).values
    first = valid.to(torch.uint8).argmax(dim=1, keepdim=True)
    source = torch.where(latest >= 0, latest, first)
    repeated = action.gather(1, source[..., None].expand_as(action))
    return torch.where(valid.any(dim=1)[:, None, None], repeated, 0.0)


class GivenNoise(torch.Generator):
    """A generator for `noise_like` that gives noise drawn elsewhere, in order; without any it draws, and keeps it."""

    def __new__(cls, noise: Sequence[Tensor] | None = None) -> Self:
        """Make a generator; `noise` is not its seed."""
        return super().__new__(cls)

    def __init__(self, noise: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.noise: list[Tensor] = [] if noise is None else list(noise)
        self._waiting = None if noise is None else list(noise)

    def take(self, shape: tuple[int, ...], reference: Tensor) -> Tensor:
        """Return the next noise, of that shape."""
        if self._waiting is not None:
            return self._waiting.pop(0)
        self.noise.append(torch.randn(shape, device=reference.device))
        return self.noise[-1]


def noise_like(shape: tuple[int, ...], reference: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise on the device of `reference`."""
    if isinstance(generator, GivenNoise):
        return generator.take(shape, reference)
    return torch.randn(shape, device=reference.device, generator=generator)
