"""A small module to train, used by the tests of this folder, and, run as a script, in processes of its own.

trainee.py kill FOLDER COUNT SEED   SIGKILL a slow run at random moments, resuming each time; prints JSON
trainee.py ddp FOLDER               train in two processes
trainee.py ddp-stop FOLDER          the same, the second of them sent SIGTERM; prints both exit codes
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vla.stores.errors import VlaError
from vla.stores.interrupt import Interrupted
from vla.training.checkpoint import checkpoints, newest_complete
from vla.training.config import TrainConfig
from vla.training.loop import fit

SPEEDS = {"steps_per_s", "data_wait_share"}


@dataclass(frozen=True)
class Numbers:
    """x [B, 6], y [B, 3]."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, device: torch.device, *, non_blocking: bool) -> Numbers:
        return Numbers(self.x.to(device), self.y.to(device))


class Net(nn.Module):
    """Two layers. `noisy`: dropout and noise in the loss, as diffusion heads have; a buffer counts the calls."""

    calls: torch.Tensor

    def __init__(self, *, noisy: bool = True, before_loss: Callable[[int], None] = lambda call: None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1 if noisy else 0.0), nn.Linear(16, 3))
        self.register_buffer("calls", torch.tensor(0))
        self._noisy, self._before_loss = noisy, before_loss

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        copy = Net(noisy=self._noisy)
        copy.load_state_dict(self.state_dict())
        return copy

    def loss(self, batch: Numbers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls += 1
        self._before_loss(int(self.calls))
        x = batch.x + 0.1 * torch.randn_like(batch.x) if self._noisy else batch.x
        error = (self.net(x) - batch.y).pow(2).mean()
        return error, {"error": error.detach() * 2}


def batch_of(number: int, size: int = 4) -> Numbers:
    """Batch `number`: a function of it alone."""
    x = torch.from_numpy(np.random.default_rng(number).standard_normal((size, 6)).astype(np.float32))
    return Numbers(x, torch.stack([x.sum(1), x[:, 0] * 2, x[:, 1] - 1], 1))


def batches(first: int, stride: int) -> Iterator[Numbers]:
    return map(batch_of, itertools.count(first, stride))


def validate(model: nn.Module, step: int) -> dict[str, float]:
    """Draws from every generator, as samplers may."""
    torch.randn(3), np.random.random(3), random.random()  # noqa: NPY002
    x = batch_of(10**6).x
    return {"action_mae": float((model.net(x) - batch_of(10**6).y).abs().mean()) + 0.0 * step}  # type: ignore[operator]


def config_of(**changes: Any) -> TrainConfig:
    small = {"steps": 14, "warmup_steps": 2, "lr": 1e-2, "log_every": 4, "validate_every": 5, "checkpoint_every": 3}
    return TrainConfig(**{**small, "keep_checkpoints": 99, "device": "cpu", **changes})


def train(run_dir: Path, net: Net | None = None, config: TrainConfig | None = None, **options: Any) -> Any:
    options = {"artefact": {"recipe": [1, 2]}, "validate": validate, **options}
    return fit(net or Net(), options.pop("batches", batches), config or config_of(), run_dir, **options)


def trace_of(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of a run without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in lines]


def content_of(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint that has to be equal in equal runs."""
    tensors = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    state = json.loads((folder / "state.json").read_bytes())
    state["metrics"] = {name: value for name, value in state["metrics"].items() if name not in SPEEDS}
    return {**tensors, "state": state, "artefact": json.loads((folder / "artefact.json").read_bytes())}


# ---- as a script ----


def kill(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGKILL at random moments, checkpoints being written most of the time; resume until the run comes through."""
    config = config_of(steps=40, checkpoint_every=1, log_every=3, keep_checkpoints=2)
    reference = folder / "reference"
    train(reference, config=config)
    expected = content_of(newest_complete(reference))
    rng, failures, resumed_at = random.Random(seed), [], set()
    kills, runs = 0, 0
    while kills < count:
        run_dir = folder / f"run-{runs}"
        runs += 1
        finished = False
        while not finished:
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    train(run_dir, Net(before_loss=lambda call: time.sleep(0.002)), config, resume=True)
                    code = 0
                os._exit(code)
            if kills < count:
                time.sleep(rng.uniform(0.0, 0.25))
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            kills += code == -signal.SIGKILL
            finished = code != -signal.SIGKILL
            if code > 0:
                failures.append(f"run {runs}: resuming after kill {kills} failed")
            try:
                resumed_at.add(newest_complete(run_dir).name if checkpoints(run_dir) else "none")
            except VlaError as error:
                failures.append(f"kill {kills}: {error}")
        if not failures:
            if content_of(newest_complete(run_dir)) != expected:
                failures.append(f"run {runs}: the last checkpoint differs")
            if trace_of(run_dir) != trace_of(reference):
                failures.append(f"run {runs}: the trace differs")
            failures += [f"left {path.name}" for path in run_dir.rglob("*.partial")]
        if failures:
            break
        shutil.rmtree(run_dir)
    return {"kills": kills, "runs": runs, "resumed_at": sorted(resumed_at), "failures": failures}


def ddp(folder: Path) -> int:
    """Train six steps in two processes, and the last three of them again after resuming; return 0 where all is well."""
    resumed = folder.with_name("resumed")
    code = max(in_two_processes(folder, resume=False))
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    return code or max(in_two_processes(resumed, resume=True))


def ddp_stop(folder: Path) -> list[int]:
    """Have the second of two processes get SIGTERM in a forward pass; return both exit codes."""

    def terminate(call: int) -> None:
        time.sleep(0.01)  # 200 steps take longer than the processes' exchange of what reached them
        if call == 6 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

    return in_two_processes(folder, resume=False, steps=200, before_loss=terminate)


def in_two_processes(folder: Path, *, resume: bool, steps: int = 6, **net: Any) -> list[int]:
    """Start two processes as `torchrun` does, each for a share of the batches; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            code = 1
            try:
                config = config_of(steps=steps, checkpoint_every=3, accumulate=2, log_every=1)
                train(folder, Net(noisy=False, **net), config, resume=resume)
                code = 0
            except Interrupted as ended:
                code = 128 + ended.number
            except BaseException:  # noqa: BLE001 - a forked child must never return to its parent's code
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    return [abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, where, *rest = sys.argv[1:]
    if command == "kill":
        sys.stdout.write(json.dumps(kill(Path(where), int(rest[0]), int(rest[1]))) + "\n")
    elif command == "ddp-stop":
        sys.stdout.write(json.dumps(ddp_stop(Path(where))) + "\n")
    else:
        sys.exit(ddp(Path(where)))
