"""Data sets that are not what they say: each is refused with the file and what to type, or left out and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]
Edit = Callable[..., None]


def refusal(root: Path, **options: Any) -> str:
    """Return the message of the `SourceError` that indexing raises: one line."""
    with pytest.raises(SourceError) as caught:
        LeRobotSource(root, **options).index()
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(column: str, row: int, value: Any, episode: int = 1) -> Callable[[int, dict[str, Any]], None]:
    """Return an edit of one cell."""

    def edit(number: int, table: dict[str, Any]) -> None:
        if number == episode:
            cells = table[column].to_pylist()
            cells[row] = value
            table[column] = pa.array(cells, table[column].type)

    return edit


def test_an_episode_without_frames_is_refused(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(5, 0, 4))
    assert "episode_000001 has 0 frames; expected at least 1" in refusal(root)
    source = LeRobotSource(root, skip_bad=True)
    assert list(source.index().skipped) == ["episode_000001"]
    assert len(list(source.frames(1, 0, 4))) == 4


def test_a_data_set_of_bad_episodes_only_is_refused_even_when_skipping(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, lengths=(5,), tables=change("action", 0, [math.nan] * 3, episode=0))
    assert "every episode of" in refusal(root, skip_bad=True)


def test_a_missing_video_is_named(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(5, 6, 7), per_file=1)
    video = sorted(root.rglob("*.mp4"))[1]
    video.unlink()
    message = refusal(root)
    assert f"{video} is missing; expected the video of camera front, episode_000001" in message
    assert "--skip-bad" in message
    assert list(LeRobotSource(root, skip_bad=True).index().skipped) == ["episode_000001"]


def test_a_missing_video_of_a_camera_that_is_not_read_does_no_harm(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    cameras = {f"observation.images.{name}": "video" for name in ("front", "wrist")}
    root = write_lerobot(tmp_path, version=version, cameras=cameras)
    for video in root.rglob("*wrist/**/*.mp4"):
        video.unlink()
    assert LeRobotSource(root, cameras=["front"]).index().cameras == ("front",)


def test_a_folder_video_instead_of_videos_gets_the_command_that_renames_it(
    version: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path / "my data", version=version)
    (root / "videos").rename(root / "video")
    message = refusal(root)
    assert "video/ holds it while meta/info.json says videos/" in message
    assert message.endswith(f"Try: mv '{root}/video' '{root}/videos'")


@pytest.mark.parametrize("name", ["meta/info.json", "meta/episodes"])
def test_missing_metadata_are_named(name: str, version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version)
    for path in root.glob(f"{name}*"):
        path.rename(tmp_path / "elsewhere")
    assert str(root / name) in refusal(root)


def test_missing_data_are_named(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, lengths=(5, 6), per_file=1)
    first, second = sorted((root / "data").rglob("*.parquet"))
    second.unlink()
    assert f"{second} is missing" in refusal(root)
    assert list(LeRobotSource(root, skip_bad=True).index().skipped) == ["episode_000001"]
    first.unlink()
    assert f"{first} is missing" in refusal(root)


@pytest.mark.parametrize(("found", "fix"), [("v1.6", "lerobot's own converters"), (None, "convert")])
def test_other_versions_are_refused_with_what_to_do(
    found: str | None, fix: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    edit_info(root, codebase_version=found)
    message = refusal(root)
    assert f"codebase_version = {found!r}; expected v3.0 or v2.1 or v2.0" in message
    assert fix in message


def test_a_v2_1_data_set_called_v3_0_is_refused(tmp_path: Path, write_lerobot: Write, edit_info: Edit) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    edit_info(root, codebase_version="v3.0")
    assert "only chunk_index, file_index" in refusal(root)
    three = {"data_path": "data/{chunk_index}/{file_index}.parquet", "video_path": "v/{file_index}.mp4"}
    edit_info(root, **three)
    assert "converter from v2.1 to v3.0" in refusal(root)


@pytest.mark.parametrize(
    ("listed", "counted", "skipped"), [((0, 1, 2), 5, [3, 4]), ((0, 2, 5), 6, [1, 3, 4]), ((0, 1, 2), 2, [])]
)
def test_episodes_that_are_counted_and_not_listed_are_refused_or_named(
    listed: tuple[int, ...],
    counted: int,
    skipped: list[int],
    version: str,
    tmp_path: Path,
    write_lerobot: Write,
    edit_info: Edit,
) -> None:
    root = write_lerobot(tmp_path, version=version, indices=listed)
    edit_info(root, total_episodes=counted)
    message = refusal(root)
    assert f"lists 3 episodes, meta/info.json says {counted}" in message
    assert "total_episodes 3 in meta/info.json" in message
    assert list(LeRobotSource(root, skip_bad=True).index().skipped) == [f"episode_{n:06d}" for n in skipped]


def test_an_episode_listed_twice_is_refused(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version, indices=(0, 1, 1), lengths=(4, 5, 5))
    assert "lists episode 1 twice" in refusal(root)


def test_a_video_span_shorter_than_the_episode_is_refused(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    edit_episodes(root, 1, "videos/observation.images.front/to_timestamp", 1.3)
    assert "camera front, episode_000001 spans 7.0 frames; expected 9" in refusal(root)


@pytest.mark.parametrize("start", [0.65, -1.0, math.nan])
def test_a_video_span_that_begins_on_no_frame_is_refused(start: float, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    edit_episodes(root, 1, "videos/observation.images.front/from_timestamp", start)
    assert "camera front, episode_000001 begins at" in refusal(root)


def edit_episodes(root: Path, row: int, column: str, value: Any) -> None:
    file = next(root.glob("meta/episodes/*/*.parquet"))
    rows = pq.read_table(file).to_pylist()
    rows[row][column] = value
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_metadata_without_the_place_of_a_video_are_named(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    file = next(root.glob("meta/episodes/*/*.parquet"))
    column = "videos/observation.images.front/from_timestamp"
    pq.write_table(pq.read_table(file).drop_columns([column]), file)
    assert f"{file} has no column {column}" in refusal(root)


OUTSIDE = {
    "parent": "../{chunk_index}/{file_index}.parquet",
    "hidden parent": "data/../../{chunk_index}-{file_index}.parquet",
    "absolute": "/etc/{chunk_index}/{file_index}.parquet",
    "home": "~/{chunk_index}/{file_index}.parquet",
}


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_path_templates_that_lead_out_are_refused(
    what: str, key: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path)
    edit_info(root, **{key: OUTSIDE[what]})
    assert f"{key} {OUTSIDE[what]!r} leads out of the data set" in refusal(root)


@pytest.mark.parametrize(
    "template",
    ["{chunk_index.__class__}.parquet", "{chunk_index:0999999999d}", "{file_index!r}", "{secret}", "{0}", "{", ""],
)
def test_path_templates_with_anything_but_numbers_are_refused(
    template: str, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path)
    edit_info(root, data_path=template)
    assert "data_path" in refusal(root)


@pytest.mark.parametrize("folder", ["data", "videos", "meta/episodes"])
def test_links_that_lead_out_are_refused_with_the_command_that_copies_them(
    folder: str, tmp_path: Path, write_lerobot: Write
) -> None:
    root = write_lerobot(tmp_path / "set")
    (root / folder).rename(tmp_path / "outside")
    (root / folder).symlink_to(tmp_path / "outside")
    message = refusal(root)
    assert f"leads out of it, to {tmp_path / 'outside'}" in message
    assert f"cp -rL {root} COPY" in message


def test_links_inside_the_data_set_are_followed(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path / "set")
    (root / "data").rename(root / "rows")
    (root / "data").symlink_to("rows")
    assert len(LeRobotSource(root).index().episodes) == 3


def test_the_data_set_itself_may_be_a_link(tmp_path: Path, write_lerobot: Write) -> None:
    write_lerobot(tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert LeRobotSource(tmp_path / "link").digest() == LeRobotSource(tmp_path / "set").digest()


def test_a_camera_name_cannot_lead_out(tmp_path: Path, write_lerobot: Write, edit_info: Edit) -> None:
    root = write_lerobot(tmp_path / "set", version="v2.1")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["../../../secret"] = features.pop("observation.images.front")
    edit_info(root, features=features)
    assert "cannot name an array" in refusal(root)
    assert "leads out of it" in refusal(root, map={"front": "../../../secret"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fps", 0),
        ("fps", "fast"),
        ("fps", float("nan")),
        ("fps", True),
        ("fps", None),
        ("features", None),
        ("features", {"action": 3}),
        ("features", {"action": {"dtype": "float32", "shape": [-1]}}),
        ("chunks_size", 0),
        ("total_episodes", -1),
        ("data_path", None),
        ("data_path", 7),
        ("video_path", None),
    ],
)
def test_metadata_that_make_no_sense_are_named(
    key: str, value: Any, tmp_path: Path, write_lerobot: Write, edit_info: Edit
) -> None:
    root = write_lerobot(tmp_path)
    edit_info(root, **{key: value})
    assert "meta/info.json" in refusal(root)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
@pytest.mark.parametrize("name", ["meta/info.json", "meta/episodes.jsonl"])
def test_metadata_that_are_no_json_are_named(name: str, content: bytes, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    (root / name).write_bytes(content)
    assert str(root / name) in refusal(root)


def test_a_line_without_a_length_is_named_by_number(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 3}\n')
    assert "episodes.jsonl, line 4 lacks episode_index or length" in refusal(root)


def test_an_mp4_file_of_another_episode_is_noticed_by_its_rows(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1", lengths=(5, 5))
    first, second = sorted((root / "data").rglob("*.parquet"))
    first.write_bytes(second.read_bytes())
    assert "episode_000000 has 0 rows; expected 5" in refusal(root)


def test_missing_names_get_the_map_that_fixes_all_of_them(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    names = {"action": "actions", "observation.state": "state"}
    root = write_lerobot(tmp_path, version=version, names=names, cameras={"image": "image"})
    message = refusal(root)
    assert "no 'action', 'observation.state'" in message
    assert "actions (float32)" in message
    fix = message.split("Try: ")[1].replace("--map ", "").split()
    assert fix == ["action=actions", "state=state"]
    assert LeRobotSource(root, map=dict(pair.split("=") for pair in fix)).index().cameras == ("image",)


def test_an_unknown_camera_gets_the_nearest_one(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    message = refusal(root, cameras=["frnt"])
    assert "no camera 'frnt', did you mean 'front'?; expected some of front" in message


def test_a_data_set_without_cameras_is_refused(tmp_path: Path, write_lerobot: Write) -> None:
    assert "has no camera; it has action (float32)" in refusal(write_lerobot(tmp_path, cameras={}))


def test_depth_maps_are_no_cameras(tmp_path: Path, write_lerobot: Write, edit_info: Edit) -> None:
    cameras = {f"observation.images.{name}": "video" for name in ("front", "depth")}
    root = write_lerobot(tmp_path, cameras=cameras)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.images.depth"]["info"] = {"video.is_depth_map": True}
    edit_info(root, features=features)
    assert LeRobotSource(root).index().cameras == ("front",)
    assert "no camera 'depth'" in refusal(root, cameras=["depth"])


def test_one_of_our_names_mapped_twice_is_a_usage_error(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path)
    twice = {"state": "observation.state", "observation.state": "action"}
    with pytest.raises(UsageError, match="names 'state' twice"):
        LeRobotSource(root, map=twice).index()


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path, write_lerobot: Write) -> None:
    spec = {"dtype": "float32", "shape": [1], "names": None}
    extra = {"Reward": (spec, lambda e, f: 0.0), "reward": (spec, lambda e, f: 1.0)}
    root = write_lerobot(tmp_path, extra=extra)
    assert "differ in case only" in refusal(root)
    assert "second" in LeRobotSource(root, map={"second": "Reward"}).index().steps


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "new\nline", "zarr.json", "nul\0"])
def test_columns_whose_name_cannot_be_a_file_are_refused_with_the_map(
    name: str, tmp_path: Path, write_lerobot: Write
) -> None:
    spec = {"dtype": "float32", "shape": [1], "names": None}
    root = write_lerobot(tmp_path, extra={name: (spec, lambda e, f: 0.0)})
    assert f"--map NEW_NAME={name!r}" in refusal(root)
    assert "extra" in LeRobotSource(root, map={"extra": name}).index().steps
