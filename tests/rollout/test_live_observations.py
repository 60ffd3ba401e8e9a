"""A live policy refuses observations that its training never showed, and names what differs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import load_head
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import DataError

SOURCE = "synthetic:episodes=3,length=[5,6],cameras=2,image_size=32"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a head on pictures of 32 x 32 from two cameras and a state of 4 columns."""
    root = tmp_path_factory.mktemp("live")
    run(prepare(FeaturizeConfig(source=SOURCE, backbone="toy")), root / "toy")
    model = {"n_obs": 2, "horizon": 3, "n_action": 1, "encoder": {"dim": 8, "queries": 2}, "hidden": 8}
    train = {"steps": 1, "batch_size": 4, "device": "cpu"}
    values = {"head": "mlp", "data": {"stores": [str(root / "toy")]}, "model": model, "train": train}
    train_head(HeadTrainConfig.build(values), root / "run")
    return root / "run"


def picture(height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


def observation(**changes: Any) -> Observation:
    images = {"camera0": picture(), "camera1": picture()}
    return replace(Observation(images, np.zeros(4, np.float32), np.zeros(1, np.float32)), **changes)


@pytest.mark.parametrize(
    "other",
    [picture(64, 32), picture(32, 31), picture().astype(np.float32), picture()[..., :1], picture()[..., 0], None],
    ids=["taller", "narrower", "float", "grey", "flat", "nothing"],
)
def test_a_picture_unlike_those_of_the_demonstrations_is_refused_by_camera(other: Any, trained: Path) -> None:
    policy = Policy.from_run(trained, device="cpu")
    policy.act(observation())
    with pytest.raises(DataError, match="camera1") as refused:
        policy.act(observation(images={"camera0": picture(), "camera1": other}))
    assert "32 x 32" in refused.value.expected


@pytest.mark.parametrize("images", [{"camera0": picture(), "wrist": picture()}, {}])
def test_a_missing_camera_is_named_beside_those_found_and_expected(
    images: Mapping[str, NDArray[np.uint8]], trained: Path
) -> None:
    with pytest.raises(DataError, match="camera1") as refused:
        Policy.from_run(trained, device="cpu").act(observation(images=images))
    assert all(name in refused.value.expected for name in ("camera0", "camera1"))
    assert all(name in refused.value.found for name in images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float, trained: Path) -> None:
    with pytest.raises(DataError, match=r"state\.2"):
        Policy.from_run(trained, device="cpu").act(observation(state=np.array([0, 0, value, 0], np.float32)))


def test_a_state_far_outside_the_training_s_is_warned_of_once_by_column_and_range(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.from_run(trained, device="cpu")
    far = observation(state=np.array([0, 1e9, 0, 0], np.float32))
    with caplog.at_level(logging.WARNING):
        policy.act(far)
        policy.act(far)
        policy.reset(seed=1, task=policy.head.instructions[0])
        policy.act(far)
    low, high = load_head(trained).artefact.state_range[1]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "state.1" in message
    assert f"{low:g}" in message
    assert f"{high:g}" in message


def test_a_state_within_the_training_s_passes_in_silence(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy.from_run(trained, device="cpu", far_state="refuse")
    lows, highs = np.array(load_head(trained).artefact.state_range, np.float32).T
    for state in (lows, highs, lows - (highs - lows) / 2):
        policy.act(observation(state=state))
    assert not caplog.records


def test_a_state_far_outside_is_refused_by_a_setting(trained: Path) -> None:
    policy = Policy.from_run(str(trained), device="cpu", far_state="refuse")
    with pytest.raises(DataError, match=r"state\.3"):
        policy.act(observation(state=np.array([0, 0, 0, -1e9], np.float32)))


def test_a_checkpoint_without_ranges_judges_by_its_normaliser(trained: Path) -> None:
    head = load_head(trained)
    older = replace(head, artefact=head.artefact.model_copy(update={"state_range": ()}))
    policy = Policy(older, device="cpu", far_state="refuse")
    policy.act(observation())
    with pytest.raises(DataError, match=r"state\.0"):
        policy.act(observation(state=np.array([1e9, 0, 0, 0], np.float32)))
