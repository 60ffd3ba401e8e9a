"""Both LeRobot layouts give the same episodes, and every picture is the one asked for: it says so itself."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType

import numpy as np
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.featurize.sources.registry import open_source
from vla.stores.errors import SourceError

Seen = list[tuple[tuple[int, int, int], ...]]

LENGTHS = (9, 1, 14, 30)
PUSH = Path(__file__).parents[2] / "examples/push"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lerobot_maker", Path(__file__).with_name("lerobot_maker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(**what)` is a data set shared by the tests of this file, which do not change it."""
    kept: dict[str, Path] = {}

    def make(**what: object) -> Path:
        key = repr(sorted(what.items()))
        if key not in kept:
            kept[key] = maker.make(tmp_path_factory.mktemp("set"), **{"lengths": LENGTHS, **what})
        return kept[key]

    return make


def seen(maker: ModuleType, source: LeRobotSource, episode: int, start: int, stop: int) -> Seen:
    return [tuple(maker.read(image) for image in images) for images in source.frames(episode, start, stop)]


def wanted(episode: int, start: int, stop: int, views: tuple[int, ...] = (0, 1)) -> Seen:
    return [tuple((episode, frame, view) for view in views) for frame in range(start, stop)]


@pytest.mark.parametrize("stored", ["video", "image"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_data_set_is_indexed_as_it_was_made(version: str, stored: str, made: Callable[..., Path]) -> None:
    index = LeRobotSource(made(version=version, stored=stored)).index()
    assert (index.kind, index.fps, index.cameras) == (f"lerobot-{version}", 10.0, ("front", "wrist"))
    assert [(e.id, e.length, e.task) for e in index.episodes] == [
        (f"episode_{number:06d}", length, f"task {number % 2}") for number, length in enumerate(LENGTHS)
    ]
    assert {name: (s.shape, s.dtype, s.role) for name, s in index.steps.items()} == {
        "action": ((3,), "float32", "action"),
        "state": ((2,), "float32", "state"),
        "timestamp": ((), "float64", "other"),
        "frame_index": ((), "int64", "other"),
    }
    assert index.steps["action"].names == ("x", "y", "z")
    assert index.skipped == {}


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_the_steps_are_those_written(version: str, maker: ModuleType, made: Callable[..., Path]) -> None:
    source = LeRobotSource(made(version=version))
    for episode, length in enumerate(LENGTHS):
        steps = source.steps(episode)
        np.testing.assert_array_equal(steps["action"], maker.action_of(episode, length))
        np.testing.assert_array_equal(steps["state"], maker.state_of(episode, length))
        np.testing.assert_array_equal(steps["frame_index"], np.arange(length))
        np.testing.assert_allclose(steps["timestamp"], np.arange(length) / 10, atol=1e-6)


@pytest.mark.parametrize("codec", ["h264-gop2", "h264-long-gop", "av1"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_whole_middle_and_single_reads_give_exactly_the_frames_named(
    version: str, codec: str, maker: ModuleType, made: Callable[..., Path]
) -> None:
    if not maker.has_encoder(codec):
        pytest.skip(f"this PyAV has no encoder for {codec}")
    source = LeRobotSource(made(version=version, codec=codec))
    for episode, length in enumerate(LENGTHS):
        assert seen(maker, source, episode, 0, length) == wanted(episode, 0, length)
        third = length // 3
        assert seen(maker, source, episode, third, length - third) == wanted(episode, third, length - third)
        for frame in {0, 1, length // 2, length - 1} & set(range(length)):
            assert seen(maker, source, episode, frame, frame + 1) == wanted(episode, frame, frame + 1)


def test_every_single_frame_of_a_long_gop_is_found_in_any_order(maker: ModuleType, made: Callable[..., Path]) -> None:
    source = LeRobotSource(made(codec="h264-long-gop"))
    for frame in np.random.default_rng(0).permutation(LENGTHS[3]).tolist():
        assert seen(maker, source, 3, frame, frame + 1) == wanted(3, frame, frame + 1)


@pytest.mark.parametrize("per_file", [1, 2, 3])
def test_episodes_spread_over_files_are_found(per_file: int, maker: ModuleType, tmp_path: Path) -> None:
    lengths = (4, 6, 3, 5, 2)
    source = LeRobotSource(maker.make(tmp_path, lengths=lengths, per_file=per_file))
    for episode in (4, 0, 2, 1, 3):
        assert seen(maker, source, episode, 0, lengths[episode]) == wanted(episode, 0, lengths[episode])
        np.testing.assert_array_equal(source.steps(episode)["action"], maker.action_of(episode, lengths[episode]))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_pictures_in_parquet_are_the_frames_named_and_lossless(
    version: str, maker: ModuleType, made: Callable[..., Path]
) -> None:
    source = LeRobotSource(made(version=version, stored="image"))
    for episode, length in enumerate(LENGTHS):
        assert seen(maker, source, episode, 0, length) == wanted(episode, 0, length)
    images = next(source.frames(2, 5, 6))
    np.testing.assert_array_equal(images[1], maker.draw(2, 5, 1))


@pytest.mark.parametrize(
    ("cameras", "views"),
    [
        (["wrist"], (1,)),
        (["wrist", "front"], (1, 0)),
        (["observation.images.wrist", "front"], (1, 0)),
        (["front", "wrist"], (0, 1)),
    ],
)
def test_cameras_are_chosen_and_ordered_by_short_or_full_name(
    cameras: list[str], views: tuple[int, ...], maker: ModuleType, made: Callable[..., Path]
) -> None:
    source = LeRobotSource(made(), cameras=cameras)
    assert source.index().cameras == tuple(("front", "wrist")[view] for view in views)
    assert seen(maker, source, 2, 3, 6) == wanted(2, 3, 6, views)


def test_a_camera_that_is_not_there_is_answered_with_the_nearest(made: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match=r"no camera 'wirst'.*'wrist'.*some of front, wrist"):
        LeRobotSource(made(), cameras=["wirst"]).index()


def test_a_camera_is_renamed_by_the_map(maker: ModuleType, made: Callable[..., Path]) -> None:
    source = LeRobotSource(made(), map={"gripper": "observation.images.wrist"}, cameras=["gripper", "front"])
    assert source.index().cameras == ("gripper", "front")
    assert source.index().mapping["gripper"] == "observation.images.wrist"
    assert seen(maker, source, 0, 0, 9) == wanted(0, 0, 9, (1, 0))


def test_foreign_names_are_refused_with_the_map_that_reads_them(maker: ModuleType, tmp_path: Path) -> None:
    root = maker.make(tmp_path, names=("actions", "state"))
    with pytest.raises(SourceError) as caught:
        LeRobotSource(root).index()
    assert caught.value.fix == "--map action=actions --map state=state"
    assert "--map action=actions" in str(caught.value)
    assert "actions (float32)" in str(caught.value)
    proposed = dict(pair.split("=") for pair in caught.value.fix.split()[1::2])
    steps = LeRobotSource(root, map=proposed).steps(1)
    np.testing.assert_array_equal(steps["action"], maker.action_of(1, 7))
    np.testing.assert_array_equal(steps["state"], maker.state_of(1, 7))


@pytest.mark.parametrize(
    ("column", "map"), [("observation.environment_state", {}), ("object_pose", {"privileged": "object_pose"})]
)
def test_simulator_truth_is_privileged_and_never_the_state(
    column: str, map: dict[str, str], maker: ModuleType, tmp_path: Path
) -> None:
    source = LeRobotSource(maker.make(tmp_path, truth=column), map=map)
    assert {name: spec.role for name, spec in source.index().steps.items()}["privileged"] == "privileged"
    assert source.index().steps["state"].role == "state"
    np.testing.assert_array_equal(source.steps(0)["privileged"], 100 + maker.action_of(0, 5))
    np.testing.assert_array_equal(source.steps(0)["state"], maker.state_of(0, 5))


@pytest.mark.parametrize("stored", ["video", "image"])
def test_two_threads_in_one_episode_see_the_same_pictures(
    stored: str, maker: ModuleType, made: Callable[..., Path]
) -> None:
    source = LeRobotSource(made(stored=stored, codec="h264-long-gop"))
    together = Barrier(2)

    def look(_: int) -> Seen:
        together.wait(timeout=10)
        return seen(maker, source, 3, 0, 30)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(look, range(2))
    assert first == second == wanted(3, 0, 30)


@pytest.mark.parametrize(
    "file",
    [
        "meta/info.json",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "videos/observation.images.front/chunk-000/file-000.mp4",
    ],
)
def test_the_digest_follows_every_file_that_is_used(
    file: str, maker: ModuleType, made: Callable[..., Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made(), tmp_path / "copy"))
    before = LeRobotSource(root).digest()
    assert before == LeRobotSource(made()).digest()
    if file.startswith("data/"):
        maker.edit_rows(root / file, "action", lambda rows: [[0.5, 0.5, 0.5], *rows[1:]])
    elif file.endswith(".parquet"):
        maker.edit_rows(root / file, "tasks", lambda rows: [["another task"], *rows[1:]])
    elif file.endswith(".json"):
        maker.edit_info(root, robot_type="another")
    else:
        content = bytearray((root / file).read_bytes())
        content[-1] ^= 1
        (root / file).write_bytes(content)
    assert LeRobotSource(root).digest() != before


def test_the_digest_ignores_files_that_are_not_used(made: Callable[..., Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(made(), tmp_path / "copy"))
    before = LeRobotSource(root, cameras=["front"]).digest()
    (root / "notes.txt").write_text("nothing to do with it")
    (root / "videos/observation.images.wrist/chunk-000/file-000.mp4").write_bytes(b"a camera not chosen")
    assert LeRobotSource(root, cameras=["front"]).digest() == before


def test_the_shipped_demonstrations_read(maker: ModuleType) -> None:
    source = open_source(PUSH)
    index = source.index()
    assert (index.kind, len(index.episodes), sum(e.length for e in index.episodes)) == ("lerobot-v3.0", 100, 1995)
    assert index.cameras == ("corner3", "topview")
    assert index.steps["privileged"].role == "privileged"
    for episode in (0, 57, 99):
        length = index.episodes[episode].length
        frames = list(source.frames(episode, 0, length))
        assert len(frames) == length
        assert {image.shape for images in frames for image in images} == {frames[0][0].shape}
        assert np.abs(frames[0][0].astype(int) - frames[0][1]).mean() > 1  # two views of it, not one twice
