"""Checkpoints on disk: whole or absent, verified, never unpickled, and nothing read outside their folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.stores.errors import CheckpointError, MachineError
from vla.stores.filesystem import digest_file
from vla.training import checkpoint
from vla.training.checkpoint import checkpoints, load_checkpoint, newest_complete, verify_checkpoint
from vla.training.run_folder import can_resume

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "artefact.json")


@pytest.fixture
def run(trainee: ModuleType, memory_path: Path) -> Path:
    """A run with checkpoints 3, 6, 9, 12 and 14."""
    trainee.train(memory_path / "run")
    return memory_path / "run"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / "checkpoints" / "step-00000014" / name)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(run).name == "step-00000012"
    assert f"step-00000014/{name}" in caplog.text
    with pytest.raises(CheckpointError, match=rf"step-00000014/{name}"):
        load_checkpoint(run / "checkpoints" / "step-00000014")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"step": 14, "files": {}}',
        b'{"step": 14, "files": []}',
        b'{"step": "x", "files": {"model.safetensors": {"size": 1}}}',
    ],
)
def test_a_damaged_record_is_no_record(run: Path, content: bytes) -> None:
    (run / "checkpoints" / "step-00000014" / "complete.json").write_bytes(content)
    assert newest_complete(run).name == "step-00000012"


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000099")
    assert newest_complete(run).name == "step-00000014"


def test_resuming_from_an_older_checkpoint_says_so_and_ends_the_same(trainee: ModuleType, run: Path) -> None:
    before = trainee.content_of(newest_complete(run)), trainee.trace_of(run)
    truncate(run / "checkpoints" / "step-00000014" / "model.safetensors")
    flip_a_bit(run / "checkpoints" / "step-00000012" / "ema.safetensors")
    report = trainee.train(run, resume=True)
    assert report.resumed_from == run / "checkpoints" / "step-00000009"
    assert len(report.passed_over) == 2
    for line, name in zip(report.passed_over, ("14/model.safetensors", "12/ema.safetensors"), strict=True):
        assert name in line
    assert (trainee.content_of(newest_complete(run)), trainee.trace_of(run)) == before


def test_a_damaged_checkpoint_takes_no_good_one_s_place(trainee: ModuleType, run: Path) -> None:
    for step in (9, 12, 14):
        empty(run / "checkpoints" / f"step-{step:08d}" / "state.json")
    stop_after_9: list[int] = []

    def stop(step: int, total: int, metrics: dict[str, float]) -> None:
        stop_after_9.append(step)
        if step == 9:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        trainee.train(run, config=trainee.config_of(keep_checkpoints=1), resume=True, validate=None, progress=stop)
    assert stop_after_9 == [7, 8, 9]
    assert newest_complete(run).name == "step-00000009"


def test_where_every_checkpoint_is_damaged_nothing_is_begun_again(trainee: ModuleType, run: Path) -> None:
    for folder in checkpoints(run):
        empty(folder / "model.safetensors")
    assert can_resume(run)
    with pytest.raises(CheckpointError, match=r"every checkpoint of .*--overwrite"):
        trainee.train(run, resume=True)
    with pytest.raises(CheckpointError, match="5 damaged"):
        load_checkpoint(run)


def test_what_an_interrupted_write_left_is_swept(trainee: ModuleType, run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000014", run / "checkpoints" / "step-00000020.partial")
    (run / "best.json.partial").write_text("{")
    assert newest_complete(run).name == "step-00000014"
    trainee.train(run, resume=True)
    assert not list(run.rglob("*.partial"))


# ---- opening one for inference ----


def test_averaged_weights_come_first_and_everything_else_comes_along(run: Path) -> None:
    found = load_checkpoint(run)
    folder = run / "checkpoints" / "step-00000014"
    assert (found.folder, found.step, found.averaged, found.artefact) == (folder, 14, True, {"recipe": [1, 2]})
    assert torch.equal(found.weights["net.0.weight"], load_file(folder / "ema.safetensors")["net.0.weight"])
    assert not torch.equal(found.weights["net.0.weight"], load_file(folder / "model.safetensors")["net.0.weight"])
    assert found.metrics["action_mae"] > 0


def test_a_checkpoint_folder_may_be_copied_to_any_name(run: Path, memory_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000006", memory_path / "my policy")
    assert load_checkpoint(memory_path / "my policy").step == 6


def test_a_folder_without_checkpoints_is_named(memory_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a run of `vla train-head`"):
        load_checkpoint(memory_path / "nothing")
    (memory_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_checkpoint(memory_path / "empty")
    (run / "best.json").unlink()
    with pytest.raises(CheckpointError, match=r"best\.json is missing"):
        load_checkpoint(run, which="best")
    assert not can_resume(memory_path / "nothing")


# ---- hostile folders ----


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def sign(folder: Path, **more: Path) -> None:
    """Make `complete.json` agree with what lies there, as whoever made the folder could."""
    files = {file.name: file for file in folder.iterdir() if file.name != "complete.json"} | more
    record = {name: {"size": file.stat().st_size, "sha256": digest_file(file)} for name, file in files.items()}
    (folder / "complete.json").write_text(json.dumps({"step": 14, "files": record}))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_any_place_is_refused_and_not_run(
    trainee: ModuleType, run: Path, memory_path: Path, name: str
) -> None:
    folder, canary = run / "checkpoints" / "step-00000014", memory_path / "canary"
    torch.save(Bomb(canary), folder / name)
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists(), "the bomb is none"
    canary.unlink()
    sign(folder)
    if name in ("ema.safetensors", "state.json", "artefact.json"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(run)
    if name != "artefact.json":  # run.json's is compared
        with pytest.raises(CheckpointError, match=name):
            trainee.train(run, resume=True)
    assert not canary.exists()


def test_nothing_outside_the_folder_is_read(run: Path, memory_path: Path) -> None:
    folder, secret = run / "checkpoints" / "step-00000014", memory_path / "secret"
    secret.write_text("s")
    sign(folder, **{"../../../secret": secret})
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        verify_checkpoint(folder)
    (run / "best.json").write_text('{"checkpoint": "../../secret"}')
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        load_checkpoint(run, which="best")


@pytest.mark.parametrize(
    "change",
    [
        {"random": []},
        {"random": [{"torch": "zz"}]},
        {"schedule": {}},
        {"optimizer": {"groups": [], "scalars": {}}},
        {"optimizer": []},
        {"window": {"loss": "abc"}},
        {"best": {"nonsense": 1}},
        {"best": {"checkpoint": "../../../secret", "metric": "action_mae", "value": 0}},
        {"metrics": 3},
        {"ema_updates": None},
        {"step": "14"},
        {"step": -1},
    ],
)
def test_a_state_that_makes_no_sense_is_named(trainee: ModuleType, run: Path, change: dict[str, Any]) -> None:
    folder = run / "checkpoints" / "step-00000014"
    state = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    sign(folder)
    with pytest.raises(CheckpointError, match=r"state\.json|of other parameters"):
        trainee.train(run, resume=True)


def test_optimiser_tensors_of_another_shape_are_refused(trainee: ModuleType, run: Path) -> None:
    folder = run / "checkpoints" / "step-00000014"
    tensors = load_file(folder / "optimizer.safetensors")
    tensors["net.0.weight.exp_avg"] = torch.zeros(5)
    save_file(tensors, folder / "optimizer.safetensors")
    sign(folder)
    with pytest.raises(CheckpointError, match=r"net\.0\.weight\.exp_avg has shape \(5,\)"):
        trainee.train(run, resume=True)


def test_a_json_file_without_end_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run / "checkpoints" / "step-00000014" / "complete.json"
    file.write_bytes(file.read_bytes() + b" " * 10_000)
    assert newest_complete(run).name == "step-00000014"
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 10_000)
    assert newest_complete(run).name == "step-00000012"


# ---- a disk that refuses ----


@pytest.mark.parametrize("operation", ["write_bytes", "mkdir", "rename", "fsync"])
def test_a_full_disk_leaves_no_half_checkpoint_under_its_name(
    trainee: ModuleType, memory_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os if operation == "fsync" else Path
    true = getattr(owner, operation)

    def full(what: Any, *arguments: Any, **options: Any) -> Any:
        name = str(Path(f"/proc/self/fd/{what}").readlink()) if operation == "fsync" else str(what)
        if "step-00000006" in name and not name.endswith("state.json"):
            raise OSError(errno.ENOSPC, "no space")
        return true(what, *arguments, **options)

    monkeypatch.setattr(owner, operation, full)
    with pytest.raises(MachineError, match=r"the disk is full.*--resume"):
        trainee.train(memory_path / "run")
    assert [folder.name for folder in checkpoints(memory_path / "run")] == ["step-00000003"]
    monkeypatch.undo()
    trainee.train(memory_path / "run", resume=True)
    trainee.train(memory_path / "whole")
    ends = [newest_complete(memory_path / name) for name in ("run", "whole")]
    assert trainee.content_of(ends[0]) == trainee.content_of(ends[1])


def test_checkpoints_are_as_readable_as_other_files(run: Path, memory_path: Path) -> None:
    (memory_path / "other").touch()
    modes = {file.stat().st_mode for file in (run / "checkpoints" / "step-00000014").iterdir()}
    assert modes == {(memory_path / "other").stat().st_mode}
