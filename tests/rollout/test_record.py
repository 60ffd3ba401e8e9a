"""Recording demonstrations, on a toy environment whose expert and failures are known, and once on Meta-World."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from vla.rollout.envs.base import EnvSpec, Observation, StepResult
from vla.rollout.envs.registry import ENVS
from vla.rollout.record import STEPS_AFTER_SUCCESS, record
from vla.stores.errors import DataError, UsageError

EXECUTED: list[NDArray[np.float32]] = []
"""Every action that the toy was given since the fixture emptied the list."""
CLOSED: list[str] = []
"""The names of the toys that were closed."""


class Dumb:
    """A point on a line that moves by up to 0.5 a step; its goal is drawn from the seed. Nobody can demonstrate it.

    Seeds in `unlucky` never succeed; `broken_seed` raises in the middle of an episode.
    """

    robot_type = "point"
    licence = "CC0-1.0"
    packages = ("numpy",)
    privileged_names = ("position", "goal")
    unlucky: tuple[int, ...] = ()
    broken_seed = -1

    def __init__(self, task: str, *, cameras: tuple[str, ...] = ("front",), image_size: int = 16) -> None:
        names = (("position",), ("dx",))
        self.spec = EnvSpec(f"toy:{task}", "go to the goal", tuple(cameras), image_size, 10.0, *names, max_steps=20)

    def reset(self, seed: int) -> Observation:
        self._seed, self._steps, self._success, self._position = seed, 0, False, 0.0
        self._goal = float(np.random.default_rng(seed).uniform(1, 3))
        return self._observe()

    def step(self, action: NDArray[np.float32]) -> StepResult:
        if self._seed == self.broken_seed and self._steps == 2:
            raise KeyboardInterrupt
        EXECUTED.append(action)
        self._position += 0.5 * float(action[0])
        self._steps += 1
        self._success |= abs(self._position - self._goal) < 0.1 and self._seed not in self.unlucky
        return StepResult(self._observe(), self._success, self._steps == self.spec.max_steps)

    def close(self) -> None:
        CLOSED.append(self.spec.name)

    def _observe(self) -> Observation:
        image = np.zeros((self.spec.image_size, self.spec.image_size, 3), np.uint8)
        image[:, int(np.clip(self._position * 4, 0, 15))] = 255
        privileged = np.array([self._position, self._goal], np.float32)
        return Observation(dict.fromkeys(self.spec.cameras, image), privileged[:1].copy(), privileged)


class Toy(Dumb):
    """The same with an expert, which goes straight to the goal."""

    def expert_action(self, observation: Observation) -> NDArray[np.float32]:
        position, goal = observation.privileged
        return np.clip(np.array([2 * (goal - position)], np.float32), -1, 1)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    monkeypatch.setitem(ENVS, "toy", f"{__name__}:Toy")
    monkeypatch.setitem(ENVS, "dumb", f"{__name__}:Dumb")
    EXECUTED.clear()
    return Toy


def read_rows(root: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.schema.names}


class TestDemonstrations:
    def test_the_label_is_the_clean_expert_and_what_is_executed_is_noisy(self, tmp_path: Path) -> None:
        record("toy:line", 30, tmp_path / "set", noise=0.1)
        rows = read_rows(tmp_path / "set")
        position, goal = rows["observation.environment_state"].T
        np.testing.assert_allclose(rows["action"][:, 0], np.clip(2 * (goal - position), -1, 1), atol=1e-6)
        noise = np.concatenate(EXECUTED) - rows["action"][:, 0]
        inside = np.abs(rows["action"][:, 0]) < 0.7
        assert np.std(noise[inside]) == pytest.approx(0.1, rel=0.2)
        assert np.abs(np.concatenate(EXECUTED)).max() <= 1

    def test_without_noise_the_label_is_what_is_executed(self, tmp_path: Path) -> None:
        record("toy:line", 2, tmp_path / "set", noise=0)
        np.testing.assert_array_equal(np.stack(EXECUTED), read_rows(tmp_path / "set")["action"].astype(np.float32))

    def test_an_observation_stands_beside_the_action_chosen_on_it(self, tmp_path: Path) -> None:
        record("toy:line", 1, tmp_path / "set", noise=0)
        rows = read_rows(tmp_path / "set")
        assert rows["observation.state"][0] == 0
        np.testing.assert_allclose(np.diff(rows["observation.state"][:, 0]), 0.5 * rows["action"][:-1, 0], atol=1e-6)

    def test_three_steps_after_success_are_kept(self, tmp_path: Path) -> None:
        record("toy:line", 5, tmp_path / "set", noise=0)
        rows = read_rows(tmp_path / "set")
        position, goal = rows["observation.environment_state"].T
        for episode in range(5):
            mine = rows["episode_index"] == episode
            at_goal = np.abs(position[mine] - goal[mine]) < 0.1
            assert at_goal.sum() == STEPS_AFTER_SUCCESS == 3
            assert at_goal[-3:].all()

    def test_a_failed_episode_is_dropped_counted_and_replaced_by_the_next_seed(
        self, tmp_path: Path, toy: type[Toy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toy, "unlucky", (2_000_001, 2_000_002))
        report = record("toy:line", 3, tmp_path / "set", seed=2)
        assert report.seeds == (2_000_000, 2_000_003, 2_000_004)
        assert report.failed_seeds == (2_000_001, 2_000_002)
        facts = json.loads((tmp_path / "set/meta/recording.json").read_text())
        assert facts["environment_seeds"] == list(report.seeds)
        assert facts["failed_environment_seeds"] == list(report.failed_seeds)
        assert set(read_rows(tmp_path / "set")["episode_index"]) == {0, 1, 2}

    def test_an_expert_that_never_succeeds_is_an_error_and_not_a_loop(
        self, tmp_path: Path, toy: type[Toy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toy, "unlucky", tuple(range(100)))
        with pytest.raises(DataError, match="toy:line succeeded in 0 of 20 attempts"):
            record("toy:line", 2, tmp_path / "set")
        assert list(tmp_path.iterdir()) == []

    def test_two_recordings_with_one_seed_are_equal_byte_for_byte(
        self, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
    ) -> None:
        first = record("toy:line", 4, tmp_path / "a" / "set", seed=7)
        second = record("toy:line", 4, tmp_path / "b" / "set", seed=7)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        assert first.sha256 == second.sha256

    def test_another_seed_records_other_scenes_and_other_noise(self, tmp_path: Path) -> None:
        record("toy:line", 2, tmp_path / "a", seed=0)
        record("toy:line", 2, tmp_path / "b", seed=1)
        one, other = read_rows(tmp_path / "a"), read_rows(tmp_path / "b")
        assert set(one["observation.environment_state"][:, 1]).isdisjoint(other["observation.environment_state"][:, 1])

    def test_an_episode_does_not_depend_on_how_many_came_before(self, tmp_path: Path) -> None:
        record("toy:line", 2, tmp_path / "two")
        record("toy:line", 4, tmp_path / "four")
        two, four = read_rows(tmp_path / "two"), read_rows(tmp_path / "four")
        np.testing.assert_array_equal(two["action"], four["action"][four["episode_index"] < 2])

    @pytest.mark.sim
    def test_two_recordings_of_metaworld_give_equal_numbers_and_equal_frames(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            record("metaworld:reach-v3", 1, tmp_path / name, cameras=("corner3",), image_size=32)
        one, other = read_rows(tmp_path / "a"), read_rows(tmp_path / "b")
        for column in one:
            np.testing.assert_array_equal(one[column], other[column])
        assert one["observation.environment_state"].shape[1] == 39
        frames = []
        for name in ("a", "b"):
            file = tmp_path / name / "videos/observation.images.corner3/chunk-000/file-000.mp4"
            with av.open(str(file)) as container:
                frames.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
        np.testing.assert_array_equal(frames[0], frames[1])
        assert len(frames[0]) == len(one["index"])


class TestWhatIsThere:
    def test_existing_output_is_refused_before_anything_is_simulated(
        self, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
    ) -> None:
        record("toy:line", 2, tmp_path / "set")
        before = files_of(tmp_path)
        EXECUTED.clear()
        with pytest.raises(UsageError, match="--overwrite"):
            record("toy:line", 1, tmp_path / "set")
        assert EXECUTED == []
        assert files_of(tmp_path) == before
        assert record("toy:line", 1, tmp_path / "set", overwrite=True).episodes == 1

    def test_an_interrupted_recording_keeps_what_was_there_and_leaves_nothing_else(
        self,
        tmp_path: Path,
        toy: type[Toy],
        monkeypatch: pytest.MonkeyPatch,
        files_of: Callable[[Path], dict[str, bytes]],
    ) -> None:
        record("toy:line", 1, tmp_path / "set")
        before = files_of(tmp_path)
        monkeypatch.setattr(toy, "broken_seed", 2)
        CLOSED.clear()
        with pytest.raises(KeyboardInterrupt):
            record("toy:line", 5, tmp_path / "set", overwrite=True)
        assert files_of(tmp_path) == before
        assert CLOSED == ["toy:line"], "the environment is closed too"

    def test_progress_counts_kept_episodes(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        record("toy:line", 3, tmp_path / "set", progress=lambda done, total: calls.append((done, total)))
        assert calls == [(1, 3), (2, 3), (3, 3)]

    def test_the_report_is_what_is_on_disk(self, tmp_path: Path) -> None:
        report = record("toy:line", 3, tmp_path / "set")
        root = tmp_path / "set"
        assert report.frames == len(read_rows(root)["index"])
        names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.parent != root)
        listing = "".join(f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
        assert report.sha256 == hashlib.sha256(listing.encode()).hexdigest()
        assert json.loads(json.dumps(report.to_json()))["environment"] == "toy:line"

    def test_the_readme_gives_the_command_the_licence_and_the_digest(self, tmp_path: Path) -> None:
        report = record("toy:line", 3, tmp_path / "set", seed=4, noise=0.2)
        text = (tmp_path / "set" / "README.md").read_text()
        assert "    vla record toy --task line --episodes 3 --out set --seed 4 --noise 0.2\n" in text
        assert text.startswith("---\nlicense: cc0-1.0\n")
        assert report.sha256 in text
        assert f"{report.frames} frames" in text
        assert str(tmp_path) not in text, "a README that ships must not show somebody's folders"

    def test_cameras_and_size_reach_the_environment(self, tmp_path: Path) -> None:
        record("toy:line", 1, tmp_path / "set", cameras=("left", "right"), image_size=24)
        features = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]
        assert features["observation.images.right"]["shape"] == [24, 24, 3]
        assert features["observation.environment_state"]["privileged"] is True
        command = "vla record toy --task line --episodes 1 --out set --camera left --camera right --image-size 24\n"
        assert command in (tmp_path / "set" / "README.md").read_text()


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"episodes": 0}, "0 episodes; expected at least 1"),
            ({"noise": -0.1}, "noise -0.1"),
            ({"noise": float("nan")}, "noise nan"),
            ({"seed": -1}, "seed -1"),
        ],
    )
    def test_values_that_make_no_sense_are_refused(
        self, tmp_path: Path, arguments: dict[str, Any], message: str
    ) -> None:
        values: dict[str, Any] = {"env_name": "toy:line", "episodes": 1, "out": tmp_path / "set"} | arguments
        with pytest.raises(UsageError, match=message):
            record(**values)

    def test_an_environment_without_an_expert_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="dumb:line has no scripted expert"):
            record("dumb:line", 1, tmp_path / "set")
        assert list(tmp_path.iterdir()) == []
