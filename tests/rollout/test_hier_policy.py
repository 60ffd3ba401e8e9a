"""`hier` on its whole path: runs of tasks with parts -> store -> head -> figures -> a policy that holds its subtask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import load_head
from vla.heads.data import DataConfig
from vla.heads.evaluate import evaluate_head
from vla.heads.fit_fast import FitFastConfig, fit_fast
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import CheckpointError, UsageError

LIGHT = {"width": 32, "layers": 1, "max_subtask": 6, "encoder": {"dim": 32, "queries": 4}}
FULL = {"variant": "full", "weights": "random", "max_subtask": 6}
Train = Callable[..., Path]


def record(root: Path) -> Path:
    """Write three subtasks of two tasks, two runs each of 8 steps, in layout A."""
    rng = np.random.default_rng(0)
    for place in ("clear table/pick cup", "clear table/put cup", "set table/place plate"):
        for number in range(2):
            folder = root / place / f"run_{number}"
            (folder / "front").mkdir(parents=True)
            state = rng.normal(size=(8, 3)).cumsum(axis=0)
            np.save(folder / "qpos.npy", state.astype(np.float32))
            np.save(folder / "actions.npy", state[:, :2].astype(np.float32))
            for frame in range(8):
                pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "front" / f"{frame:03d}.jpg")
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `toy` and a random `siglip-prefix` make of the runs."""
    root = tmp_path_factory.mktemp("hier")
    source = f"hierarchical:{record(root / 'runs')}"
    made = {}
    for backbone, options in (("toy", {}), ("siglip-prefix", {"weights": "random"})):
        config = {"source": source, "source_options": {"fps": 50}, "backbone": backbone, **options}
        run(prepare(FeaturizeConfig.build(config)), root / backbone)
        made[backbone] = root / backbone
    return made


