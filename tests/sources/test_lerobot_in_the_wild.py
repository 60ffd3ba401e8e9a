"""LeRobot data sets as others write them: other versions, GR00T's additions, other encodings, clocks that jitter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import PointerError, SourceError, UsageError

Write = Callable[..., Path]
Edit = Callable[..., None]
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
INT = {"dtype": "int64", "shape": [1], "names": None}
VALID = {"annotation.human.validity": (INT, lambda episode, frame: 1)}
DESCRIPTION = {"annotation.human.action.task_description": (INT, lambda episode, frame: 0)}


def told(source: LeRobotSource) -> list[str]:
    return [episode.task for episode in source.index().episodes]


def without(*columns: str) -> Callable[[int, dict[str, Any]], None]:
    def edit(number: int, table: dict[str, Any]) -> None:
        for column in columns:
            del table[column]

    return edit


def recast(column: str, kind: Any) -> Callable[[int, dict[str, Any]], None]:
    """Return an edit that writes a column's values in another type."""

    def edit(number: int, table: dict[str, Any]) -> None:
        table[column] = pa.array(table[column].to_pylist(), kind)

    return edit


def rewrite(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)


def episodes_of(root: Path) -> Path:
    return next(root.glob("meta/episodes/*/*.parquet"))


def shown(source: LeRobotSource, episode: int, read: Any) -> list[tuple[int, int]]:
    length = source.index().episodes[episode].length
    return [read(images[0])[:2] for images in source.frames(episode, 0, length)]


def expected(episode: int, length: int) -> list[tuple[int, int]]:
    return [(episode, frame) for frame in range(length)]


# GR00T


