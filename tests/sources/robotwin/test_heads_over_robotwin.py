"""RoboTwin to heads: tasks of different actions, padded or one model each; single arms; `spatial` from its depth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.sources.padding import joint_names, placed, real_columns
from vla.featurize.sources.registry import open_source
from vla.heads.checkpoint import load_head
from vla.heads.data import DataConfig, open_data
from vla.heads.evaluate import action_error
from vla.heads.groups import action_groups
from vla.heads.train import HeadTrainConfig
from vla.rollout.envs.base import EnvSpec, Observation
from vla.rollout.policy import Policy
from vla.stores.errors import SourceError, UsageError
from vla.stores.store import open_store

Write = Callable[..., Path]

TINY = {
    "model": {"net": "mlp", "horizon": 4, "n_action": 2, "hidden": 16, "layers": 1, "encoder": {"dim": 16}},
    "train": {"steps": 2, "batch_size": 4, "device": "cpu"},
    "data": {"validation": 0.3},
}


def call(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, (done.output, done.exception)
    return json.loads(done.stdout) if "--json" in arguments and code == 0 else done


@pytest.fixture(scope="module")
def two_arms(write_task: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of six-joint arms (14 numbers) and one of seven-joint arms (16)."""
    root = tmp_path_factory.mktemp("arms") / "all"
    for name, dims, lengths in (("lift", (6, 6), (5, 6, 5)), ("pour", (7, 7), (6, 5, 6)), ("stack", (6, 6), (5, 5))):
        write_task(root / name, dims=dims, lengths=lengths, texts=None)
    return root


@pytest.fixture(scope="module")
def padded(two_arms: Path) -> Path:
    """A store of all three tasks."""
    out = two_arms.parent / "stores"
    options = ("--set", "pad_actions=true", "--set", "options.grid=4")
    call("featurize", "--backbone", "toy", "--source", str(two_arms), "--out", str(out), "--json", *options)
    return out / "toy"


@pytest.fixture(scope="module")
def config_file(two_arms: Path) -> Path:
    file = two_arms.parent / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="module")
def unified(padded: Path, config_file: Path) -> Path:
    """Strategy B: one model over all tasks."""
    run = padded.parent / "unified"
    call("train-head", "dp", "--store", str(padded), "--out", str(run), "--config", str(config_file), "--json")
    return run


@pytest.fixture(scope="module")
def grouped(padded: Path, config_file: Path) -> Path:
    """Strategy A: one model for each set of dimensions."""
    out = padded.parent / "grouped"
    arguments = ("--store", str(padded), "--out", str(out), "--config", str(config_file), "--json")
    report = call("train-head", "dp", *arguments, "--group-by", "action-dim")
    assert report["groups"].keys() == {"dim-14", "dim-16"}
    return out


def test_columns_are_placed_by_name_so_that_a_gripper_stays_a_gripper() -> None:
    six, seven = ("j0", "j1", "grip"), ("j0", "j1", "j2", "grip")
    names = joint_names([six, seven, six, ("left",)])
    assert names == ("j0", "j1", "j2", "grip", "left")
    assert placed(np.array([[1, 2, 3]], np.float32), six, names).tolist() == [[1, 2, 0, 3, 0]]
    assert real_columns(six, names).tolist() == [True, True, False, True, False]


def test_different_actions_in_one_store_are_refused_with_the_option_that_allows_them(two_arms: Path) -> None:
    with pytest.raises(SourceError, match=r"16 numbers.*14.*--set pad_actions=true"):
        open_source(two_arms).index()


def test_a_source_that_knows_no_names_says_that_it_cannot_pad(tmp_path: Path) -> None:
    arguments = ("--backbone", "toy", "--source", "synthetic", "--out", str(tmp_path), "--set", "pad_actions=true")
    assert "no option 'pad_actions'" in str(call("featurize", *arguments, code=1).exception)


def test_a_padded_store_says_which_columns_each_episode_has(padded: Path, two_arms: Path) -> None:
    store = open_store(padded)
    names = store.manifest.steps["action"].names
    assert len(names) == 16
    assert store.manifest.steps["action_dims"].shape == (16,)
    action, dims = store.steps("action"), store.steps("action_dims")
    for episode, task in enumerate(store.episodes.ids):
        rows = slice(int(store.episodes.row_start[episode]), int(store.episodes.row_start[episode]) + 4)
        alone = open_source(two_arms / task.partition("/")[0])
        number = [e.id for e in alone.index().episodes].index(task.partition("/")[2])
        own = alone.index().steps["action"].names
        assert dims[rows].all(axis=0).tolist() == [name in own for name in names]
        np.testing.assert_array_equal(action[rows][:, dims[rows][0]], alone.steps(number)["action"][:4])
        assert (action[rows][:, ~dims[rows][0]] == 0).all()


def test_both_forms_of_padding_enter_the_fingerprint(two_arms: Path) -> None:
    padding = open_source(two_arms, pad_actions=True).index()
    plain = open_source(two_arms / "lift").index()
    assert padding.mapping["pad_actions"] == "True"
    assert "pad_actions" not in plain.mapping
    assert "action_dims" not in plain.steps


