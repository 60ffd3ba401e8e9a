"""What passes between a store and a head: one batch of windows, and the description of what the store offers.

Letters: B batch, N observed frames (`n_obs`), V views, C channels (last axis), S state dim, H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import model_validator
from torch import Tensor

from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings, nearest
from vla.stores.windows import WindowSpec


class FeatureIO(Settings):
    """One feature as the store holds it: `shape` is [V, *axes], `dims` names the axes after V, the channel last."""

    shape: tuple[int, ...]
    """Views first, e.g. (2, 14, 14, 112) for a grid, (2, 64, 1536) for tokens, (1, 1280) for one vector."""
    dims: tuple[str, ...]
    """("y", "x", "channel"), ("token", "channel") or ("channel",)."""
    masked: bool = False
    """Whether a store says which tokens are real: `Batch.feature_valid` then has this feature."""

    @model_validator(mode="after")
    def _agree(self) -> FeatureIO:
        if len(self.shape) != len(self.dims) + 1 or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} does not fit a view axis followed by {self.dims}")
        return self

    @property
    def views(self) -> int:
        """V."""
        return self.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        """Axes between view and channel: (y, x) of a grid, (P,) of tokens, () of a vector."""
        return self.shape[1:-1]

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[-1]


class TextIO(Settings):
    """What a text store holds of each instruction: token ids and mask [length], and embeddings [length, width].

    `width` is 0 where there are ids alone. `side` is where the padding is.
    """

    length: int
    width: int = 0
    side: str = "left"


class HeadIO(Settings):
    """All that a head knows about its data set. Saved in the checkpoint; a live policy must offer the same."""

    action_dim: int
    action_names: tuple[str, ...] = ()
    state_dim: int = 0
    state_names: tuple[str, ...] = ()
    features: dict[str, FeatureIO] = {}
    tasks: tuple[str, ...] = ()
    """Distinct instructions; `Batch.task` indexes them."""
    labels: tuple[dict[str, str], ...] = ()
    """What else sources say of episodes, by name, such as high_level_task and subtask; `Batch.label` indexes them."""
    text: TextIO | None = None
    """The text store beside the features, where there is one."""
    task_dims: tuple[tuple[bool, ...], ...] = ()
    """Which action dimensions each of `tasks` has, [A] each, or () where that is not one answer; () where all have all:
    tasks of different dimensions in one store (`pad_actions` of `vla featurize`)."""
    chunk: int | None = None
    """Steps of the label that every row holds as a whole, such as 8 waypoints; None: windows of one action a row."""

    def state_columns(self, wanted: tuple[int | str, ...] | None) -> tuple[int, ...]:
        """Turn state columns given by index or by name into indices; None means all. Raises `UsageError`."""
        if wanted is None:
            return tuple(range(self.state_dim))
        columns = []
        for column in wanted:
            if isinstance(column, str):
                if column not in self.state_names:
                    raise UsageError(
                        f"no state column {column!r}{nearest(column, self.state_names)}",
                        expected=f"one of {', '.join(self.state_names) or '(the state has no names)'}",
                    )
                columns.append(self.state_names.index(column))
            elif 0 <= column < self.state_dim:
                columns.append(column)
            else:
                raise UsageError(f"state column {column}", expected=f"0 to {self.state_dim - 1}")
        return tuple(columns)


@dataclass(frozen=True)
class Batch:
    """B windows. Rows that a window lacks (before or after its episode) repeat the edge and are marked invalid."""

    features: Mapping[str, Tensor]
    """name -> [B, N, V, *axes, C], float16, bfloat16, float32 or int8, as stored: read them through `feature`. N
    is what `HeadModel.reads` says of the feature: n_obs, or fewer, the last ones."""
    state: Tensor | None
    """[B, N, S] float32, in the data's units; None where the data set has no state."""
    task: Tensor
    """[B] int64, index into `HeadIO.tasks`."""
    obs_valid: Tensor
    """[B, N] bool; False before the episode, where values repeat its first frame."""
    action: Tensor | None = None
    """[B, H, A] float32, in the data's units; None at inference."""
    action_valid: Tensor | None = None
    """[B, H] bool; None: all valid."""
    label: Tensor | None = None
    """[B] int64, index into `HeadIO.labels`; None where there are none, and at inference."""
    action_dims: Tensor | None = None
    """[B, A] bool, False for dimensions that a task pads; None: all real."""
    feature_valid: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [B, N, V, P] bool for features with a ragged number of tokens; left out where all P are real."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [B, N, C] float32, the step of each channel's grid, for the int8 features."""
    plan: Tensor | None = None
    """[B, K] int64, what `HeadModel.plan` decided some steps ago and a policy holds on to; None: decide now."""
    prompt: tuple[Tensor, Tensor] | None = None
    """What the head is told, in tokens: ids int64 [B, L], begin token first, and which are real, bool [B, L]. None: a
    head that reads text makes them of task and state, which the prompt otherwise stands for."""

    def feature(self, name: str) -> Tensor:
        """Return a feature's values [B, N, V, *axes, C], a float tensor: int8 is multiplied out here, on the device."""
        stored = self.features[name]
        if name not in self.scales:
            return stored
        scales = self.scales[name]
        return stored.float() * scales.reshape(*scales.shape[:2], *(1,) * (stored.dim() - 3), scales.shape[2])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the same batch on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(
            features={name: value.to(device, non_blocking=non_blocking) for name, value in self.features.items()},
            state=move(self.state),
            task=self.task.to(device, non_blocking=non_blocking),
            obs_valid=self.obs_valid.to(device, non_blocking=non_blocking),
            action=move(self.action),
            label=move(self.label),
            action_valid=move(self.action_valid),
            action_dims=move(self.action_dims),
            feature_valid={k: value.to(device, non_blocking=non_blocking) for k, value in self.feature_valid.items()},
            scales={name: value.to(device, non_blocking=non_blocking) for name, value in self.scales.items()},
            plan=move(self.plan),
            prompt=None if self.prompt is None else (self.prompt[0].to(device), self.prompt[1].to(device)),
        )

    def __len__(self) -> int:
        return self.task.shape[0]


def check_batch(batch: Batch, io: HeadIO, window: WindowSpec, reads: Mapping[str, int], *, state: bool) -> None:
    """Compare shapes with what the head was built for. Looks at no values, so it never waits for the device.

    `reads` are the features that the head reads and how many frames of each, `state` whether it reads the state.
    Raises `DataError` naming the tensor whose shape differs.
    """
    B = len(batch)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"obs_valid": (batch.obs_valid, (B, window.n_obs))}
    for name, frames in reads.items():
        wanted[f"feature {name!r}"] = (batch.features.get(name), (B, frames, *io.features[name].shape))
        if io.features[name].masked:
            tokens = (B, frames, *io.features[name].shape[:-1])
            wanted[f"mask of {name!r}"] = (batch.feature_valid.get(name), tokens)
    if state:
        wanted["state"] = (batch.state, (B, window.n_obs, io.state_dim))
    if batch.action is not None:
        wanted["action"] = (batch.action, (B, window.horizon, io.action_dim))
    if batch.action_valid is not None:
        wanted["action_valid"] = (batch.action_valid, (B, window.horizon))
    if batch.action_dims is not None:
        wanted["action_dims"] = (batch.action_dims, (B, io.action_dim))
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            raise DataError(f"the batch has no {name}", expected=f"a tensor of shape {shape}")
        if tuple(tensor.shape) != shape:
            raise DataError(f"{name} has shape {tuple(tensor.shape)}", expected=f"{shape}, as in training")
