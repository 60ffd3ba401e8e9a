"""Checkpoints: a folder of safetensors and JSON, whole or absent. Nothing in it is ever unpickled.

    step-00001000/
      model.safetensors       weights and buffers (normalisation statistics travel here)
      ema.safetensors         averaged weights, where averaging is on
      optimizer.safetensors   optimiser tensors `<parameter>.<slot>`, and the random generators' states
      state.json              step, scheduler, optimiser groups and scalars, gradient scaler
      artefact.json           what the caller wants kept: resolved configuration, fingerprints, …
      complete.json           size and SHA-256 of each file, written last

The folder is written under a temporary name, made durable, and renamed.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vla.stores.errors import CheckpointError
from vla.stores.filesystem import PARTIAL, digest_file, explaining, fsync_dir, fsync_tree, write_atomic

_NAME = re.compile(r"step-(\d{8})")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk. `weights` are the averaged ones where they were kept."""

    folder: Path
    step: int
    artefact: dict[str, Any]
    weights: dict[str, torch.Tensor]


def save(
    run_dir: Path,
    step: int,
    model: torch.nn.Module,
    ema: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    artefact: Mapping[str, Any],
) -> Path:
    """Write `run_dir/checkpoints/step-…` and return it. `extra` is JSON-able state of the loop."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(folder.name + PARTIAL)
    with explaining(folder):
        for old in (folder, partial):  # a resumed run reaches the same step again
            if old.exists():
                shutil.rmtree(old)
        partial.mkdir(parents=True)
        save_file(_tensors(model), partial / "model.safetensors")
        if ema is not None:
            save_file(_tensors(ema), partial / "ema.safetensors")
        slots, scalars = _optimizer_state(optimizer)
        save_file({**slots, **_random_states()}, partial / "optimizer.safetensors")
        state = {"step": step, "optimizer": scalars, "python_random": random.getstate(), **extra}
        (partial / "state.json").write_text(json.dumps(state))
        (partial / "artefact.json").write_text(json.dumps(artefact, indent=1))
        files = {file.name: {"size": file.stat().st_size, "sha256": digest_file(file)} for file in partial.iterdir()}
        (partial / "complete.json").write_text(json.dumps({"step": step, "files": files}))
        fsync_tree(partial)
        partial.rename(folder)
        fsync_dir(folder.parent)
    return folder


def restore(
    folder: Path, model: torch.nn.Module, ema: torch.nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load everything `save` wrote into the given objects and the random generators; return `extra` and the step."""
    state: dict[str, Any] = _read_json(folder / "state.json")
    _load_into(model, folder / "model.safetensors")
    if ema is not None:
        _load_into(ema, folder / "ema.safetensors")
    tensors = _read_tensors(folder / "optimizer.safetensors")
    _restore_optimizer(optimizer, tensors, state["optimizer"])
    _restore_random(tensors, state["python_random"])
    return state


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoint folders, newest first, whole or not."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def newest_complete(run_dir: Path) -> Path:
    """Return the newest checkpoint whose every file matches its digest; say in the log which ones were passed over.

    Raises `CheckpointError` where there is none.
    """
    for folder in checkpoints(run_dir):
        try:
            verify(folder)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        return folder
    raise CheckpointError(f"{run_dir} has no complete checkpoint", expected="a run of `vla train-head`")


def load_checkpoint(path: Path, *, which: str = "newest") -> Checkpoint:
    """Open a run folder (its best or newest checkpoint) or one checkpoint folder, for inference.

    `which`: "best" takes the checkpoint that `best.json` names. Raises `CheckpointError` naming what is missing.
    """
    folder = path
    if not (path / "complete.json").is_file():
        best = path / "best.json"
        if which == "best" and best.is_file():
            folder = path / "checkpoints" / str(_read_json(best)["checkpoint"])
        else:
            folder = newest_complete(path)
    verify(folder)
    averaged = folder / "ema.safetensors"
    weights = _read_tensors(averaged if averaged.is_file() else folder / "model.safetensors")
    return Checkpoint(
        folder, int(_read_json(folder / "state.json")["step"]), _read_json(folder / "artefact.json"), weights
    )


def verify(folder: Path) -> None:
    """Compare every file with `complete.json`. Raises `CheckpointError` naming the first that differs."""
    for name, record in _read_json(folder / "complete.json")["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != record["size"] or digest_file(file) != record["sha256"]:
            raise CheckpointError(f"{file} is missing or differs from complete.json")


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def _load_into(module: torch.nn.Module, file: Path) -> None:
    tensors = _read_tensors(file)
    wanted = module.state_dict()
    wrong = sorted(tensors.keys() ^ wanted.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"{file} does not fit the model: {', '.join(wrong[:3])}")
    module.load_state_dict(tensors)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state: dict[Any, Any] = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{slot}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars.setdefault(str(index), {})[slot] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], saved: Any) -> None:
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in saved["scalars"].items()}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, slot = rest.partition(".")
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["groups"]})


def _random_states() -> dict[str, torch.Tensor]:
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries may draw from the global generator
    states = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.asarray(legacy[1], np.int64)),
        "random.numpy_position": torch.tensor([int(legacy[2])]),
    }
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(tensors: Mapping[str, torch.Tensor], python: Any) -> None:
    torch.set_rng_state(tensors["random.torch"])
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(tensors["random.numpy_position"]), 0, 0.0))  # noqa: NPY002
    random.setstate((python[0], tuple(python[1]), python[2]))
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}", expected="a safetensors file") from None
    return tensors


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", expected="a complete checkpoint or a run folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}", expected="JSON") from None


def write_best(run_dir: Path, folder: Path, metric: str, value: float) -> None:
    """Record which checkpoint is best so far."""
    write_atomic(run_dir / "best.json", json.dumps({"checkpoint": folder.name, metric: value}).encode())
