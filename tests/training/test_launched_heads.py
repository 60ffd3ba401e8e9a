"""A head trained by two launched processes, in micro-batches, is what one process trains with one large batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.train import HeadTrainConfig, train_head

STEPS = 6
MODEL = ["model.horizon=24", "model.n_action=1", "model.hidden=16", "model.encoder.dim=16", "model.encoder.queries=2"]
TRAIN = [f"train.steps={STEPS}", "train.log_every=1", "train.device=cpu", "train.schedule=constant", "train.lr=0.01"]


def _losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_launched_processes_of_micro_batches_give_the_losses_of_one_large_batch(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(prepare(FeaturizeConfig(source="synthetic:episodes=6", backbone="toy")), store)
    settings = [f"data.stores={json.dumps([str(store)])}", *MODEL, *TRAIN]
    train_head(HeadTrainConfig.from_sources(None, [*settings, "train.batch_size=8"], head="mlp"), tmp_path / "one")
    # --multi_gpu is accelerate's word for what torchrun starts; with --cpu it would start one process, or ask for MPI.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # Below the ports that a kernel gives away by itself: one picked among those may be another test's when it is bound.
    command += ["--main_process_port", str(20_000 + os.getpid() % 10_000)]
    command += [str(Path(sys.executable).with_name("vla")), "train-head", "mlp", "--out", str(tmp_path / "two")]
    command += [
        part for setting in [*settings, "train.batch_size=2", "train.accumulate=2"] for part in ("--set", setting)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert len(two) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
