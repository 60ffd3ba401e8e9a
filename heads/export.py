"""`vla export`: a trained head as one file that runs without this package: torch.export, the sampler unrolled.

Its inputs are the observation as tensors, and the noise that the sampler begins with, so that it is deterministic;
normalisation is inside, and its output is in the data's units. A JSON file beside it says what each input is.

    program = torch.export.load("head.pt2").module()
    action = program(**inputs)  # [B, n_action_max, A]
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.heads.batch import Batch
from vla.heads.checkpoint import TrainedHead
from vla.heads.model import GivenNoise, HeadModel
from vla.stores.dtypes import DtypeName
from vla.stores.errors import MachineError, UsageError
from vla.stores.filesystem import explaining, write_atomic

TOLERANCE = 1e-4
"""Largest difference to the live head, in the actions' normalised units: float32 sums in another order."""


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


class ExportedAct(nn.Module):
    """`HeadModel.act` over tensors by keyword; frozen networks are part of it."""

    def __init__(self, model: HeadModel, inputs: tuple[Input, ...]) -> None:
        super().__init__()
        self.head, self._inputs = model, inputs
        self.networks = nn.ModuleDict({name: frozen.module for name, frozen in model.frozen.items()})

    def forward(self, **tensors: Tensor) -> Tensor:
        """Return the actions [B, n_action_max, A] in the data's units."""
        noise = [tensors[given.name] for given in self._inputs if given.of == "noise"]
        return self.head.decide(batch_of(self._inputs, tensors), GivenNoise(noise))


def export_head(head: TrainedHead, out: Path, *, batch: int = 1) -> dict[str, Any]:
    """Write a head to `out` (.pt2) and its description to the .json beside it; return the description.

    `batch`: how many observations it takes at once, fixed. The program is
    run once beside the live head before it is written. Raises `UsageError` for a sampler that draws noise on its way,
    for heads that torch.export cannot trace, and where the exported head would act otherwise.
    """
    if out.suffix != ".pt2":
        raise UsageError(f"--out {out}", expected="a file .pt2, as torch.export.save writes")
    if head.model.not_exported:
        raise UsageError(f"{head.artefact.head!r} is not exported: {head.model.not_exported}")
    model = head.model.cpu().eval()
    observed = observation_inputs(head, batch)
    tensors = {given.name: given.example() for given in observed}
    drawn = GivenNoise()
    with torch.no_grad():
        live = model.decide(batch_of(observed, tensors), drawn)
    many = len(drawn.noise) > 1
    inputs = observed + tuple(
        Input("noise", str(at) if many else "", tuple(noise.shape), "float32", "standard normal, the sampler's")
        for at, noise in enumerate(drawn.noise)
    )
    tensors |= {given.name: noise for given, noise in zip(inputs[len(observed) :], drawn.noise, strict=True)}
    program = _trace(ExportedAct(model, inputs), tensors)
    with torch.no_grad():
        apart = float(((program.module()(**tensors) - live).abs() / model.action.scale).max())
    if not apart <= TOLERANCE:
        raise UsageError(
            f"exported, {head.artefact.head!r} differs from the live head by {apart:.2g} of an action's range",
            expected=f"at most {TOLERANCE:g}: all of its noise has to come from noise_like (heads/model.py)",
        )
    described = _description(head, inputs, batch, apart)
    content = io.BytesIO()
    torch.export.save(program, content)
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content.getvalue())
    write_atomic(out.with_suffix(".json"), json.dumps(described, indent=1).encode())
    return described


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
    inputs.append(
        Input("obs_valid", "", (batch, N), "bool", "false before the episode, whose first frame stands there")
    )
    return tuple(inputs)


def batch_of(inputs: tuple[Input, ...], tensors: dict[str, Tensor]) -> Batch:
    """Return the observation that tensors by name make."""

    def entries(of: str) -> dict[str, Tensor]:
        return {given.key: tensors[given.name] for given in inputs if given.of == of}

    return Batch(
        features=entries("feature"),
        state=tensors.get("state"),
        task=tensors["task"],
        obs_valid=tensors["obs_valid"],
        feature_valid=entries("feature_valid"),
    )


def _trace(act: ExportedAct, tensors: dict[str, Tensor]) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(act, (), tensors, strict=False)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(f"torch.export cannot trace {type(act.head).__name__}: {reason}") from None


def _description(head: TrainedHead, inputs: tuple[Input, ...], batch: int, apart: float) -> dict[str, Any]:
    artefact, config = head.artefact, head.config
    made = artefact.io
    return {
        "head": artefact.head,
        "checkpoint": str(head.folder),
        "step": head.step,
        "inputs": {
            given.name: {"shape": list(given.shape), "dtype": given.dtype, "unit": given.unit} for given in inputs
        },
        "output": {
            "shape": [batch, config.n_action_max, made.action_dim],
            "dtype": "float32",
            "unit": f"the data's units: {', '.join(made.action_names) or 'unnamed'}",
            "execute": config.n_action,
        },
        "tasks": list(made.tasks),
        "cameras": {name: list(store.cameras) for store in artefact.stores for name in store.features},
        "backbones": {name: store.recipe for store in artefact.stores for name in store.features},
        "config": config.model_dump(mode="json"),
        "largest_difference": apart,
        "torch": torch.__version__,
        "vla": artefact.vla_version,
    }
