"""A policy sees live what its head was trained on, and refuses what it was not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import load_head
from vla.heads.data import open_data
from vla.heads.evaluate import evaluate_head
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import EnvSpec, LiveImages, Observation, StepResult
from vla.rollout.evaluate import roll_out
from vla.rollout.policy import Policy
from vla.rollout.success import SuccessRate
from vla.stores.errors import FingerprintError, UsageError
from vla.stores.store import open_store

SOURCE = "synthetic:episodes=4,length=[6,9],cameras=2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy store and a head trained on it for a few steps."""
    root = tmp_path_factory.mktemp("policy")
    job = prepare(FeaturizeConfig(source=SOURCE, backbone="toy", batch_size=3))
    run(job, root / "toy")
    model = {"n_obs": 2, "horizon": 4, "n_action": 2, "encoder": {"components": 8, "dim": 32}, "hidden": 32}
    train = {"steps": 4, "batch_size": 4, "device": "cpu"}
    values = {
        "head": "mlp",
        "data": {"stores": [str(root / "toy")], "validation": 0.25},
        "model": model,
        "train": train,
    }
    train_head(HeadTrainConfig.build(values), root / "run")
    return root / "toy", root / "run"


def _task(episode: int) -> str:
    return prepare(FeaturizeConfig(source=SOURCE, backbone="toy")).source.index().episodes[episode].task


def _observations(episode: int) -> list[Observation]:
    source = prepare(FeaturizeConfig(source=SOURCE, backbone="toy")).source
    steps = source.steps(episode)
    length = len(steps["action"])
    cameras = source.index().cameras
    return [
        Observation(
            dict(zip(cameras, views, strict=True)), steps["state"][i].astype(np.float32), np.zeros(1, np.float32)
        )
        for i, views in enumerate(source.frames(episode, 0, length))
    ]


def test_features_seen_live_equal_features_cached(trained: tuple[Path, Path]) -> None:
    store, run_dir = trained
    opened = open_store(store)
    policy = Policy.from_run(run_dir, device="cpu")
    for episode in range(4):
        first = int(opened.episodes.row_start[episode])
        for frame, observation in enumerate(_observations(episode)):
            live = policy._encode([policy._remember(observation)])["grid"]
            cached = opened.read("grid", np.array([first + frame]))[0]
            assert live.dtype == torch.float16
            np.testing.assert_array_equal(live.numpy(), cached)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_features_go_live_through_the_dtype_of_the_store(tmp_path: Path, dtype: str) -> None:
    """In one unit, so that int8 has one grid: live equals cached bit for bit, and the checkpoint knows the grid."""
    stored = {"dtype": dtype, "format": "h5", "unit_rows": 1024}
    job = prepare(FeaturizeConfig.build({"source": SOURCE, "backbone": "toy", "batch_size": 3, "store": stored}))
    run(job, tmp_path / "toy")
    values = {
        "head": "mlp",
        "data": {"stores": [str(tmp_path / "toy")], "validation": 0.25},
        "model": {"horizon": 4, "n_action": 2, "encoder": {"components": 8, "dim": 32}, "hidden": 32},
        "train": {"steps": 2, "batch_size": 4, "device": "cpu"},
    }
    train_head(HeadTrainConfig.build(values), tmp_path / "run")
    policy, head = Policy.from_run(tmp_path / "run", device="cpu"), load_head(tmp_path / "run")
    cached = next(open_data(head.artefact.data).batches(np.arange(4), head.config.window, 64, pin=False).in_order())
    seen = [policy._encode([policy._remember(o)])["grid"] for episode in range(4) for o in _observations(episode)]
    assert torch.equal(torch.stack(seen), cached.feature("grid")[:, 0])
    assert (len(head.artefact.stores[0].scales) == 1) == (dtype == "int8")


def test_a_policy_decides_what_the_head_decides_on_the_stored_window(trained: tuple[Path, Path]) -> None:
    run_dir = trained[1]
    head = load_head(run_dir)
    data = open_data(head.artefact.data)
    batch = next(data.batches(np.array([1]), head.config.window, 64, pin=False).in_order())
    wanted = head.model.act(batch)
    policy = Policy(load_head(run_dir), device="cpu", n_action=1)
    policy.reset(seed=0, task=_task(1))
    for frame, observation in enumerate(_observations(1)):
        np.testing.assert_allclose(policy.act(observation), wanted[frame, 0].numpy(), atol=1e-5)