@pytest.fixture(scope="module")
def trained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`trained("toy", **model settings)`: a run of three steps."""

    def make(backbone: str, **model: Any) -> Path:
        values = {
            "head": "hier",
            "data": {"stores": [str(stores[backbone])], "validation": 0.3, "random_weights": True},
            "model": {"horizon": 4, "n_action": 2, **model},
            "train": {"steps": 3, "batch_size": 4, "device": "cpu"},
        }
        path = tmp_path_factory.mktemp("run")
        train_head(HeadTrainConfig.build(values), path / "run")
        return path / "run"

    return make


def observations(count: int) -> list[Observation]:
    rng = np.random.default_rng(1)
    return [
        Observation(
            {"front": rng.integers(0, 255, (32, 32, 3), np.uint8)}, rng.normal(size=3).astype(np.float32), np.zeros(1)
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("backbone", "settings"), [("toy", LIGHT), ("siglip-prefix", FULL)])
def test_hier_trains_evaluates_loads_and_acts(
    backbone: str, settings: dict[str, Any], trained: Train, stores: dict[str, Path]
) -> None:
    run_dir = trained(backbone, **settings)
    head = load_head(run_dir)
    error = evaluate_head(head)
    assert {
        "subtask_token_accuracy",
        "subtask_perplexity",
        "subtask_exact_match",
        "action_mae",
    } <= error.metrics().keys()
    assert np.isfinite(list(error.metrics().values())).all()
    other = evaluate_head(head, (str(stores[backbone]),))  # every episode, its labels by what they say
    assert other.windows == 48
    assert "subtask_exact_match" in other.metrics()
    policy = Policy(load_head(run_dir), device="cpu")
    policy.reset(seed=0, task="clear table")  # the high-level task
    actions = [policy.act(observation) for observation in observations(4)]
    assert all(action.shape == (2,) and np.isfinite(action).all() for action in actions)
    with pytest.raises(UsageError, match="not trained on 'wash'"):
        policy.reset(seed=0, task="wash")


def test_high_level_mode_is_measured_by_what_it_says_and_acts_nowhere(trained: Train) -> None:
    run_dir = trained("toy", mode="high-level", **LIGHT)
    error = evaluate_head(load_head(run_dir))
    figures = {"subtask_token_accuracy", "subtask_perplexity", "subtask_exact_match"}
    assert error.metrics().keys() == figures
    assert json.loads(json.dumps(error.to_json(), allow_nan=False))["per_dimension"] == {}
    with pytest.raises(UsageError, match="makes no actions"):
        Policy.from_run(run_dir, device="cpu")
    told = CliRunner().invoke(app, ["evaluate", str(run_dir)], catch_exceptions=False).stdout
    assert "figures over" in told
    assert all(f"{name} {value:.4g}" in told for name, value in error.extra.items())


def test_fast_ids_are_fitted_trained_on_and_loaded_again(
    stores: dict[str, Path], trained: Train, tmp_path: Path
) -> None:
    """The checkpoint knows its tokenizer by digest: another one in its place is refused."""
    data = DataConfig(stores=(str(stores["toy"]),), validation=0.3, random_weights=True)
    fit_fast(FitFastConfig(data=data, horizon=4), tmp_path / "fast")
    run_dir = trained("toy", mode="fast", fast=str(tmp_path / "fast"), **LIGHT)
    own = {"fast": str(tmp_path / "fast")}
    assert np.isfinite(evaluate_head(load_head(run_dir, settings=own)).metrics()["action_mae"])
    settings = tmp_path / "fast" / "processor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "scale": 9.5}))
    with pytest.raises(CheckpointError, match="weights of fast are not those"):
        load_head(run_dir, settings=own)


def test_fast_fitted_behind_other_statistics_is_refused_and_what_saturates_is_told(
    stores: dict[str, Path], trained: Train, tmp_path: Path
) -> None:
    """Labels were cut at the fitted range without a word."""
    data = DataConfig(stores=(str(stores["toy"]),), validation=0.3, random_weights=True)
    statistics = {"mean": [0, 0], "std": [1, 1], "q01": [-0.5, -0.5], "q99": [0.5, 0.5]}
    (tmp_path / "stats.json").write_text(json.dumps({"norm_stats": {"actions": statistics, "state": statistics}}))
    told = str(tmp_path / "stats.json")
    fit_fast(FitFastConfig(data=data, horizon=4), tmp_path / "fast")
    fit_fast(FitFastConfig(data=data, horizon=4, norm_stats=told), tmp_path / "told")
    with pytest.raises(UsageError, match=r"another normalisation: .*Try: vla fit-fast"):
        trained("toy", mode="fast", fast=str(tmp_path / "told"), **LIGHT)
    settings = tmp_path / "fast" / "processor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_token": 0}))
    run_dir = trained("toy", mode="fast", fast=str(tmp_path / "fast"), **LIGHT)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["fast_saturated"] < 1


@pytest.mark.parametrize(("interval", "said"), [(1, 5), (4, 3), (5, 2), (50, 1)])
def test_a_subtask_is_held_for_its_interval_of_steps(interval: int, said: int, trained: Train) -> None:
    """Ten steps, two actions a decision: a subtask is chosen anew with the first decision from `interval` steps on."""
    policy = Policy.from_run(_shared(trained), device="cpu")
    object.__setattr__(policy.head.config, "subtask_interval", interval)
    plans: list[torch.Tensor] = []
    plan = policy._model.plan

    def listen(batch: Any) -> torch.Tensor | None:
        plans.append(plan(batch))
        return plans[-1]

    policy._model.plan = listen  # type: ignore[method-assign, assignment]
    policy.reset(seed=0, task="set table")
    for observation in observations(10):
        policy.act(observation)
    assert len(plans) == said
    policy.reset(seed=0, task="set table")
    policy.act(observations(1)[0])
    assert len(plans) == said + 1


_RUNS: list[Path] = []


def _shared(trained: Train) -> Path:
    if not _RUNS:
        _RUNS.append(trained("toy", **LIGHT))
    return _RUNS[0]


def test_training_resumed_is_training_never_interrupted(stores: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, with labels, prompts and both losses."""

    def config(steps: int) -> HeadTrainConfig:
        data = {"stores": [str(stores["toy"])], "validation": 0.3}
        train = {"steps": steps, "batch_size": 4, "device": "cpu", "schedule": "constant", "warmup_steps": 1}
        model = {"horizon": 4, "n_action": 2, **LIGHT}
        return HeadTrainConfig.build({"head": "hier", "data": data, "model": model, "train": train})

    train_head(config(4), tmp_path / "whole")
    train_head(config(2), tmp_path / "parts")
    train_head(config(4), tmp_path / "parts", resume=True)
    whole, parts = (load_head(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_demonstrations_without_subtasks_are_refused_with_what_to_type(tmp_path: Path) -> None:
    job = prepare(FeaturizeConfig(source="synthetic:episodes=3,length=[6,9],cameras=1", backbone="toy"))
    run(job, tmp_path / "toy")
    values = {"head": "hier", "data": {"stores": [str(tmp_path / "toy")]}, "model": {"horizon": 4, "n_action": 2}}
    with pytest.raises(UsageError, match=r"needs labels.*model.mode=expert"):
        train_head(HeadTrainConfig.build(values), tmp_path / "run")
