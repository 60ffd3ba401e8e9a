from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vla.featurize.sources import parquet
from vla.featurize.sources.base import Source
from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import SourceError

Write = Callable[..., Path]
Edit = Callable[..., None]


def reward(episode: int, frame: int) -> float:
    return episode + frame / 10


def truth(episode: int, frame: int) -> list[float]:
    return [float(episode), float(frame), 1.0]


REWARD = {"next.reward": ({"dtype": "float32", "shape": [1], "names": None}, reward)}
TRUTH = {"observation.environment_state": ({"dtype": "float32", "shape": [3], "names": None}, truth)}


def test_steps_of_an_episode_are_its_own_rows(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    source: Source = LeRobotSource(write_lerobot(tmp_path, version=version, lengths=(6, 9, 7)))
    for episode, length in enumerate((6, 9, 7)):
        steps = source.steps(episode)
        frames = np.arange(length)
        wanted = np.stack([episode + frames / 100, -frames / 7, np.full(length, 0.5)], axis=1).astype(np.float32)
        np.testing.assert_array_equal(steps["action"], wanted)
        np.testing.assert_array_equal(steps["state"], np.stack([np.full(length, episode), frames], axis=1))
        np.testing.assert_array_equal(steps["frame_index"], frames)
        np.testing.assert_allclose(steps["timestamp"], frames / 10, atol=1e-6)


@pytest.mark.parametrize("one_row_group", [False, True])
def test_steps_are_the_same_however_the_file_is_grouped(
    one_row_group: bool, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, lengths=(6, 9, 7, 3), per_file=4, one_row_group=one_row_group)
    source = LeRobotSource(root)
    for episode in (3, 1, 0, 2):
        assert set(source.steps(episode)["state"][:, 0]) == {episode}


def test_steps_have_the_shapes_and_types_that_the_index_announces(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, version=version, extra={**REWARD, **TRUTH}))
    index = source.index()
    for number, episode in enumerate(index.episodes):
        steps = source.steps(number)
        assert steps.keys() == index.steps.keys()
        for name, spec in index.steps.items():
            assert (steps[name].shape, steps[name].dtype) == ((episode.length, *spec.shape), np.dtype(spec.dtype))


def test_the_index_says_what_the_data_set_is(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(6, 9), info={"license": "apache-2.0"})
    index = LeRobotSource(root).index()
    assert (index.kind, index.fps, index.cameras, index.licence) == (
        f"lerobot-{version}",
        10.0,
        ("front",),
        "apache-2.0",
    )
    assert [(episode.id, episode.length) for episode in index.episodes] == [
        ("episode_000000", 6),
        ("episode_000001", 9),
    ]
    action, state = index.steps["action"], index.steps["state"]
    assert (action.shape, action.dtype, action.role, action.names) == ((3,), "float32", "action", ("x", "y", "z"))
    assert (state.shape, state.role, state.names) == ((2,), "state", ("a", "b"))
    assert (index.steps["timestamp"].dtype, index.steps["timestamp"].shape) == ("float64", ())
    assert index.mapping["state"] == "observation.state"
    assert index.mapping["front"] == "observation.images.front"
    assert index.skipped == {}


def test_bookkeeping_columns_are_no_steps(tmp_path: Path, write_lerobot: Write) -> None:
    steps = LeRobotSource(write_lerobot(tmp_path, extra=REWARD)).index().steps
    assert set(steps) == {"action", "state", "timestamp", "frame_index", "next.reward"}


def test_the_environment_state_is_privileged(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, version=version, extra=TRUTH))
    spec = source.index().steps["privileged"]
    assert (spec.role, spec.shape, spec.dtype) == ("privileged", (3,), "float32")
    np.testing.assert_array_equal(source.steps(1)["privileged"][4], [1, 4, 1])


def test_a_column_marked_privileged_never_gets_another_role(tmp_path: Path, write_lerobot: Write) -> None:
    marked = {"goal": ({"dtype": "float32", "shape": [3], "names": None, "privileged": True}, truth)}
    index = LeRobotSource(write_lerobot(tmp_path, extra=marked)).index()
    assert index.steps["privileged"].role == "privileged"
    assert index.mapping["privileged"] == "goal"
    with pytest.raises(SourceError, match="marked privileged"):
        LeRobotSource(tmp_path, map={"state": "goal"}).index()


