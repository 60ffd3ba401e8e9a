"""A policy sees live what its head was trained on, and refuses what it was not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
from vla.stores.errors import DataError, FingerprintError, UsageError
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_live_state_that_is_not_finite_is_refused_by_column(trained: tuple[Path, Path], value: float) -> None:
    policy, seen = Policy.from_run(trained[1], device="cpu", n_action=1), _observations(0)
    state = seen[1].state.copy()
    state[1] = value
    policy.reset(seed=0, task=_task(0))
    policy.act(seen[0])
    with pytest.raises(DataError, match=rf"column {re.escape(policy._io.state_names[1])} is \S+, {value:g}"):
        policy.act(Observation(seen[1].images, state, seen[1].privileged))


def test_actions_that_are_not_finite_reach_nobody(trained: tuple[Path, Path]) -> None:
    policy = Policy.from_run(trained[1], device="cpu")
    with torch.no_grad():
        next(policy._model.parameters()).fill_(torch.nan)
    policy.reset(seed=0, task=_task(0))
    with pytest.raises(DataError, match="actions that are not finite"):
        policy.act(_observations(0)[0])


def test_a_state_that_no_environment_tells_is_refused_before_anything_is_played(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    values = {
        "head": "mlp",
        "data": {"stores": [str(trained[0])], "validation": 0.25, "state": ["state", "timestamp"]},
        "model": {"horizon": 4, "n_action": 2, "encoder": {"components": 8, "dim": 32}, "hidden": 32},
        "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
    }
    train_head(HeadTrainConfig.build(values), tmp_path / "run")
    with pytest.raises(UsageError, match=r"reads the step column timestamp.*state and privileged"):
        Policy.from_run(tmp_path / "run", device="cpu")


class UnplayedEnv(OneCameraEnv):
    """An environment of any kind, whose episodes are never begun."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec


def test_what_cannot_be_filmed_or_counted_is_refused_before_the_first_episode(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    policy = Policy.from_run(trained[1], device="cpu")
    env = UnplayedEnv(_env_spec(policy, 32, 10.0))
    with pytest.raises(UsageError, match=r"--video .*v\.xyz; expected a file \.mp4"):
        roll_out(env, policy, 1, video=tmp_path / "v.xyz")
    for episodes in (0, -3):
        with pytest.raises(UsageError, match=f"{episodes} episodes; expected at least 1"):
            roll_out(env, policy, episodes)
    policy._backbones = []  # as of a head that reads the state alone
    with pytest.raises(UsageError, match="fake:task has no camera to film with"):
        roll_out(UnplayedEnv(replace(env.spec, cameras=())), policy, 1, video=tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "v.mp4").write_text("mine")
    with pytest.raises(UsageError, match=r"v\.mp4 exists\. Try: --overwrite"):
        roll_out(env, Policy.from_run(trained[1], device="cpu"), 1, video=tmp_path / "v.mp4")


def _env_spec(policy: Policy, image_size: int, fps: float) -> EnvSpec:
    names = tuple(f"a{number}" for number in range(policy._io.action_dim))
    return EnvSpec("fake:task", _task(0), policy.env_options()["cameras"], image_size, fps, ("s",) * 4, names, 3)


def test_an_environment_draws_what_the_demonstrations_were_recorded_with(trained: tuple[Path, Path]) -> None:
    """The synthetic source: two cameras, 32 px, 10 steps a second."""
    policy = Policy.from_run(trained[1], device="cpu")
    assert policy.env_options() == {"cameras": ("camera0", "camera1"), "image_size": 32, "fps": 10.0}
    policy.check(_env_spec(policy, 32, 10.0))
    with pytest.raises(UsageError, match="pictures of 64 x 64; expected 32 x 32, as camera0 in the demonstrations"):
        policy.check(_env_spec(policy, 64, 10.0))
    with pytest.raises(UsageError, match="20 steps a second; expected 10"):
        policy.check(_env_spec(policy, 32, 20.0))


def test_pictures_that_are_no_squares_are_asked_of_no_environment(trained: tuple[Path, Path]) -> None:
    head = load_head(trained[1])
    sizes = {"camera0": (24, 32), "camera1": (24, 32)}
    records = tuple(record.model_copy(update={"picture_sizes": sizes}) for record in head.artefact.stores)
    object.__setattr__(head.artefact, "stores", records)
    policy = Policy(head, device="cpu")
    assert "image_size" not in policy.env_options()
    with pytest.raises(UsageError, match="pictures of 32 x 32; expected 32 x 24"):
        policy.check(_env_spec(policy, 32, 10.0))


def test_a_checkpoint_that_knows_no_sizes_acts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """One that was made before stores and checkpoints kept them."""
    policy = Policy.from_run(Path(__file__).parents[1] / "golden" / "schema-1" / "head", device="cpu")
    assert policy.env_options().keys() == {"cameras"}
    names = policy._io.action_names
    policy.check(EnvSpec("fake:task", "", policy.env_options()["cameras"], 64, 20.0, (), names, 3))
    assert "how large the demonstrations' pictures were is not known: 64 px are drawn" in caplog.text


@pytest.mark.parametrize("n_action", [0, 5])
def test_no_action_and_more_than_predicted_are_refused(trained: tuple[Path, Path], n_action: int) -> None:
    with pytest.raises(UsageError, match=f"{n_action} actions a decision; expected 1 to 4"):
        Policy.from_run(trained[1], device="cpu", n_action=n_action)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.161), (20, 0.839, 1.0), (10, 0.299, 0.701)])
def test_wilson_interval_matches_the_published_values(successes: int, low: float, high: float) -> None:
    """Values for n = 20 from the closed form in Brown, Cai & DasGupta (2001)."""
    assert SuccessRate(successes, 20).interval == pytest.approx((low, high), abs=6e-4)
