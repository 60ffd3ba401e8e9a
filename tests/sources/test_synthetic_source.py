from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.sources.base import Source
from vla.featurize.sources.synthetic import REACH, SyntheticSource
from vla.stores.errors import SourceError


def blob_place(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return where the blob is, (x, y) in [-1, 1]: the centre of the brightest pixels."""
    bright = image.astype(np.float64).max(axis=2)
    weight = np.clip(bright - 0.8 * bright.max(), 0, None)
    axis = (np.arange(len(weight)) + 0.5) / len(weight) * 2 - 1
    return np.array([(weight.sum(0) * axis).sum(), (weight.sum(1) * axis).sum()]) / weight.sum()


def test_the_pictures_show_the_action() -> None:
    source: Source = SyntheticSource(episodes=5, image_size=32)
    for number, episode in enumerate(source.index().episodes):
        actions = source.steps(number)["action"]
        for action, views in zip(actions, source.frames(number, 0, episode.length), strict=True):
            seen = np.concatenate([blob_place(view) for view in views])
            np.testing.assert_allclose(seen, action, atol=0.08)


def test_the_state_alone_does_not_give_the_action() -> None:
    """A linear fit from the state leaves at least half of the action's variance, one from the places none."""
    source = SyntheticSource(episodes=60)
    steps = [source.steps(number) for number in range(60)]
    state, action = (np.concatenate([s[name] for s in steps]) for name in ("state", "action"))
    inputs = np.column_stack([state, np.ones(len(state))])
    rest = action - inputs @ np.linalg.lstsq(inputs, action, rcond=None)[0]
    assert rest.var() / action.var() > 0.5


@pytest.mark.parametrize(("cameras", "size", "action_dim", "state_dim"), [(1, 16, 1, 2), (3, 24, 14, 7), (2, 32, 4, 4)])
def test_shapes_follow_the_settings(cameras: int, size: int, action_dim: int, state_dim: int) -> None:
    source = SyntheticSource(
        episodes=3, length=(4, 6), cameras=cameras, image_size=size, action_dim=action_dim, state_dim=state_dim
    )
    index = source.index()
    assert len(index.cameras) == cameras
    assert len(set(index.steps["action"].names)) == action_dim or action_dim > 4 * cameras
    for number, episode in enumerate(index.episodes):
        assert 4 <= episode.length <= 6
        steps = source.steps(number)
        assert {name: (a.shape, a.dtype.name) for name, a in steps.items()} == {
            name: ((episode.length, *spec.shape), spec.dtype) for name, spec in index.steps.items()
        }
        frames = list(source.frames(number, 0, episode.length))
        assert len(frames) == episode.length
        assert {(view.shape, view.dtype.name) for views in frames for view in views} == {((size, size, 3), "uint8")}
        assert {len(views) for views in frames} == {cameras}


def test_actions_and_states_stay_within_reach() -> None:
    source = SyntheticSource(episodes=20, length=(40, 40))
    for number in range(20):
        steps = source.steps(number)
        assert np.abs(steps["action"]).max() <= REACH + 1e-6
        assert np.abs(steps["state"]).max() <= REACH + 1e-6


def test_two_sources_with_one_seed_are_equal_and_others_differ() -> None:
    first, again, other = SyntheticSource(seed=1), SyntheticSource(seed=1), SyntheticSource(seed=2)
    assert first.index() == again.index()
    assert first.digest() == again.digest() != other.digest()
    np.testing.assert_array_equal(first.steps(2)["action"], again.steps(2)["action"])
    assert not np.array_equal(first.steps(2)["action"][:8], other.steps(2)["action"][:8])
    pairs = zip(first.frames(2, 0, 8), again.frames(2, 0, 8), strict=True)
    assert all(np.array_equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def test_frames_are_the_same_whatever_part_is_asked_for() -> None:
    source = SyntheticSource(length=(10, 10))
    whole = list(source.frames(3, 0, 10))
    part = list(source.frames(3, 4, 7))
    assert all(np.array_equal(a, b) for x, y in zip(whole[4:7], part, strict=True) for a, b in zip(x, y, strict=True))


def test_episodes_differ() -> None:
    source = SyntheticSource(length=(8, 8))
    assert len({source.steps(number)["action"].tobytes() for number in range(6)}) == 6
    assert len({episode.task for episode in source.index().episodes}) == 3


@pytest.mark.parametrize(
    "change",
    [{"episodes": 7}, {"length": (8, 21)}, {"cameras": 1}, {"image_size": 16}, {"action_dim": 5}, {"state_dim": 5}],
)
def test_the_digest_covers_every_setting(change: dict[str, int]) -> None:
    assert SyntheticSource(**change).digest() != SyntheticSource().digest()  # type: ignore[arg-type]


def test_frames_outside_the_episode_are_refused() -> None:
    with pytest.raises(SourceError, match="expected 0 to 8"):
        SyntheticSource(length=(8, 8)).frames(0, 2, 9)
