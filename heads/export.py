"""`vla export`: a trained head as one file that runs without this package: torch.export, the sampler unrolled.

Its inputs are the observation as tensors, and the noise that the sampler draws, so that it is deterministic;
normalisation is inside, and its output is in the data's units. A JSON file beside it says what each input is.

    program = torch.export.load("head.pt2").module()
    action = program(**inputs)  # [B, n_action_max, A]

A head that reads text is told by token ids: where its prompt depends on the task alone the program holds them all, else
they are an input (exported_prompt.py).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.heads.checkpoint import TrainedHead
from vla.heads.exported_inputs import Input, batch_of, observation_inputs, told_inputs
from vla.heads.exported_prompt import ExportedPrompt, PromptForm, describe_prompt
from vla.heads.model import GivenNoise, HeadModel
from vla.heads.registry import head_name
from vla.stores.errors import MachineError, UsageError
from vla.stores.filesystem import explaining, refuse_file, write_atomic
from vla.stores.owned import CHECKPOINT, RUN, STORE

TOLERANCE = 1e-4
"""Largest difference to the live head, in the actions' normalised units: float32 sums in another order."""


class ExportedAct(nn.Module):
    """`HeadModel.act` over tensors by keyword; frozen networks are part of it, and so is a `table` of prompts by task,
    (ids int64 [K, L], valid bool [K, L])."""

    prompt_ids: Tensor | None
    prompt_valid: Tensor | None

    def __init__(self, model: HeadModel, inputs: tuple[Input, ...], table: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.head, self._inputs = model, inputs
        self.networks = nn.ModuleDict({name: frozen.module for name, frozen in model.frozen.items()})
        ids, valid = (None, None) if table is None else table
        self.register_buffer("prompt_ids", ids)
        self.register_buffer("prompt_valid", valid)

    def forward(self, **tensors: Tensor) -> Tensor:
        """Return the actions [B, n_action_max, A] in the data's units."""
        batch = batch_of(self._inputs, tensors)
        if self.prompt_ids is not None and self.prompt_valid is not None:
            batch = replace(batch, prompt=(self.prompt_ids[batch.task], self.prompt_valid[batch.task]))
        noise = tensors.get("noise")
        drawn = [] if noise is None else [noise] if noise.dim() == 3 else list(noise)
        return self.head.decide(batch, GivenNoise(drawn))


def export_head(head: TrainedHead, out: Path | str, *, batch: int = 1, overwrite: bool = False) -> dict[str, Any]:
    """Write a head to `out` (.pt2) and its description to the .json beside it; return the description.

    `batch`: how many observations it takes at once, fixed. The program is run once beside the live head before it is
    written, with prompts made as the description says. Raises `UsageError` for heads without actions of a fixed number
    of steps, for those that torch.export cannot trace, where the exported head would act otherwise, and where either
    file exists and is not to be replaced (`overwrite`).
    """
    out = Path(out)
    if out.suffix != ".pt2":
        raise UsageError(f"--out {out}", expected="a file .pt2, as torch.export.save writes")
    description = out.with_suffix(".json")
    names_of_folders = any(layout.has_file(description.name) for layout in (STORE, RUN, CHECKPOINT))
    refuse_file(description, overwrite=overwrite and not names_of_folders)  # run.pt2 would replace a run's run.json
    refuse_file(out, overwrite=overwrite)
    if head.model.not_exported:
        raise UsageError(f"{head.artefact.head!r} is not exported: {head.model.not_exported}")
    model = head.model.cpu().eval()
    inputs = observation_inputs(head, batch)
    tensors = _example(model, inputs)
    observation, drawn = batch_of(inputs, tensors), GivenNoise()
    with torch.no_grad():
        # A head that speaks is asked once, as a policy asks it: what it says is then told to both.
        observation = replace(observation, plan=model.plan(observation))
        live = model.decide(observation, drawn)
    telling, form = model.telling(), None
    if telling is not None:
        form = describe_prompt(telling, head.artefact.io.state_names)
        if not telling.fixed:
            tensors |= _tell(form, telling.of(observation), tensors.get("state"))
            inputs = told_inputs(inputs, form.length)
    if drawn.noise:
        tensors["noise"] = torch.stack(drawn.noise) if len(drawn.noise) > 1 else drawn.noise[0]
        unit = "standard normal, the sampler's" + (", one for each draw in order" if len(drawn.noise) > 1 else "")
        inputs = (*inputs, Input("noise", "", tuple(tensors["noise"].shape), "float32", unit))
    tensors = {given.name: tensors[given.name] for given in inputs}
    program = _trace(ExportedAct(model, inputs, telling.table() if telling and telling.fixed else None), tensors)
    with torch.no_grad():
        apart = float(((program.module()(**tensors) - live).abs() / model.action.scale).max())
    if not apart <= TOLERANCE:
        raise UsageError(
            f"exported, {head.artefact.head!r} differs from the live head by {apart:.2g} of an action's range",
            expected=f"at most {TOLERANCE:g}: all of its noise has to come from noise_like (heads/model.py)",
        )
    described = _description(head, inputs, form, batch, apart)
    content = io.BytesIO()
    torch.export.save(program, content)
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content.getvalue())
    write_atomic(description, json.dumps(described, indent=1).encode())
    return described


def _example(model: HeadModel, inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    """Return an observation by name, its rows told different tasks."""
    tensors = {given.name: given.example() for given in inputs}
    tensors["task"] = torch.arange(len(tensors["task"])) % max(1, len(model.instructions))
    return tensors


def _tell(form: PromptForm, texts: Sequence[str], state: Tensor | None) -> dict[str, Tensor]:
    """Return the prompts of an observation as the user of the written description would make them."""
    written = PromptForm.build(json.loads(json.dumps(form.model_dump(mode="json"))))
    return ExportedPrompt(written)(texts, None if state is None else state[:, -1])


def _trace(act: ExportedAct, tensors: dict[str, Tensor]) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(act, (), tensors, strict=False)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(f"torch.export cannot trace head {head_name(type(act.head))!r}: {reason}") from None


def _description(
    head: TrainedHead, inputs: tuple[Input, ...], form: PromptForm | None, batch: int, apart: float
) -> dict[str, Any]:
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
        "tasks": list(head.model.instructions),
        "task_dims": [list(dims) for dims in made.task_dims],
        "prompt": None if form is None else form.model_dump(mode="json"),
        "cameras": {name: list(store.cameras) for store in artefact.stores for name in store.features},
        "backbones": {name: store.recipe for store in artefact.stores for name in store.features},
        "config": config.model_dump(mode="json"),
        "largest_difference": apart,
        "torch": torch.__version__,
        "vla": artefact.vla_version,
    }