def test_a_state_marked_privileged_is_not_taken_for_the_state(
    tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.state"]["privileged"] = True
    edit_info(root, features=features)
    index = LeRobotSource(root).index()
    assert index.mapping["privileged"] == "observation.state"
    assert {spec.role for spec in index.steps.values()} == {"action", "privileged", "other"}


def test_several_privileged_columns_keep_their_names(tmp_path: Path, write_lerobot: Write) -> None:
    marked = {"dtype": "float32", "shape": [3], "names": None, "privileged": True}
    index = LeRobotSource(write_lerobot(tmp_path, extra={"goal": (marked, truth), "mass": (marked, truth)})).index()
    assert (index.steps["goal"].role, index.steps["mass"].role) == ("privileged", "privileged")
    assert "privileged" not in index.steps


def test_other_numbers_keep_their_name_and_type(tmp_path: Path, write_lerobot: Write) -> None:
    flag = {"next.done": ({"dtype": "bool", "shape": [1], "names": None}, lambda episode, frame: frame == 5)}
    source = LeRobotSource(write_lerobot(tmp_path, extra={**REWARD, **flag}))
    assert source.index().steps["next.done"].role == "other"
    np.testing.assert_array_equal(source.steps(0)["next.done"], [False] * 5 + [True])
    np.testing.assert_allclose(source.steps(1)["next.reward"], 1 + np.arange(9) / 10, rtol=1e-6)


def test_columns_of_text_are_left_out(tmp_path: Path, write_lerobot: Write) -> None:
    text = {"note": ({"dtype": "string", "shape": [1], "names": None}, lambda episode, frame: "hello")}
    assert "note" not in LeRobotSource(write_lerobot(tmp_path, extra=text)).index().steps


def test_an_action_of_one_number_is_a_vector_of_one(tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, extra=REWARD), map={"action": "next.reward"})
    assert source.steps(1)["action"].shape == (9, 1)


