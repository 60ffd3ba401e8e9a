"""Checkpoints: a folder of safetensors and JSON, whole or absent. Nothing in it is ever unpickled.

    step-00001000/
      model.safetensors       weights and buffers (normalisation statistics travel here)
      ema.safetensors         averaged weights, where averaging is on
      optimizer.safetensors   optimiser tensors `<parameter>.<slot>`
      state.json              step, metrics, random generators, schedule, the optimiser's groups, gradient scaler
      artefact.json           what the caller wants kept: resolved configuration, fingerprints, …
      complete.json           size and SHA-256 of each file, written last

The folder is written under a temporary name, made durable, and renamed. `best.json` beside `checkpoints/` names the
checkpoint with the lowest validation metric.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vla.pretrained.weights import first_not_finite
from vla.stores.documents import read_json_file
from vla.stores.errors import CheckpointError
from vla.stores.filesystem import PARTIAL, digest_file, explaining, fsync_dir, fsync_tree
from vla.stores.owned import CHECKPOINT, remove_owned
from vla.stores.settings import Settings

MAX_JSON_BYTES = 64 << 20
"""A larger JSON file is none of ours: state.json of ten thousand parameters has 1 MB."""

REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json", "artefact.json"}
OPTIONAL = {"ema.safetensors"}
CHECKPOINT_NAME = r"^step-[0-9]{8,}$"
_NAME = re.compile(CHECKPOINT_NAME)
log = logging.getLogger(__name__)


class _FileRecord(Settings):
    size: int
    sha256: str


class _Complete(Settings):
    step: int
    files: dict[str, _FileRecord]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, for inference. `weights` are the averaged ones where `averaged`; they are on the CPU."""

    folder: Path
    step: int
    artefact: dict[str, Any]
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    averaged: bool


@dataclass(frozen=True)
class Survey:
    """What a run folder offers to go on from: the newest complete checkpoint, and why newer ones were passed over."""

    newest: Path | None
    passed_over: tuple[str, ...]


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    models: Mapping[str, torch.nn.Module],
    optimizer_tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    artefact: Mapping[str, Any],
) -> Path:
    """Write `run_dir/checkpoints/step-…` and return it.

    `models`: "model" and, where averaging is on, "ema". `state` and `artefact` are JSON-able.
    Raises `MachineError` where the disk refuses; nothing is left under the checkpoint's name then.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(folder.name + PARTIAL)
    with explaining(folder):
        for old in (folder, partial):  # a run that fell back to an earlier checkpoint reaches the same step again
            remove_owned(old, CHECKPOINT)
        partial.mkdir(parents=True)
        contents = {f"{name}.safetensors": save(_tensors(model)) for name, model in models.items()}
        contents["optimizer.safetensors"] = save(dict(optimizer_tensors))
        contents["state.json"] = json.dumps({"step": step, **state}).encode()
        contents["artefact.json"] = json.dumps(artefact, indent=1).encode()
        files = {name: _write(partial / name, data) for name, data in contents.items()}
        _write(partial / "complete.json", _Complete(step=step, files=files).model_dump_json(indent=1).encode())
        fsync_tree(partial)
        partial.rename(folder)
        fsync_dir(folder.parent)
    return folder


def checkpoints(run_dir: Path | str) -> list[Path]:
    """Return the run's checkpoint folders, newest first, whole or not."""
    run_dir = Path(run_dir)
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def survey(run_dir: Path | str) -> Survey:
    """Find the newest checkpoint whose every file matches its digest; say in the log which were passed over."""
    run_dir = Path(run_dir)
    passed_over: list[str] = []
    for folder in checkpoints(run_dir):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            passed_over.append(str(error))
            continue
        return Survey(folder, tuple(passed_over))
    return Survey(None, tuple(passed_over))


def newest_complete(run_dir: Path | str) -> Path:
    """Return the newest complete checkpoint of a run. Raises `CheckpointError` where there is none."""
    run_dir = Path(run_dir)
    if not run_dir.exists():
        raise CheckpointError(f"{run_dir} does not exist", expected="a run of `vla train-head`, or one checkpoint")
    found = survey(run_dir)
    if found.newest is None:
        damaged = f" ({len(found.passed_over)} damaged: {found.passed_over[0]})" if found.passed_over else ""
        runs = sorted(folder.parent for folder in run_dir.glob("*/checkpoints"))
        runs += [run_dir.parent] if (run_dir.parent / "run.json").is_file() else []
        raise CheckpointError(
            f"{run_dir} has no complete checkpoint{damaged}",
            expected="a run of `vla train-head`, or one checkpoint",
            fix=f"the run {runs[0]}" if runs else "",
        )
    return found.newest


