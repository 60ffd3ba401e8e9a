"""`vla inspect --source` on cameras and sensors that died in a part of a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize import check_source as module
from vla.featurize.check_pictures import difference, look_at, spans
from vla.featurize.check_source import CheckConfig, SourceReport, check_source
from vla.featurize.image import Image
from vla.featurize.sources.base import SourceIndex
from vla.featurize.sources.synthetic import SyntheticSource

Spoil = Callable[[int, int, tuple[Image, ...]], tuple[Image, ...]]
LENGTH, EPISODES = 20, 6


class Spoilt(SyntheticSource):
    """Demonstrations of two cameras whose frames, numbers and depth a test spoils."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__(episodes=EPISODES, length=(length, length), cameras=2, image_size=32, depth=True)
        self.spoil: Spoil = lambda episode, frame, views: views
        self.columns: Callable[[int, dict[str, NDArray[Any]]], None] = lambda episode, steps: None
        self.depth: Callable[[int, NDArray[Any]], NDArray[Any]] = lambda episode, depth: depth
        self.sizes: dict[str, tuple[int, int]] = {}

    def index(self) -> SourceIndex:
        return replace(super().index(), sizes=self.sizes)

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        steps = super().steps(episode)
        self.columns(episode, steps)
        return steps

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        for frame, views in zip(range(start, stop), super().frames(episode, start, stop), strict=True):
            yield self.spoil(episode, frame, views)

    def views(
        self, episode: int, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        for views in super().views(episode, start, stop, names):
            yield tuple({**view, "depth": self.depth(episode, view["depth"])} for view in views)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Spoilt:
    source = Spoilt()
    monkeypatch.setattr(module, "open_source", lambda spec, **options: source)
    return source


def check(**settings: Any) -> SourceReport:
    return check_source(CheckConfig.build({"source": "synthetic", **settings}))


def found(report: SourceReport) -> list[str]:
    return [finding.found for finding in report.findings]


def row(report: SourceReport, episode: int, camera: int) -> dict[str, Any]:
    (one,) = (
        row
        for row in report.facts["by_episode"]
        if (row["episode"], row["camera"]) == (f"episode_{episode:06d}", f"camera{camera}")
    )
    return dict(one)


def test_a_sound_data_set_has_a_row_for_each_episode_and_camera_and_no_finding(spoilt: Spoilt) -> None:
    report = check()
    assert found(report) == []
    assert len(report.facts["by_episode"]) == 2 * EPISODES
    assert row(report, 3, 1) == {
        "episode": "episode_000003",
        "camera": "camera1",
        "frames": LENGTH,
        "moving_pairs": row(report, 3, 1)["moving_pairs"],
        "size": ["32 x 32"],
        "black": 0,
        "one_colour": 0,
        "frozen": 0,
        "overexposed": 0,
        "underexposed": 0,
    }
    assert row(report, 3, 1)["moving_pairs"] > LENGTH // 2


def _with(camera: int, image: Image, views: tuple[Image, ...]) -> tuple[Image, ...]:
    return tuple(image if place == camera else view for place, view in enumerate(views))


def _noisy(level: int) -> Image:
    """A dead picture as a codec returns it: within two levels of one."""
    return np.random.default_rng(level).integers(level, level + 3, (32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("level", "fault"), [(0, "black"), (9, "black"), (90, "one_colour"), (252, "one_colour")], ids=str
)
def test_a_camera_that_is_dead_in_one_episode_is_named_with_its_share(spoilt: Spoilt, level: int, fault: str) -> None:
    spoilt.spoil = lambda episode, frame, views: _with(1, _noisy(level), views) if episode == 2 else views
    report = check()
    assert len(found(report)) == 1
    assert "episode_000002" in found(report)[0]
    assert "camera1" in found(report)[0]
    assert row(report, 2, 1)[fault] == 1
    assert row(report, 2, 0)[fault] == row(report, 1, 1)[fault] == 0


def test_a_camera_frozen_on_half_of_an_episode_while_the_robot_moves_is_found(spoilt: Spoilt) -> None:
    held = next(SyntheticSource.frames(spoilt, 4, 9, 10))[0]
    spoilt.spoil = lambda episode, frame, views: _with(0, held, views) if episode == 4 and frame >= 10 else views
    report = check()
    assert ["frozen" in line and "episode_000004" in line for line in found(report)] == [True]
    assert 0.4 < row(report, 4, 0)["frozen"] <= 0.6
    assert row(report, 4, 1)["frozen"] == 0


def test_a_still_picture_of_a_robot_that_stands_still_is_no_fault(spoilt: Spoilt) -> None:
    held = next(SyntheticSource.frames(spoilt, 4, 9, 10))

    def stand(episode: int, steps: dict[str, NDArray[Any]]) -> None:
        if episode == 4:
            steps["state"][10:] = steps["state"][9]

    spoilt.columns = stand
    spoilt.spoil = lambda episode, frame, views: held if episode == 4 and frame >= 10 else views
    assert [line for line in found(check()) if "frozen" in line] == []


@pytest.mark.parametrize(("pixels", "fault"), [((251, 255), "overexposed"), ((0, 7), "underexposed")])
def test_badly_exposed_episodes_are_found(spoilt: Spoilt, pixels: tuple[int, int], fault: str) -> None:
    def expose(episode: int, frame: int, views: tuple[Image, ...]) -> tuple[Image, ...]:
        image = np.full((32, 32, 3), 40, np.uint8)
        image[:-2] = np.random.default_rng(frame).integers(*pixels, (30, 32, 3), endpoint=True)
        return _with(1, image, views) if episode == 1 else views

    spoilt.spoil = expose
    report = check()
    assert row(report, 1, 1)[fault] == 1
    assert [line for line in found(report) if fault in line and "episode_000001" in line]


def test_two_cameras_that_show_the_same_are_found(spoilt: Spoilt) -> None:
    spoilt.spoil = lambda episode, frame, views: (views[0], views[0]) if episode in (1, 3) else views
    (line,) = found(check())
    assert all(name in line for name in ("camera0", "camera1", "same", "episode_000001", "episode_000003"))


def test_cameras_that_changed_places_in_one_episode_are_found(spoilt: Spoilt) -> None:
    def draw(episode: int, frame: int, views: tuple[Image, ...]) -> tuple[Image, ...]:
        views = (np.maximum(views[0], 160), np.minimum(views[1], 90))  # a bright room, a dark one
        return views[::-1] if episode == 5 else views

    spoilt.spoil = draw
    assert ["swapped" in line and "episode_000005" in line for line in found(check())] == [True]


@pytest.mark.parametrize("value", [0.0, np.nan, 1.5])
def test_a_dead_depth_camera_is_found(spoilt: Spoilt, value: float) -> None:
    spoilt.depth = lambda episode, depth: np.full_like(depth, value) if episode == 3 else depth
    assert ["depth" in line and "camera" in line for line in found(check())] == [True, True]


@pytest.mark.parametrize(("column", "value"), [("state", 0.25), ("state", 0.0), ("action", 0.0)])
def test_a_component_that_stands_still_in_one_episode_is_found(spoilt: Spoilt, column: str, value: float) -> None:
    def stop(episode: int, steps: dict[str, NDArray[Any]]) -> None:
        if episode == 2:
            steps[column][:, 1] = value

    spoilt.columns = stop
    (line,) = found(check(pictures=0))
    assert "episode_000002" in line
    assert column in line
    assert (" at 0" in line) == (value == 0)


def test_a_state_that_repeats_itself_for_most_of_an_episode_is_found(spoilt: Spoilt) -> None:
    def stop(episode: int, steps: dict[str, NDArray[Any]]) -> None:
        if episode == 2:
            steps["state"][6:] = steps["state"][5]

    spoilt.columns = stop
    (line,) = found(check(pictures=0))
    assert "episode_000002" in line
    assert "state" in line


def test_a_gripper_that_some_demonstrations_never_close_is_no_fault(spoilt: Spoilt) -> None:
    def hold(episode: int, steps: dict[str, NDArray[Any]]) -> None:
        if episode in (1, 3):
            steps["action"][:, 3] = 1

    spoilt.columns = hold
    assert found(check(pictures=0)) == []


def test_long_episodes_are_sampled_and_every_frame_is_read_on_request() -> None:
    chosen = [frame for start, stop in spans(1000) for frame in range(start, stop)]
    assert {0, 500, 999} <= set(chosen)
    assert 16 <= len(chosen) <= 20
    assert chosen == sorted(set(chosen))
    assert spans(1000, every=True) == [(0, 1000)]
    source = Spoilt(300)
    assert look_at(source, source.index(), 0, None, every=False).cameras["camera0"].frames < 20
    assert look_at(source, source.index(), 0, None, every=True).cameras["camera0"].frames == 300


def test_a_small_object_that_moves_is_a_difference_and_noise_is_none() -> None:
    still = np.full((128, 128, 3), 100, np.uint8)
    noisy = still + np.random.default_rng(0).integers(0, 3, still.shape).astype(np.uint8)
    moved = still.copy()
    moved[40:46, 40:46] = 200
    assert difference(still, noisy) < 2 < difference(still, moved)


def test_the_contact_sheet_shows_three_frames_of_every_camera_and_colours_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Spoilt()
    source.spoil = lambda episode, frame, views: _with(1, _noisy(0), views) if episode == 2 else views
    monkeypatch.setattr(module, "open_source", lambda spec, **options: source)
    command = ["inspect", "--source", "synthetic", "--pictures", str(tmp_path / "sheets"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    (path,) = json.loads(done.stdout)["sheets"]
    page = np.asarray(Pillow.open(path).convert("RGB")).astype(int)
    rows = np.array_split(page, EPISODES)
    red = [int(((part == (190, 30, 30)).all(axis=2)).sum()) > 200 for part in rows]
    green = [int(((part == (34, 139, 60)).all(axis=2)).sum()) > 200 for part in rows]
    assert red == [episode == 2 for episode in range(EPISODES)]
    assert green == [True] * EPISODES
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    assert "--pictures" in str(again.exception)