def test_a_chunk_is_executed_before_the_next_decision(trained: tuple[Path, Path]) -> None:
    policy = Policy.from_run(trained[1], device="cpu")
    policy.reset(seed=0, task=_task(0))
    for observation in _observations(0)[:5]:
        policy.act(observation)
    assert policy.latency.summary()["decisions"] == 3


def test_pictures_that_no_decision_reads_are_not_looked_at(trained: tuple[Path, Path]) -> None:
    policy = Policy.from_run(trained[1], device="cpu", n_action=3)
    policy.reset(seed=0, task=_task(0))
    drawn: list[int] = []
    for step, observation in enumerate(_observations(2)[:6]):
        images = observation.images

        def draw(camera: str, step: int = step, images: object = images) -> np.ndarray:
            drawn.append(step)
            return images[camera]  # type: ignore[index]

        live = LiveImages(tuple(observation.images), draw)
        policy.act(Observation(live, observation.state, observation.privileged))
    # n_obs 2, three actions a decision: decisions at steps 0 and 3 read frames 0, 2 and 3.
    assert sorted(set(drawn)) == [0, 2, 3, 5]


def test_a_picture_not_looked_at_is_gone_after_the_step() -> None:
    live = LiveImages(("top",), lambda camera: np.zeros((2, 2, 3), np.uint8))
    live.expire()
    with pytest.raises(UsageError, match="past"):
        live["top"]


def test_a_changed_backbone_is_refused_by_field(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    from vla.training.checkpoint import newest_complete

    folder = newest_complete(trained[1])
    shutil.copytree(folder, tmp_path / folder.name)
    head = load_head(tmp_path / folder.name)
    record = head.artefact.stores[0]
    changed = json.loads(record.model_dump_json())
    changed["fingerprint"]["backbone"]["preprocess"]["size"] = 99
    object.__setattr__(head.artefact, "stores", (type(record).build(changed),))
    with pytest.raises(FingerprintError, match=r"preprocess\.size"):
        Policy(head, device="cpu")


def test_an_instruction_of_a_held_out_episode_alone_is_refused(trained: tuple[Path, Path]) -> None:
    """Its row of the embedding is as it was drawn; evaluating on that episode stays possible."""
    head = load_head(trained[1])
    data = open_data(head.artefact.data)
    assert {_task(int(episode)) for episode in data.training} == set(head.instructions)
    held_out = _task(int(data.validation[0]))
    assert held_out in head.model.instructions
    assert evaluate_head(head).windows
    policy = Policy(head, device="cpu")
    with pytest.raises(UsageError, match="the head was not trained on"):
        policy.reset(seed=0, task=held_out)
    policy.reset(seed=0, task=head.instructions[0])


def test_a_head_of_one_task_refuses_another_unless_its_demonstrations_say_none(trained: tuple[Path, Path]) -> None:
    for only, fits in (("push the blob", False), ("", True)):
        head = load_head(trained[1])
        for kept, name in ((head.artefact.io, "tasks"), (head.model.io, "tasks"), (head.artefact, "trained_tasks")):
            object.__setattr__(kept, name, (only,))
        policy = Policy(head, device="cpu")
        policy.reset(seed=0, task=only)
        if fits:
            policy.reset(seed=0, task="open the drawer")
        else:
            with pytest.raises(UsageError, match="not trained on 'open the drawer'; expected one of push the blob"):
                policy.reset(seed=0, task="open the drawer")


class OneCameraEnv:
    """An environment that lacks the second camera."""

    spec = EnvSpec("fake:task", "follow the blob", ("camera0",), 32, 20.0, ("s",) * 4, ("a",) * 4, 3)

    def reset(self, seed: int) -> Observation:
        raise AssertionError("an episode was begun")

    def step(self, action: np.ndarray) -> StepResult:
        raise AssertionError("an episode was begun")

    def close(self) -> None: ...


def test_an_environment_without_the_cameras_is_refused_before_the_first_episode(trained: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="camera1"):
        roll_out(OneCameraEnv(), Policy.from_run(trained[1], device="cpu"), 1)


def test_more_actions_than_predicted_are_refused(trained: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="1 to 4"):
        Policy.from_run(trained[1], device="cpu", n_action=5)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.161), (20, 0.839, 1.0), (10, 0.299, 0.701)])
def test_wilson_interval_matches_the_published_values(successes: int, low: float, high: float) -> None:
    """Values for n = 20 from the closed form in Brown, Cai & DasGupta (2001)."""
    assert SuccessRate(successes, 20).interval == pytest.approx((low, high), abs=6e-4)