def test_the_instruction_is_the_one_that_the_frames_name(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    tasks = [["pick the pear", "valid"], ["pick the fig", "valid"]]
    root = write_lerobot(tmp_path, version=version, lengths=(4, 5), tasks=tasks, extra=VALID)
    index = LeRobotSource(root).index()
    assert [episode.task for episode in index.episodes] == ["pick the pear", "pick the fig"]
    assert index.episodes[0].texts == {"annotation.human.validity": "valid"}
    assert "task_index" not in index.steps
    assert index.warnings == ()


def test_an_instruction_that_changes_is_kept_for_each_frame(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(
        tmp_path,
        version=version,
        lengths=(4, 5),
        tasks=[["open", "close"], ["close"]],
        task_index=lambda episode, frame: 1 if episode == 1 or frame > 2 else 0,
    )
    source = LeRobotSource(root)
    assert told(source) == ["open; close", "close"]
    assert source.index().episodes[0].texts == {"task_0": "open", "task_1": "close"}
    assert source.steps(0)["task_index"].tolist() == [0, 0, 0, 1]
    assert source.steps(1)["task_index"].tolist() == [1] * 5


def test_a_task_that_is_not_declared_is_refused(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, tasks=[["a"]] * 3, task_index=lambda episode, frame: episode)
    with pytest.raises(SourceError, match=r"episode_000001.*task 1"):
        LeRobotSource(root).index()
    assert list(LeRobotSource(root, skip_bad=True).index().skipped) == ["episode_000001", "episode_000002"]


def test_a_task_declared_twice_is_refused(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    with (root / "meta/tasks.jsonl").open("a") as file:
        file.write('{"task_index": 0, "task": "another"}\n')
    with pytest.raises(SourceError, match=r"tasks\.jsonl"):
        LeRobotSource(root).index()


def test_a_list_of_tasks_that_the_frames_contradict_is_a_warning(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, tasks=[["a"], ["b"], ["undeclared"]], declared=["a", "b"], task_index=lambda e, f: 0)
    index = LeRobotSource(root).index()
    assert {episode.task for episode in index.episodes} == {"a"}
    assert any("'undeclared'" in line for line in index.warnings)


def test_another_annotation_can_be_the_instruction(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(4,), tasks=[["pick", "valid"]], extra=DESCRIPTION | VALID)
    assert told(LeRobotSource(root, annotation="human.validity")) == ["valid"]
    with pytest.raises(UsageError, match=r"human\.validity"):
        LeRobotSource(root, annotation="human.vality").index()


def test_the_only_annotation_is_the_instruction_where_no_task_index_is(tmp_path: Path, write_lerobot: Write) -> None:
    what: dict[str, Any] = {"version": "v2.1", "lengths": (4,), "tasks": [["pick", "valid"]]}
    one = write_lerobot(tmp_path / "one", extra=DESCRIPTION, tables=without("task_index"), **what)
    assert told(LeRobotSource(one)) == ["pick"]
    two = write_lerobot(tmp_path / "two", extra=DESCRIPTION | VALID, tables=without("task_index"), **what)
    with pytest.raises(SourceError, match=r"source_options\.annotation="):
        LeRobotSource(two).index()


def test_annotations_may_hold_texts_in_the_place_of_numbers(tmp_path: Path, write_lerobot: Write) -> None:
    text = {"annotation.human.task": ({"dtype": "string", "shape": [1]}, lambda episode, frame: f"say {episode}")}
    root = write_lerobot(tmp_path, lengths=(3, 4), extra=text)
    assert told(LeRobotSource(root, annotation="human.task")) == ["say 0", "say 1"]


def test_rows_without_a_frame_index_are_in_order(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(4, 5), tables=without("frame_index"))
    source = LeRobotSource(root)
    assert source.steps(1)["frame_index"].tolist() == [0, 1, 2, 3, 4]
    assert source.steps(1)["frame_index"].dtype == source.index().steps["frame_index"].dtype


def test_a_camera_without_any_video_is_left_out_with_a_warning(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, version=version, cameras={FRONT: "video", WRIST: "video"})
    for video in root.rglob("*wrist/**/*.mp4"):
        video.unlink()
    index = LeRobotSource(root).index()
    assert index.cameras == ("front",)
    assert [WRIST in line for line in index.warnings] == [True]
    with pytest.raises(SourceError, match="wrist"):
        LeRobotSource(root, cameras=["wrist"]).index()


def test_a_camera_that_no_episode_places_is_left_out_with_a_warning(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, cameras={FRONT: "video", WRIST: "video"})
    table = pq.read_table(episodes_of(root))
    pq.write_table(table.drop_columns([name for name in table.column_names if WRIST in name]), episodes_of(root))
    for video in root.rglob("*wrist/**/*.mp4"):
        video.unlink()
    assert LeRobotSource(root).index().cameras == ("front",)


MODALITY: dict[str, Any] = {
    "state": {"arm": {"start": 0, "end": 1}, "hand": {"start": 1, "end": 2}},
    "action": {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}},
    "video": {"ego_view": {"original_key": FRONT}},
    "annotation": {"human.task": {"original_key": "task_index"}},
}


def with_modality(root: Path, **changes: Any) -> Path:
    (root / "meta/modality.json").write_text(json.dumps(MODALITY | changes))
    return root


def test_modality_json_names_components_and_cameras(tmp_path: Path, write_lerobot: Write) -> None:
    root = with_modality(write_lerobot(tmp_path, version="v2.1"))
    index = LeRobotSource(root).index()
    assert index.steps["action"].names == ("arm_0", "arm_1", "gripper")
    assert index.steps["state"].names == ("arm", "hand")
    assert index.cameras == ("ego_view",)
    assert [episode.task for episode in index.episodes] == ["task 0", "task 1", "task 0"]


def test_a_part_of_modality_json_can_be_the_state(tmp_path: Path, write_lerobot: Write) -> None:
    root = with_modality(write_lerobot(tmp_path, version="v2.1"))
    parts = {"state": "state.hand", "action": "action.gripper+action.arm"}
    source = LeRobotSource(root, map=parts)
    whole = LeRobotSource(root).steps(1)
    np.testing.assert_array_equal(source.steps(1)["state"], whole["state"][:, 1:])
    np.testing.assert_array_equal(source.steps(1)["action"], whole["action"][:, [2, 0, 1]])
    assert source.index().steps["action"].names == ("gripper", "arm_0", "arm_1")
    assert source.index().mapping["action"] == "action.gripper+action.arm"


def test_parts_of_other_columns_are_the_action_where_none_is_called_action(
    tmp_path: Path, write_lerobot: Write
) -> None:
    names = {"action": "arm_delta", "observation.state": "gripper"}
    action = {
        "arm": {"start": 0, "end": 3, "original_key": "arm_delta"},
        "hand": {"start": 1, "end": 2, "original_key": "gripper"},
    }
    root = with_modality(write_lerobot(tmp_path, version="v2.1", names=names), action=action, state={})
    source = LeRobotSource(root)
    steps = source.steps(2)
    np.testing.assert_array_equal(steps["action"], np.c_[steps["arm_delta"], steps["gripper"][:, 1:]])
    assert source.index().steps["action"].role == "action"


@pytest.mark.parametrize("part", [{"start": 2, "end": 4}, {"start": 1, "end": 1}, {"start": "a", "end": 2}, {}])
def test_a_part_outside_its_column_is_refused(part: dict[str, Any], tmp_path: Path, write_lerobot: Write) -> None:
    root = with_modality(write_lerobot(tmp_path, version="v2.1"), action={"arm": part})
    with pytest.raises(SourceError, match=r"action\.arm"):
        LeRobotSource(root).index()


# versions and numbers of info.json


def test_version_2_0_is_read_as_it_is(tmp_path: Path, write_lerobot: Write, number_of: Any) -> None:
    root = write_lerobot(tmp_path, version="v2.0", lengths=(4, 5))
    (root / "meta/stats.json").write_text("{}")
    source = LeRobotSource(root)
    assert source.index().kind == "lerobot-v2.0"
    assert shown(source, 1, number_of) == expected(1, 5)


@pytest.mark.parametrize("fps", ["10.0", 10.0, "10"])
def test_numbers_of_info_json_may_be_floats_or_texts(
    fps: Any, version: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path, version=version)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"]["shape"] = [3.0]
    edit_info(root, fps=fps, total_episodes=3.0, chunks_size="1000", features=features)
    assert LeRobotSource(root).index().fps == 10.0


@pytest.mark.parametrize("key", ["total_episodes", "total_frames", "chunks_size", "robot_type"])
def test_optional_keys_of_info_json_may_be_missing(
    key: str, version: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path, version=version)
    edit_info(root, **{key: None})
    assert len(LeRobotSource(root).index().episodes) == 3


@pytest.mark.parametrize(
    "template",
    [
        "videos/chunk-{chunk_index:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "videos/chunk-{episode_chunk:03d}/{camera_key}/episode_{file_index:06d}.mp4",
    ],
)
def test_other_names_of_a_files_place_are_understood(
    template: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit, number_of: Any
) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(4, 5))
    edit_info(root, video_path=template)
    assert shown(LeRobotSource(root), 1, number_of) == expected(1, 5)


@pytest.mark.parametrize("name", ["episodes.jsonl", "tasks.jsonl", "info.json"])
@pytest.mark.parametrize("change", ["bom", "crlf", "no newline"])
def test_a_text_file_may_begin_and_end_as_other_editors_write_it(
    name: str, change: str, tmp_path: Path, write_lerobot: Write
) -> None:
    file = write_lerobot(tmp_path, version="v2.1") / "meta" / name
    data = file.read_bytes()
    changed = {
        "bom": b"\xef\xbb\xbf" + data,
        "crlf": data.replace(b"\n", b"\r\n"),
        "no newline": data.rstrip(b"\n"),
    }
    file.write_bytes(changed[change])
    assert told(LeRobotSource(tmp_path)) == ["task 0", "task 1", "task 0"]


# videos


def test_a_span_may_end_with_the_time_of_its_last_frame(tmp_path: Path, write_lerobot: Write, number_of: Any) -> None:
    root = write_lerobot(tmp_path, per_file=3)

    def shorten(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row[f"videos/{FRONT}/to_timestamp"] -= 0.1

    rewrite(episodes_of(root), shorten)
    source = LeRobotSource(root)
    assert [shown(source, number, number_of) for number in range(3)] == [expected(0, 6), expected(1, 9), expected(2, 7)]


@pytest.mark.parametrize("offset", [0.1, 0.05, 12.34, -0.1])
def test_spans_off_by_one_constant_are_put_right_by_the_frames(
    offset: float, tmp_path: Path, write_lerobot: Write, number_of: Any
) -> None:
    root = write_lerobot(tmp_path, per_file=3)

    def shift(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row[f"videos/{FRONT}/from_timestamp"] += offset
            row[f"videos/{FRONT}/to_timestamp"] += offset

    rewrite(episodes_of(root), shift)
    source = LeRobotSource(root)
    assert shown(source, 1, number_of) == expected(1, 9)
    assert shown(source, 2, number_of) == expected(2, 7)


def test_timestamps_that_begin_with_the_first_step_still_begin_with_frame_zero(
    tmp_path: Path, write_lerobot: Write, number_of: Any
) -> None:
    def late(episode: int, table: dict[str, Any]) -> None:
        table["timestamp"] = pa.array([1_700_000_000 + (frame + 1) / 10 for frame in range(6)], pa.float64())

    source = LeRobotSource(write_lerobot(tmp_path, version="v2.1", lengths=(6,), tables=late))
    assert shown(source, 0, number_of) == expected(0, 6)


def test_episodes_may_be_listed_in_any_order(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, per_file=3)
    if version == "v3.0":
        rewrite(episodes_of(root), list.reverse)
    else:
        lines = (root / "meta/episodes.jsonl").read_text().splitlines()
        (root / "meta/episodes.jsonl").write_text("\n".join(reversed(lines)))
    assert [set(LeRobotSource(root).steps(number)["state"][:, 0]) for number in range(3)] == [{0}, {1}, {2}]


@pytest.mark.parametrize("more", [-1, 1, 3])
def test_a_video_with_another_number_of_frames_than_rows_is_refused(
    more: int, version: str, tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any
) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(5, 6), per_file=1)
    video = sorted(root.rglob("*.mp4"))[1]
    write_video(video, [picture(1, frame, 0) for frame in range(6 + more)])
    with pytest.raises(SourceError, match=str(video)):
        LeRobotSource(root).index()


def test_spans_of_two_episodes_that_overlap_are_refused(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, per_file=3)

    def overlap(rows: list[dict[str, Any]]) -> None:
        rows[1][f"videos/{FRONT}/from_timestamp"] -= 0.3
        rows[1][f"videos/{FRONT}/to_timestamp"] -= 0.3

    rewrite(episodes_of(root), overlap)
    with pytest.raises(SourceError, match=r"episode_000001 begins at frame 3; expected 6 or later"):
        LeRobotSource(root).index()
    assert list(LeRobotSource(root, skip_bad=True).index().skipped) == ["episode_000001"]


def jitter(number: int, table: dict[str, Any]) -> None:
    noise = np.random.default_rng(number).uniform(-0.04, 0.04, len(table["timestamp"]))
    times = 1_700_000_000 + np.arange(len(noise)) / 10 + noise
    table["timestamp"] = pa.array(times, pa.float64())


def test_clocks_that_jitter_are_aligned_by_index_when_that_is_asked_for(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Any
) -> None:
    root = write_lerobot(tmp_path, version=version, per_file=3, tables=jitter)
    with pytest.raises(SourceError, match=r"source_options\.align=index"):
        LeRobotSource(root).index()
    source = LeRobotSource(root, align="index")
    assert shown(source, 1, number_of) == expected(1, 9)
    assert [number_of(views[0])[:2] for views in source.frames(2, 3, 6)] == [(2, 3), (2, 4), (2, 5)]
    assert source.steps(1)["timestamp"][0] == pytest.approx(1_700_000_000, abs=0.1)


def test_frames_at_any_time_are_found_by_their_order(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any, number_of: Any
) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(8,), tables=jitter)
    options = {"g": "4", "bf": "2", "crf": "20", "preset": "veryfast"}
    shots = [picture(0, frame, 0) for frame in range(8)]
    write_video(next(root.rglob("*.mp4")), shots, times=[0, 1, 4, 5, 9, 10, 20, 21], options=options)
    source = LeRobotSource(root, align="index")
    assert shown(source, 0, number_of) == expected(0, 8)
    for start in range(8):
        assert number_of(next(source.frames(0, start, 8))[0])[1] == start


def test_alignment_by_index_needs_one_frame_for_each_row(
    tmp_path: Path, write_lerobot: Write, write_video: Any, picture: Any
) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(6,), tables=jitter)
    write_video(next(root.rglob("*.mp4")), [picture(0, frame, 0) for frame in range(7)])
    with pytest.raises(SourceError, match=r"7 frames.*6 rows"):
        LeRobotSource(root, align="index").index()


