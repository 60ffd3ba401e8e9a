"""The inputs of an exported head: what an observation is as tensors by keyword, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.checkpoint import TrainedHead
from vla.stores.dtypes import DtypeName


@dataclass(frozen=True)
class Input:
    """One input: `of` says which field of a `Batch` it is, `key` which entry of it; "noise" is the sampler's."""

    of: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    unit: str

    @property
    def name(self) -> str:
        """The keyword: an identifier."""
        return re.sub(r"\W", "_", f"{self.of}_{self.key}" if self.key else self.of)

    def example(self) -> Tensor:
        """Return a tensor of its shape and dtype; masks are true."""
        if self.dtype == "bool":
            return torch.ones(self.shape, dtype=torch.bool)
        kind: torch.dtype = getattr(torch, self.dtype)
        return torch.zeros(self.shape, dtype=kind) if self.dtype == "int64" else torch.randn(self.shape).to(kind)


def observation_inputs(head: TrainedHead, batch: int) -> tuple[Input, ...]:
    """Return the inputs that make an observation of a head, in order."""
    model, made, N = head.model, head.artefact.io, head.config.n_obs
    kept: dict[str, DtypeName] = {
        name: info.dtype for store in head.artefact.stores for name, info in store.features.items()
    }
    inputs = []
    for name, frames in model.reads.items():
        feature = made.features[name]
        dtype = "float32" if kept[name] == "int8" else kept[name]
        unit = f"feature, the last {frames} observed frames, as the backbone makes it"
        inputs.append(Input("feature", name, (batch, frames, *feature.shape), dtype, unit))
        if feature.masked:
            shape = (batch, frames, *feature.shape[:-1])
            inputs.append(Input("feature_valid", name, shape, "bool", "which tokens are real"))
    if model.columns:
        unit = f"the data's units: {', '.join(made.state_names)}"
        inputs.append(Input("state", "", (batch, N, made.state_dim), "float32", unit))
    inputs.append(Input("task", "", (batch,), "int64", "position in `tasks`"))
    if made.task_dims:
        unit = "which actions the task has, as `task_dims` says by task"
        inputs.append(Input("action_dims", "", (batch, made.action_dim), "bool", unit))
    inputs.append(
        Input("obs_valid", "", (batch, N), "bool", "false before the episode, whose first frame stands there")
    )
    return tuple(inputs)


def told_inputs(observed: tuple[Input, ...], length: int) -> tuple[Input, ...]:
    """Return the inputs where a prompt of `length` tokens stands for the task and the state that it tells."""
    batch = next(given.shape[0] for given in observed)
    seen = tuple(given for given in observed if given.of not in ("state", "task"))
    return (
        *seen,
        Input("prompt", "ids", (batch, length), "int64", "what the head is told, as `prompt` says"),
        Input("prompt", "valid", (batch, length), "bool", "which of those are real"),
    )


def batch_of(inputs: tuple[Input, ...], tensors: dict[str, Tensor]) -> Batch:
    """Return the observation that tensors by name make."""

    def entries(of: str) -> dict[str, Tensor]:
        return {given.key: tensors[given.name] for given in inputs if given.of == of}

    seen, prompt = tensors["obs_valid"], entries("prompt")
    return Batch(
        features=entries("feature"),
        state=tensors.get("state"),
        # Where the prompt says which task it is, its number is read by nobody: it counts the rows.
        task=tensors["task"] if "task" in tensors else seen.new_zeros(len(seen), dtype=torch.int64),
        obs_valid=seen,
        action_dims=tensors.get("action_dims"),
        feature_valid=entries("feature_valid"),
        prompt=(prompt["ids"], prompt["valid"]) if prompt else None,
    )