def test_one_model_over_all_tasks_knows_what_each_task_has(unified: Path) -> None:
    io = load_head(unified).artefact.io
    assert io.action_dim == 16
    assert [sum(dims) for dims in io.task_dims] == [14 if task in ("lift", "stack") else 16 for task in io.tasks]


def test_normalisation_is_per_dimension_over_the_tasks_that_have_it(unified: Path, padded: Path) -> None:
    """Zeros of padding would widen the range of a joint that only one task has: here they count for nothing."""
    head = load_head(unified)
    data = open_data(head.artefact.data)
    names = data.io.action_names
    dims = data.action_dims(data.training)
    assert dims is not None
    only = names.index("left_joint_6")
    values = data.actions(data.training)[dims[:, only], only]
    assert 0 < dims[:, only].mean() < 1
    assert values.min() > 1  # joint 6 is near 60 in the fixture: a padded 0 would show
    scale, centre = head.model.action.scale[only].item(), head.model.action.centre[only].item()
    assert (centre - scale, centre + scale) == pytest.approx((values.min(), values.max()))


def test_one_model_a_group_is_trained_on_its_own_episodes_and_columns(grouped: Path, padded: Path) -> None:
    for name, count, tasks in (("dim-14", 14, {"lift", "stack"}), ("dim-16", 16, {"pour"})):
        head = load_head(grouped / name)
        data = open_data(head.artefact.data)
        table = data.stores.first.episodes
        episodes = np.concatenate([data.training, data.validation])
        assert {table.tasks[task] for task in table.task[episodes]} == tasks
        assert data.io.action_dim == count == len(data.io.action_names)
        assert data.action_dims(data.training) is None
        batch = next(data.batches(data.training, head.config.window, 4, pin=False).in_order())
        assert batch.action is not None
        assert batch.action_dims is None
        # Each window's first action from the present on is its row's; dp's horizon begins a frame earlier.
        np.testing.assert_array_equal(batch.action[:, 1].numpy(), data.actions(data.training)[:4])
        assert (data.actions(data.training) != 0).any(axis=0).all()  # no padded column is left


def test_groups_are_evaluated_and_resumed_as_any_run(grouped: Path, padded: Path, config_file: Path) -> None:
    facts = call("evaluate", str(grouped / "dim-14"), "--json")
    assert len(facts["per_dimension"]["mae"]) == 14
    assert set(facts["per_dimension"]["mae"]) == set(load_head(grouped / "dim-14").artefact.io.action_names)
    arguments = ("--store", str(padded), "--out", str(grouped), "--config", str(config_file), "--json")
    again = call("train-head", "dp", *arguments, "--group-by", "action-dim", "--resume")
    assert {group["step"] for group in again["groups"].values()} == {2}
    refused = call("train-head", "dp", *arguments, "--group-by", "action-dim", code=1)
    assert "--resume" in str(refused.exception)


def test_the_unified_model_is_evaluated_over_real_entries_alone(unified: Path) -> None:
    facts = call("evaluate", str(unified), "--json")
    assert len(facts["per_dimension"]["mae"]) == 16
    assert np.isfinite(list(facts["per_dimension"]["mae"].values())).all()


