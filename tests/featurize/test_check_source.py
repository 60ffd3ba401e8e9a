"""`vla inspect --source`: every fault of a raw data set is listed, whatever its layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize import check_source as module
from vla.featurize.check_source import CheckConfig, SourceReport, check_source
from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, SourceIndex
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.errors import SourceError, UsageError


class Faulty(SyntheticSource):
    """A sound source with faults put in by the tests."""

    def __init__(self) -> None:
        super().__init__(episodes=4, length=(5, 5), cameras=2, image_size=16)
        self.changed_index: dict[str, Any] = {}
        self.changed_steps: dict[tuple[int, str], NDArray[Any]] = {}
        self.changed_frames: dict[tuple[int, int], tuple[Image, ...] | None] = {}

    def index(self) -> SourceIndex:
        return replace(super().index(), **self.changed_index)

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        changed = {name: values for (number, name), values in self.changed_steps.items() if number == episode}
        return super().steps(episode) | changed

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        for frame, views in zip(range(start, stop), super().frames(episode, start, stop), strict=True):
            changed = self.changed_frames.get((episode, frame), views)
            if changed is None:
                raise SourceError(f"episode {episode}, frame {frame} cannot be decoded")
            yield changed


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    source = Faulty()
    monkeypatch.setattr(module, "open_source", lambda spec, **options: source)
    return source


def check(**settings: Any) -> SourceReport:
    return check_source(CheckConfig.build({"source": "synthetic", **settings}))


def found(report: SourceReport) -> list[str]:
    return [f"{finding.check}: {finding.found}" for finding in report.findings]


def test_a_sound_source_has_no_findings_and_its_facts_are_stated(faulty: Faulty) -> None:
    report = check()
    assert found(report) == []
    facts = json.loads(json.dumps(report.to_json()))
    assert (facts["episodes"], facts["frames"], facts["length"]) == (4, 20, {"min": 5, "median": 5.0, "max": 5})
    assert facts["pictures"] == {"camera0": ["16 x 16"], "camera1": ["16 x 16"]}
    actions = np.concatenate([faulty.steps(number)["action"] for number in range(4)]).astype(np.float64)
    for i, row in enumerate(facts["statistics"]["action"]):
        assert row["name"] == faulty.index().steps["action"].names[i]
        values = actions[:, i]
        wanted = [values.min(), values.max(), values.mean(), values.std(), *np.quantile(values, (0.01, 0.99))]
        assert [row[key] for key in ("min", "max", "mean", "std", "q01", "q99")] == pytest.approx(wanted)


def test_every_fault_is_listed_not_only_the_first(faulty: Faulty) -> None:
    bad = np.zeros((5, 4), np.float32)
    bad[2:4, 1] = np.nan
    faulty.changed_steps = {(1, "action"): bad, (2, "state"): np.zeros((4, 4), np.float32)}
    faulty.changed_frames = {(3, 4): None}
    faulty.changed_index = {"skipped": {"episode_000009": "its video is missing"}}
    assert found(check()) == [
        "episode: episode_000009: its video is missing",
        "steps: episode_000001: action is NaN or infinite in row 2 and 1 more",
        "steps: episode_000002: state has shape (4, 4); expected (5, 4)",
        "picture: episode_000003, frame 4: episode 3, frame 4 cannot be decoded",
    ]


def test_what_the_index_says_is_checked(faulty: Faulty) -> None:
    episodes = (Episode("a", 5, ""), Episode("a", 5, " "), Episode("c", 1, "go"), Episode("d", 5, "go"))
    faulty.changed_index = {"episodes": episodes, "cameras": ("top", "top"), "fps": 0.0}
    listed = found(check(pictures=0))
    assert [line for line in listed if not line.startswith("steps")] == [
        "layout: 0.0 frames a second; expected more than 0",
        "layout: camera 'top' is there 2 times",
        "layout: episode 'a' is there 2 times",
        "instruction: 2 of 4 episodes have no instruction",
        "length: c has 1 frames; expected 2 or more",
    ]


def test_pictures_of_several_sizes_types_or_one_colour_are_found(faulty: Faulty) -> None:
    plain = {
        (episode, frame): (np.zeros((16, 16, 3), np.uint8), views[1])
        for episode in range(4)
        for frame, views in enumerate(SyntheticSource.frames(faulty, episode, 0, 5))
    }
    large, deep = np.full((20, 16, 3), 7, np.uint8), np.ones((16, 16, 3), np.float32)
    faulty.changed_frames = {**plain, (0, 0): (plain[0, 0][0], large), (1, 0): (plain[1, 0][0], deep)}
    assert found(check()) == [
        "picture: episode_000001, frame 0, camera1: float32 (16, 16, 3)",
        "picture: camera1 has pictures of several sizes: 16 x 20 (1), 16 x 16 (18); expected one",
        "picture: camera0 is black in every episode, in 100% or more of the frames looked at",
    ]


def test_a_missing_view_is_found(faulty: Faulty) -> None:
    faulty.changed_frames = {(2, 0): (np.zeros((16, 16, 3), np.uint8),)}
    assert found(check()) == ["picture: episode_000002, frame 0: 1 of 2 cameras"]


def test_an_action_that_never_changes_is_found(faulty: Faulty) -> None:
    faulty.changed_steps = {(number, "action"): np.ones((5, 4), np.float32) for number in range(4)}
    assert found(check()) == ["steps: the action is the same in every frame"]


def test_a_layout_that_cannot_be_indexed_is_one_finding(tmp_path: Path) -> None:
    (tmp_path / "broken.hdf5").write_bytes(b"not HDF5")
    report = check(source=str(tmp_path / "broken.hdf5"))
    assert [finding.check for finding in report.findings] == ["layout"]
    assert "does not read" in report.findings[0].found


def test_every_bad_episode_of_a_file_is_listed_without_a_flag(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(
            {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}
        )
        for number in range(4):
            file[f"data/demo_{number}/actions"] = np.full((3, 7), np.nan if number in (1, 2) else number)
            pixels = np.random.default_rng(number).integers(0, 256, (3, 8, 8, 3), np.uint8)
            file[f"data/demo_{number}/obs/agentview_image"] = pixels
    report = check(source=str(tmp_path / "demo.hdf5"))
    assert [(finding.check, finding.found.partition(":")[0]) for finding in report.findings] == [
        ("episode", "demo_1"),
        ("episode", "demo_2"),
    ]
    assert (report.facts["episodes"], report.facts["bad_episodes"]) == (2, 2)


def test_a_wrong_flag_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option 'camera', did you mean 'cameras'"):
        check(source_options={"camera": 3})
    with pytest.raises(SourceError, match="does not exist"):
        check(source=str(tmp_path / "nowhere"))