def test_mapped_names_read_the_columns_they_name(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    names = {"action": "actions", "observation.state": "state"}
    cameras = {"image": "image", "wrist_image": "image"}
    root = write_lerobot(tmp_path, version=version, names=names, cameras=cameras)
    source = LeRobotSource(root, map={"action": "actions", "observation.state": "state", "hand": "wrist_image"})
    assert source.index().cameras == ("image", "hand")
    assert source.index().mapping["hand"] == "wrist_image"
    np.testing.assert_allclose(source.steps(2)["action"][3], [2.03, -3 / 7, 0.5], rtol=1e-6)


def test_columns_that_info_json_does_not_list_are_found(tmp_path: Path, write_lerobot: Write, edit_info: Edit) -> None:
    root = write_lerobot(tmp_path, names={"action": "actions"}, extra=REWARD)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"] = features.pop("actions")
    del features["next.reward"]
    edit_info(root, features=features)
    with pytest.raises(SourceError, match=r"file-000\.parquet has no 'action'.*--map action=actions"):
        LeRobotSource(root).index()
    source = LeRobotSource(root, map={"action": "actions"})
    assert source.index().steps["action"].shape == (3,)
    assert source.steps(1)["next.reward"].shape == (9,)


def test_tasks_come_with_each_episode(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    tasks = [["open"], ["close", "lock"], ["ünïcode\ntask"]]
    index = LeRobotSource(write_lerobot(tmp_path, version=version, tasks=tasks)).index()
    assert [episode.task for episode in index.episodes] == ["open", "close", "ünïcode\ntask"]


def test_tasks_are_looked_up_by_number_where_episodes_do_not_say(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, version=version, tasks=[[], [], []])
    assert [episode.task for episode in LeRobotSource(root).index().episodes] == [
        "first task",
        "second task",
        "first task",
    ]
    next(root.glob("meta/tasks.*")).unlink()
    with pytest.raises(SourceError, match=r"meta/tasks\.\w+ is missing"):
        LeRobotSource(root).index()


def test_gaps_in_episode_numbers_shift_nothing(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Callable[..., Any]
) -> None:
    """Episode ids are keys, never positions: what is read under an id is that episode's own."""
    root = write_lerobot(tmp_path, version=version, lengths=(4, 5, 6), indices=(2, 7, 11))
    source = LeRobotSource(root)
    assert [episode.id for episode in source.index().episodes] == ["episode_000002", "episode_000007", "episode_000011"]
    assert source.steps(1)["state"][:, 0].tolist() == [7] * 5
    assert [number_of(views[0])[:2] for views in source.frames(2, 0, 6)] == [(11, frame) for frame in range(6)]


def test_episodes_come_in_the_order_of_their_numbers(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, version=version, lengths=(4, 5, 6), indices=(7, 2, 11), per_file=3))
    assert [episode.id for episode in source.index().episodes] == ["episode_000002", "episode_000007", "episode_000011"]
    assert [set(source.steps(number)["state"][:, 0]) for number in range(3)] == [{2}, {7}, {11}]


def test_an_episode_of_one_frame_is_read(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Callable[..., Any]
) -> None:
    source = LeRobotSource(write_lerobot(tmp_path, version=version, lengths=(1, 1, 5)))
    assert source.steps(1)["action"].shape == (1, 3)
    assert number_of(next(source.frames(1, 0, 1))[0]) == (1, 0, 0)


def test_the_digest_depends_on_every_indexed_file_and_on_nothing_else(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, version=version)
    before = LeRobotSource(root).digest()
    (root / "meta/stats.json").write_text("{}")
    (root / "note.txt").write_text("nothing")
    assert LeRobotSource(root).digest() == before
    moved = shutil.copytree(root, tmp_path / "moved")
    assert LeRobotSource(moved).digest() == before
    video = next(root.rglob("*.mp4"))
    whole = video.read_bytes()
    video.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert LeRobotSource(root).digest() != before
    video.write_bytes(whole)
    info = root / "meta/info.json"
    info.write_text(info.read_text() + " ")
    assert LeRobotSource(root).digest() != before


def test_the_digest_leaves_out_cameras_that_are_not_read(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, cameras={f"observation.images.{name}": "video" for name in ("front", "wrist")})
    before = LeRobotSource(root, cameras=["front"]).digest()
    for video in (root / "videos/observation.images.wrist").rglob("*.mp4"):
        video.unlink()
    assert LeRobotSource(root, cameras=["front"]).digest() == before


def test_the_digest_is_over_sorted_paths_sizes_and_contents(tmp_path: Path, write_lerobot: Write) -> None:
    import hashlib

    root = write_lerobot(tmp_path, version="v2.1", lengths=(3,))
    video = "videos/chunk-000/observation.images.front/episode_000000.mp4"
    names = sorted(["meta/info.json", "meta/episodes.jsonl", "data/chunk-000/episode_000000.parquet", video])
    wanted = hashlib.sha256()
    for name in names:
        content = (root / name).read_bytes()
        wanted.update(f"{name}\0{len(content)}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    assert LeRobotSource(root).digest() == wanted.hexdigest()


def test_row_groups_above_the_budget_are_streamed_and_not_kept(tmp_path: Path, write_lerobot: Write) -> None:
    cameras = {"observation.images.front": "image"}
    root = write_lerobot(tmp_path, lengths=(40, 30), cameras=cameras, one_row_group=True)
    file = next(root.rglob("data/**/*.parquet"))
    small, large = parquet.RowReader(budget=1000), parquet.RowReader()
    for start, stop in ((0, 70), (35, 52), (69, 70)):
        read = [
            pa.concat_tables(list(r.read(file, ["index", "observation.images.front"], start, stop)))
            for r in (small, large)
        ]
        assert read[0].equals(read[1])
        assert read[0]["index"].to_pylist() == list(range(start, stop))
    assert small._kept == {}


def test_kept_row_groups_stay_below_the_budget(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, lengths=(20,) * 10, per_file=10)
    file = next(root.rglob("data/**/*.parquet"))
    reader = parquet.RowReader(budget=2000)
    for start in range(0, 200, 20):
        list(reader.read(file, ["action", "timestamp"], start, start + 20))
        assert len(reader._kept) >= 1
        assert sum(table.nbytes for table in reader._kept.values()) <= 2000


def test_a_source_is_indexed_once(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    source = LeRobotSource(root)
    index = source.index()
    (root / "meta/info.json").unlink()
    assert source.index() is index


@pytest.mark.parametrize("name", ["with space", "ünï-日本", "quote'd", "new\nline"])
def test_folders_may_have_any_name(name: str, version: str, tmp_path: Path, write_lerobot: Write) -> None:
    source = LeRobotSource(write_lerobot(tmp_path / name, version=version, lengths=(3,)))
    assert len(list(source.frames(0, 0, 3))) == 3
    assert len(source.digest()) == 64


def test_the_licence_is_read_from_the_data_card(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    assert LeRobotSource(root).index().licence == "unknown"
    (root / "README.md").write_text("---\ntags: [robot]\nlicense: cc-by-4.0\n---\n# license: not this\n")
    assert LeRobotSource(root).index().licence == "cc-by-4.0"