def test_each_tasks_error_is_that_over_its_own_episodes_and_dimensions(
    unified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_head(unified)
    data = open_data(head.artefact.data)
    still = torch.zeros(1, head.config.n_action_max, 16)
    monkeypatch.setattr(head.model, "act", lambda batch, generator: still.expand(len(batch), -1, -1))
    table = data.stores.first.episodes
    together = action_error(head.model, data, np.arange(8), device=torch.device("cpu"))
    assert together.per_task.keys() == set(table.tasks)
    for number, task in enumerate(table.tasks):
        alone = action_error(head.model, data, np.flatnonzero(table.task == number), device=torch.device("cpu"))
        real = list(data.io.task_dims[number])
        assert together.per_task[task] == pytest.approx(alone.executed_mae[real].mean())
        assert (alone.executed_mae[~np.array(real)] == 0).all()


def test_equal_dimensions_make_one_group(padded: Path) -> None:
    config = HeadTrainConfig.build({"head": "dp", "data": {"stores": [str(padded)], "dims": None}})
    groups = action_groups(config)
    assert [(group.name, len(group.dims), group.episodes) for group in groups] == [("dim-16", 16, 3), ("dim-14", 14, 5)]
    assert groups[0].tasks == ("pour",)


def test_dimensions_that_no_episode_has_are_refused(padded: Path) -> None:
    with pytest.raises(UsageError, match=r"no episode of .* has the action dimensions \(0, 1\)"):
        open_data(DataConfig(stores=(str(padded),), dims=(0, 1)))


def test_an_unknown_grouping_is_refused(padded: Path, tmp_path: Path) -> None:
    arguments = ("--store", str(padded), "--out", str(tmp_path / "run"), "--group-by", "task")
    assert "expected action-dim" in str(call("train-head", "dp", *arguments, code=1).exception)


def _spec(policy: Policy, task: str, actions: int) -> EnvSpec:
    names = tuple(str(number) for number in range(actions))
    return EnvSpec("a robot", task, ("head_camera", "left_camera"), 64, 15.0, (), names, 10)


def _observation(state: int) -> Observation:
    images = {name: np.zeros((64, 64, 3), np.uint8) for name in ("head_camera", "left_camera")}
    return Observation(images, np.zeros(state, np.float32), np.zeros(0, np.float32))


def test_a_live_policy_gives_each_task_the_actions_that_its_robot_has(unified: Path) -> None:
    policy = Policy.from_run(unified, device="cpu")
    for task, count in (("lift", 14), ("pour", 16)):
        policy.check(_spec(policy, task, count))
        with pytest.raises(UsageError, match=f"takes 13 actions; expected {count}"):
            policy.check(_spec(policy, task, 13))
        policy.reset(seed=0, task=task)
        seen: list[torch.Tensor | None] = []
        act = policy._model.act

        def keep(batch: Any, seen: list[torch.Tensor | None] = seen, act: Any = act, **how: Any) -> torch.Tensor:
            seen.append(batch.action_dims)
            chunk: torch.Tensor = act(batch, **how)
            return chunk

        policy._model.act = keep  # type: ignore[method-assign]
        assert policy.act(_observation(16)).shape == (count,)
        policy._model.act = act  # type: ignore[method-assign]
        assert seen[0] is not None
        assert seen[0].sum() == count


def test_a_groups_policy_refuses_the_tasks_of_other_groups(grouped: Path) -> None:
    policy = Policy.from_run(grouped / "dim-14", device="cpu")
    policy.reset(seed=0, task="stack")
    assert policy.act(_observation(16)).shape == (14,)
    with pytest.raises(UsageError, match=r"not trained on 'pour'.*one of lift; stack"):
        policy.reset(seed=0, task="pour")


@pytest.mark.parametrize(("arms", "count"), [("left", 7), ("right", 7), ("fused", 14)])
def test_a_head_trained_on_chosen_arms_evaluates_under_their_names(
    arms: str, count: int, tmp_path: Path, write_task: Write, config_file: Path
) -> None:
    source = write_task(tmp_path / "task", lengths=(5, 6, 5))
    chosen = ("--set", f"source_options.arms={arms}", "--set", "options.grid=4")
    call("featurize", "--backbone", "toy", "--source", str(source), "--out", str(tmp_path / "stores"), *chosen)
    store, run = str(tmp_path / "stores/toy"), str(tmp_path / "run")
    call("train-head", "dp", "--store", store, "--out", run, "--config", str(config_file), "--json")
    names = list(call("evaluate", run, "--json")["per_dimension"]["mae"])
    sides = ("left", "right") if arms == "fused" else (arms,)
    assert len(names) == count
    assert names == [f"{s}_{part}" for s in sides for part in (*(f"joint_{j}" for j in range(6)), "gripper")]


def test_spatial_goes_from_depth_to_an_evaluated_head(tmp_path: Path, write_task: Write) -> None:
    """With random weights: featurize, train, evaluate, load, act on a stored window; a live policy has no depth."""
    source = write_task(tmp_path / "task", lengths=(4, 4, 5))
    out = ("--out", str(tmp_path / "stores"), "--set", "options.count=12")
    call("featurize", "--backbone", "spatial", "--weights", "random", "--source", str(source), *out)
    store, run = str(tmp_path / "stores/spatial"), str(tmp_path / "run")
    small = [("model.width", "16"), ("model.heads", "2"), ("model.layers", "1"), ("model.horizon", "4")]
    small += [
        ("train.batch_size", "4"),
        ("train.precision", "bf16"),
        ("data.validation", "0.3"),
        ("train.device", "cpu"),
    ]
    settings = [text for key, value in small for text in ("--set", f"{key}={value}")]
    arguments = ("--store", store, "--out", run, "--steps", "2", *settings)
    assert "random weights" in str(call("train-head", "spatial", *arguments, code=1).exception)
    call("train-head", "spatial", *arguments, "--set", "data.random_weights=true", "--json")
    facts = call("evaluate", run, "--json")
    assert facts["velocity_mse"] > 0
    assert len(facts["per_dimension"]["mse"]) == 14
    head = load_head(Path(run))
    assert head.model.reads == {"spatial": 1, "spatial_xyz": 1}
    data = open_data(head.artefact.data)
    batch = next(data.batches(data.training, head.config.window, 4, pin=False, reads=head.model.reads).in_order())
    assert not all(mask.all() for mask in batch.feature_valid.values())  # some tokens are padding
    assert torch.isfinite(head.model.act(batch)).all()
    with pytest.raises(UsageError, match="a live policy has only pictures"):
        Policy.from_run(Path(run), device="cpu").act(_observation(14))