# pointers and the hub's cache


@pytest.mark.parametrize(
    "pattern", ["*.mp4", "data/**/*.parquet", "meta/episodes.jsonl", "meta/info.json", "meta/tasks*"]
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_checkout_without_its_large_files_is_one_error(
    pattern: str, skip_bad: bool, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    for file in root.rglob(pattern):
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(PointerError, match=r"git.* lfs pull"):
        LeRobotSource(root, skip_bad=skip_bad).index()


def test_a_picture_that_is_a_pointer_is_named_as_such(tmp_path: Path, write_lerobot: Write) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n".encode()
    root = write_lerobot(tmp_path, cameras={FRONT: "image"}, image_bytes=lambda pixels: pointer)
    with pytest.raises(PointerError):
        next(LeRobotSource(root).frames(0, 0, 1))


def as_hub_cache(root: Path, cache: Path) -> Path:
    """Lay a data set out as the hub's cache does: content in blobs, names as links in a snapshot."""
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{number:040x}"
        file.rename(blob)
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (len(link.relative_to(cache).parts) - 1) + f"blobs/{blob.name}")
    return snapshot


def test_the_hubs_cache_is_read_where_it_lies(
    version: str, tmp_path: Path, write_lerobot: Write, number_of: Any
) -> None:
    digest = LeRobotSource(write_lerobot(tmp_path / "set", version=version)).digest()
    snapshot = as_hub_cache(tmp_path / "set", tmp_path / "hub/datasets--someone--pears")
    source = LeRobotSource(snapshot)
    assert shown(source, 1, number_of) == expected(1, 9)
    assert source.digest() == digest


def test_links_out_of_the_hubs_cache_stay_refused(tmp_path: Path, write_lerobot: Write) -> None:
    snapshot = as_hub_cache(write_lerobot(tmp_path / "set"), tmp_path / "hub/datasets--someone--pears")
    info = snapshot / "meta/info.json"
    secret = tmp_path / "hub/datasets--another/blobs/0"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(info.read_bytes())
    info.unlink()
    (snapshot / "data").rename(tmp_path / "hub/datasets--another/data")
    info.symlink_to(secret)
    (snapshot / "data").symlink_to(tmp_path / "hub/datasets--another/data")
    with pytest.raises(SourceError, match="leads out"):
        LeRobotSource(snapshot).index()
