"""An optimiser's state as named tensors and JSON, so that it is kept without pickle and checked when it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vla.stores.errors import CheckpointError, UsageError


def parameter_names(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimiser's parameters, in its order. Raises `UsageError` for one `module` lacks."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in parameters):
        raise UsageError("param_groups holds a parameter that is not the module's", expected="module.parameters()")
    return [names[id(parameter)] for parameter in parameters]


def dump_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state as tensors `<parameter>.<slot>` and a JSON-able rest."""
    state: dict[str, Any] = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}.{slot}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(names[index], {})[slot] = value
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return tensors, {"groups": groups, "scalars": scalars}


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what `dump_optimizer` returned. Raises `CheckpointError` where parameters or shapes differ."""
    indices = {name: index for index, name in enumerate(names)}
    if [name for group in rest["groups"] for name in group["params"]] != names:
        raise CheckpointError("the optimiser's state is of other parameters", expected=f"{', '.join(names[:3])}, …")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {indices[name]: dict(slots) for name, slots in rest["scalars"].items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        index = indices.get(name)
        if index is None or (value.ndim and value.shape != parameters[index].shape):  # `step` has no axes
            raise CheckpointError(f"the optimiser's {key} has shape {tuple(value.shape)} and does not fit the module")
        state.setdefault(index, {})[slot] = value
    groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in rest["groups"]]
    # `fused` and `foreach` are how this machine computes, not what: the run may have begun on another device.
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        group.update({key: current[key] for key in ("fused", "foreach") if key in current})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