def load_checkpoint(path: Path | str, *, which: str = "newest") -> Checkpoint:
    """Open one checkpoint folder, or a run folder's "newest" complete or "best" one, for inference.

    Raises `CheckpointError` naming the file that is missing or damaged, and the tensor that is not finite.
    """
    path = Path(path)
    if _NAME.fullmatch(path.name) or (path / "complete.json").exists():
        folder = path
        verify_checkpoint(folder)
    elif which == "best":
        folder = path / "checkpoints" / best_of(path)
        verify_checkpoint(folder)
    else:
        folder = newest_complete(path)
    averaged = (folder / "ema.safetensors").is_file()
    state = read_state(folder)
    file = folder / ("ema.safetensors" if averaged else "model.safetensors")
    weights = read_tensors(file)
    wrong = first_not_finite(weights)
    if wrong is not None:
        raise CheckpointError(f"{file}: {wrong} holds numbers that are not finite", fix="an earlier checkpoint")
    return Checkpoint(
        folder=folder,
        step=state["step"],
        artefact=read_object(folder / "artefact.json"),
        metrics=state.get("metrics", {}),
        weights=weights,
        averaged=averaged,
    )


def best_of(run_dir: Path | str) -> str:
    """Return the name of the checkpoint that `best.json` points to. Raises `CheckpointError` where it does not."""
    run_dir = Path(run_dir)
    file = run_dir / "best.json"
    name = read_object(file).get("checkpoint")
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # no way out of the folder
        raise CheckpointError(f"{file} names no checkpoint", fix="the newest one, or a checkpoint's own folder")
    return name


def verify_checkpoint(folder: Path | str) -> None:
    """Compare every file with `complete.json`. Raises `CheckpointError` naming the first that differs."""
    folder = Path(folder)
    record = folder / "complete.json"
    try:
        complete = _Complete.model_validate(read_object(record))
    except ValidationError:
        raise CheckpointError(f"{record} is damaged", expected="the sizes and digests of a checkpoint") from None
    wrong = sorted(REQUIRED - complete.files.keys()) + sorted(complete.files.keys() - REQUIRED - OPTIONAL)
    if wrong:
        raise CheckpointError(f"{record} does not describe a checkpoint ({', '.join(wrong)})")
    if _NAME.fullmatch(folder.name) and complete.step != step_of(folder):  # a copy may have any name
        raise CheckpointError(f"{record} is of step {complete.step}", expected=f"step {step_of(folder)}")
    for name, wanted in complete.files.items():
        file = folder / name
        with explaining(file):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != wanted.size or digest_file(file) != wanted.sha256:
                raise CheckpointError(f"{file} differs from {record.name}: truncated or changed")


def load_weights(module: torch.nn.Module, file: Path | str) -> None:
    """Load a safetensors file into `module`. Raises `CheckpointError` where names or shapes differ."""
    file = Path(file)
    tensors, wanted = read_tensors(file), module.state_dict()
    wrong = sorted(tensors.keys() ^ wanted.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"{file} does not fit the module: {', '.join(wrong[:3])}")
    module.load_state_dict(tensors)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises `CheckpointError` naming it."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}", expected="a safetensors file") from None
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json`, of which only the step is checked. Raises `CheckpointError`."""
    state = read_object(folder / "state.json")
    if type(state.get("step")) is not int or state["step"] < 0:
        raise CheckpointError(f"{folder / 'state.json'} has no step", expected="a whole number")
    return state


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size. Raises `CheckpointError` naming the file."""
    try:
        value = read_json_file(file, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", expected="a complete checkpoint or a run folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}", expected="JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}", expected="a JSON object")
    return value


def _write(file: Path, data: bytes) -> _FileRecord:
    # Not by safetensors' save_file: a full disk is no OSError there, and its files can be read by their owner alone.
    file.write_bytes(data)
    return _FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
