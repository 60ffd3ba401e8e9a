"""OpenTrackVLA's demonstrations: raw videos, folders of pictures, and what make_tracking_data.py prepares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.sources.registry import open_source
from vla.featurize.sources.trackvla import TrackVLASource
from vla.featurize.sources.waypoints import integrate_waypoints
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Any]
EPISODES = ("seed_100/scene A/2", "seed_100/scene A/10", "seed_200/scène/0")
LENGTHS = (14, 6, 11)


def velocities_of(episode: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(episode).normal(size=(LENGTHS[episode], 3)).astype(np.float32)


def write_meta(folder: Path, stem: str, episode: int, **status: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": n, "dis_to_human": 2.0, "facing": True, "base_velocity": velocity}
        for n, velocity in enumerate(velocities_of(episode).tolist(), 1)
    ]
    (folder / f"{stem}_info.json").write_text(json.dumps(steps))
    known = {"finish": True, "status": "Normal", "success": episode != 1, "following_rate": 0.5, "collision": False}
    known |= {"instruction": f"follow person {episode} é"}
    (folder / f"{stem}.json").write_text(json.dumps({**known, **status}))


@pytest.fixture
def raw(tmp_path: Path, write_video: Write, picture: Write) -> Path:
    """`sim_data/train/seed_X/SCENE/EP.mp4` at 30 frames a second, whatever dt is."""
    root = tmp_path / "raw"
    for episode, name in enumerate(EPISODES):
        path = root / "sim_data/train" / name
        write_meta(path.parent, path.name, episode)
        shots = [picture(episode, frame, 0) for frame in range(LENGTHS[episode])]
        write_video(path.with_name(f"{path.name}.mp4"), shots, fps=30)
    return root


@pytest.fixture
def frames(tmp_path: Path, write_pictures: Write) -> Path:
    """`seed_X/SCENE/EP/frame_00001.jpg` beside EP_info.json."""
    root = tmp_path / "frames root"
    for episode, name in enumerate(EPISODES):
        path = root / name
        write_meta(path.parent, path.name, episode)
        write_pictures(path, episode, LENGTHS[episode], name="frame_{:05d}.jpg", first=1)
    return root


def samples_of(episode: int, **extra: Any) -> list[dict[str, Any]]:
    """Return what make_tracking_data.py writes: a sample for each frame with a whole horizon of 8 after it."""
    actions = velocities_of(episode).tolist()
    folder = f"frames/{EPISODES[episode]}"
    paths = [f"{folder}/frame_{n + 1:05d}.jpg" for n in range(len(actions))]
    return [
        {
            "images": paths[max(0, j - 31) : j],
            "current": paths[j],
            "instruction": f"follow person {episode} é",
            "trajectory": [[0.0, 0.0, 0.0]] * 9,
            "actions": actions[j : j + 9],
            "collision": False,
            "target_distance": 2.0,
            **extra,
        }
        for j in range(len(actions) - 8)
    ]


def write_samples(root: Path, episode: int, samples: list[dict[str, Any]]) -> Path:
    file = root / "jsonl" / f"{EPISODES[episode]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return file


@pytest.fixture
def prepared(tmp_path: Path, write_pictures: Write) -> Path:
    """Episodes 0 and 2, long enough for a horizon; dataset.json repeats the samples, as upstream does."""
    root = tmp_path / "prepared"
    for episode in (0, 2):
        folder = root / "frames" / EPISODES[episode]
        write_pictures(folder, episode, LENGTHS[episode], name="frame_{:05d}.jpg", first=1)
        write_samples(root, episode, samples_of(episode))
    (root / "dataset.json").write_text(json.dumps(samples_of(0) + samples_of(2)))
    return root


def check_episode(source: Any, position: int, episode: int, number_of: Write) -> None:
    """Compare steps and pictures of one episode with what was written."""
    steps = source.steps(position)
    length = LENGTHS[episode]
    np.testing.assert_array_equal(steps["action"], velocities_of(episode))
    waypoints, valid = integrate_waypoints(velocities_of(episode), length, 8, 0.1)
    np.testing.assert_array_equal(steps["waypoints"], waypoints)
    np.testing.assert_array_equal(steps["waypoints_valid"], valid)
    np.testing.assert_allclose(steps["timestamp"], np.arange(length) / 10)
    assert [number_of(views[0]) for views in source.frames(position, 0, length)] == [
        (episode, frame, 0) for frame in range(length)
    ]


@pytest.mark.parametrize("layout", ["raw", "frames"])
def test_raw_episodes_give_their_frames_velocities_and_waypoints(
    layout: str, number_of: Write, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(layout)
    source = open_source(root)
    assert isinstance(source, TrackVLASource)
    index = source.index()
    split = "train/" if layout == "raw" else ""
    assert [e.id for e in index.episodes] == [f"{split}{name}" for name in EPISODES]
    assert [e.length for e in index.episodes] == list(LENGTHS)
    assert index.episodes[2].task == "follow person 2 é"
    assert dict(index.episodes[1].texts) == {
        "success": "false",
        "status": "Normal",
        "finish": "true",
        "following_rate": "0.5",
        "collision": "false",
    }
    assert (index.cameras, index.fps) == (("rgb",), 10.0)
    assert {name: (step.shape, step.dtype, step.role) for name, step in index.steps.items()} == {
        "action": ((3,), "float32", "action"),
        "waypoints": ((8, 3), "float32", "other"),
        "waypoints_valid": ((8,), "bool", "other"),
        "timestamp": ((), "float64", "other"),
        "frame_index": ((), "int64", "other"),
    }
    for position in range(3):
        check_episode(source, position, position, number_of)


def test_a_split_folder_or_the_seeds_above_it_may_be_named(raw: Path) -> None:
    for root in (raw / "sim_data", raw / "sim_data/train"):
        source = open_source(root)
        assert isinstance(source, TrackVLASource)
        assert source.index().episodes[0].id.endswith(EPISODES[0])


def test_info_json_may_lie_among_the_pictures(frames: Path, number_of: Write) -> None:
    for name in EPISODES:
        path = frames / name
        path.with_name(f"{path.name}_info.json").rename(path / "info.json")
    source = open_source(frames)
    assert [episode.id for episode in source.index().episodes] == list(EPISODES)
    check_episode(source, 1, 1, number_of)


def test_prepared_episodes_give_every_frame_also_those_that_no_sample_is_of(prepared: Path, number_of: Write) -> None:
    source = open_source(prepared)
    assert isinstance(source, TrackVLASource)
    index = source.index()
    assert [(e.id, e.length, e.task) for e in index.episodes] == [
        (EPISODES[0], 14, "follow person 0 é"),
        (EPISODES[2], 11, "follow person 2 é"),
    ]
    check_episode(source, 0, 0, number_of)
    check_episode(source, 1, 2, number_of)


def test_given_waypoints_and_masks_count_and_frames_without_a_sample_are_not_valid(prepared: Path) -> None:
    samples = samples_of(0)
    for j, sample in enumerate(samples):
        sample["waypoints"] = np.full((8, 3), j).tolist()
        sample |= {"valid_mask": [j != 1] * 4 + [True] * 4} if j % 2 else {"valid_idx": [0, 7]}
    write_samples(prepared, 0, samples)
    steps = open_source(prepared).steps(0)
    assert steps["waypoints"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, *[0] * 8]
    valid = steps["waypoints_valid"]
    assert valid[0].tolist() == [True, *[False] * 6, True]
    assert valid[1].tolist() == [False] * 4 + [True] * 4
    assert valid[3].all()
    assert not valid[6:].any()


def test_a_given_mask_narrows_integrated_waypoints(prepared: Path) -> None:
    samples = samples_of(0)
    samples[2]["valid_mask"] = [True, False] * 4
    write_samples(prepared, 0, samples)
    valid = open_source(prepared).steps(0)["waypoints_valid"]
    assert valid[2].tolist() == [True, False] * 4
    assert valid[1].all()
    assert valid[13].tolist() == [True, True, *[False] * 6]


def test_dt_and_horizon_are_options_and_part_of_what_a_store_is_bound_to(raw: Path) -> None:
    source = TrackVLASource(raw, dt=0.2, horizon=4)
    np.testing.assert_array_equal(
        source.steps(0)["waypoints"], integrate_waypoints(velocities_of(0), LENGTHS[0], 4, 0.2)[0]
    )
    assert source.index().fps == 5.0
    assert source.index().mapping != TrackVLASource(raw).index().mapping


def test_only_success_leaves_out_the_others_and_says_so(raw: Path) -> None:
    index = TrackVLASource(raw, only_success=True).index()
    assert [episode.id for episode in index.episodes] == [f"train/{EPISODES[0]}", f"train/{EPISODES[2]}"]
    assert index.skipped == {f"train/{EPISODES[1]}": "10.json says success = False (source_options.only_success)"}


def test_only_success_is_refused_where_nothing_tells_of_it(raw: Path, prepared: Path) -> None:
    with pytest.raises(SourceError, match=r"jsonl says nothing of success.*--only_success"):
        TrackVLASource(prepared, only_success=True).index()
    path = raw / "sim_data/train" / EPISODES[0]
    path.with_name("2.json").write_text(json.dumps({"instruction": "x", "success": "yes"}))
    with pytest.raises(SourceError, match=r"2\.json: success is 'yes'"):
        TrackVLASource(raw, only_success=True).index()


@pytest.mark.parametrize("layout", ["raw", "frames"])
@pytest.mark.parametrize("change", [-2, 3])
def test_frames_and_steps_that_differ_in_number_are_refused_unless_a_rule_is_given(
    layout: str, change: int, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(layout)
    info = next(root.rglob("0_info.json"))
    steps = json.loads(info.read_text())
    info.write_text(
        json.dumps(steps[:change] if change < 0 else steps + [{**steps[-1], "step": n} for n in (12, 13, 14)])
    )
    named = r"0\.mp4 has 11" if layout == "raw" else "0/ has 11"
    with pytest.raises(SourceError, match=rf"0_info\.json has {11 + change}, {named}.*align=truncate"):
        TrackVLASource(root).index()
    index = TrackVLASource(root, skip_bad=True).index()
    assert list(index.skipped) == [next(name for name in index.skipped if name.endswith(EPISODES[2]))]
    source = TrackVLASource(root, align="truncate")
    length = min(11, 11 + change)
    assert source.index().episodes[2].length == length
    valid = source.steps(2)["waypoints_valid"]
    assert valid[-1].tolist() == ([True] * 4 + [False] * 4 if change > 0 else [True, True, *[False] * 6])


def test_prepared_frames_beyond_the_samples_are_refused_unless_truncated(prepared: Path, write_pictures: Write) -> None:
    write_pictures(prepared / "frames" / EPISODES[0], 0, 2, name="frame_{:05d}.jpg", first=15)
    with pytest.raises(SourceError, match=r"2\.jsonl has 14, frames/seed_100/scene A/2 has 16.*align=truncate"):
        TrackVLASource(prepared).index()
    assert TrackVLASource(prepared, align="truncate").index().episodes[0].length == 14


def test_a_task_serves_episodes_without_instruction(raw: Path) -> None:
    (raw / "sim_data/train/seed_200/scène/0.json").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*0\.json: No such file"):
        TrackVLASource(raw).index()
    assert TrackVLASource(raw, task="follow").index().episodes[2].task == "follow"
    (raw / "sim_data/train/seed_200/scène/0.json").write_text('{"success": true}')
    with pytest.raises(SourceError, match=r"0\.json has no instruction.*source_options\.task="):
        TrackVLASource(raw).index()


def without(position: int, key: str) -> Callable[[list[Any]], Any]:
    def remove(items: list[Any]) -> None:
        del items[position][key]

    return remove


def edit_info(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "0_info.json"
        steps = json.loads(file.read_text())
        changed = change(steps)
        file.write_text(json.dumps(steps if changed is None else changed))

    return edit


def link_out(name: str) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        outside = folder.parents[3].parent / f"outside {name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return move


BAD_RAW: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no video": (lambda f: (f / "0.mp4").unlink(), r"0\.mp4 is missing; expected it, or pictures"),
    "no mp4": (lambda f: (f / "0.mp4").write_bytes(b"GIF89a" * 99), r"0\.mp4"),
    "cut": (lambda f: (f / "0.mp4").write_bytes((f / "0.mp4").read_bytes()[:600]), r"0\.mp4"),
    "video out": (link_out("0.mp4"), r"0\.mp4' in .* leads out of it"),
    "info out": (link_out("0_info.json"), r"0_info\.json' in .* leads out of it"),
    "status out": (link_out("0.json"), r"0\.json' in .* leads out of it"),
    "not json": (lambda f: (f / "0_info.json").write_text("[{"), r"0_info\.json is not JSON; expected a list of steps"),
    "no list": (edit_info(lambda s: {"steps": s}), r"0_info\.json holds no list of steps"),
    "zero steps": (edit_info(lambda s: []), r"0_info\.json holds no list of steps"),
    "no velocity": (edit_info(without(4, "base_velocity")), r"entry 4: base_velocity is None"),
    "two numbers": (edit_info(lambda s: s[4].update(base_velocity=[0, 1])), r"entry 4: base_velocity is \[0, 1\]"),
    "nan": (edit_info(lambda s: s[4]["base_velocity"].__setitem__(0, float("nan"))), r"base_velocity, frame 4 is NaN"),
    "step missing": (edit_info(lambda s: s[:4] + s[5:]), r"entry 4: step is 6; expected 5"),
    "status no object": (lambda f: (f / "0.json").write_text("[]"), r"0\.json holds a list; expected an object"),
}


@pytest.mark.parametrize("what", BAD_RAW)
def test_a_bad_raw_episode_is_refused_naming_the_file_and_skip_bad_leaves_it_alone_out(what: str, raw: Path) -> None:
    damage, pattern = BAD_RAW[what]
    damage(raw / "sim_data/train/seed_200/scène")
    with pytest.raises(SourceError) as refused:
        TrackVLASource(raw).index()
    assert re.search(pattern, str(refused.value)), refused.value
    index = TrackVLASource(raw, skip_bad=True).index()
    assert [episode.id for episode in index.episodes] == [f"train/{name}" for name in EPISODES[:2]]
    assert index.skipped == {f"train/{EPISODES[2]}": str(refused.value)}


def test_a_video_and_pictures_of_one_episode_are_refused(raw: Path, write_pictures: Write) -> None:
    write_pictures(raw / "sim_data/train/seed_200/scène/0", 2, 11)
    with pytest.raises(SourceError, match=r"0\.mp4 and pictures in .* are both there"):
        TrackVLASource(raw).index()


def link_samples_out(root: Path) -> None:
    file = root / f"jsonl/{EPISODES[2]}.jsonl"
    file.rename(root.parent / "outside.jsonl")
    file.symlink_to(root.parent / "outside.jsonl")


def edit_samples(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        samples = json.loads(json.dumps(samples_of(2)))  # upstream's lists share no memory
        changed = change(samples)
        write_samples(root, 2, samples if changed is None else changed)

    return edit


BAD_PREPARED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no jsonl": (lambda r: (r / f"jsonl/{EPISODES[2]}.jsonl").unlink(), r"cannot read .*0\.jsonl"),
    "link out": (link_samples_out, r"0\.jsonl' in .* leads out of it"),
    "no samples": (edit_samples(lambda s: []), r"0\.jsonl has no samples"),
    "not json": (
        lambda r: (r / f"jsonl/{EPISODES[2]}.jsonl").write_text("{}\n{"),
        r"0\.jsonl, line 2 is not JSON",
    ),
    "no current": (edit_samples(without(1, "current")), r"line 2 has no current"),
    "no instruction": (edit_samples(without(1, "instruction")), r"line 2 has no instruction"),
    "no actions": (edit_samples(without(1, "actions")), r"line 2 has no actions"),
    "flat actions": (edit_samples(lambda s: s[1].update(actions=[1, 2, 3])), r"line 2: actions of shape \(3,\)"),
    "nan": (edit_samples(lambda s: s[1]["actions"][0].__setitem__(0, float("nan"))), r"line 2: actions is NaN"),
    "other instruction": (edit_samples(lambda s: s[2].update(instruction="x")), r"line 3: instruction 'x'"),
    "other episode": (
        edit_samples(lambda s: s[1].update(current=f"frames/{EPISODES[0]}/frame_00002.jpg")),
        r"line 2: current is .*; expected a frame of seed_200",
    ),
    "no such frame": (
        edit_samples(lambda s: s[1].update(current=f"frames/{EPISODES[2]}/frame_00099.jpg")),
        r"line 2: there is no frame 'frame_00099'",
    ),
    "contradiction": (edit_samples(lambda s: s[1]["actions"].__setitem__(0, [9, 9, 9])), r"line 2: another velocity"),
    "gap": (
        edit_samples(lambda s: [s[0] | {"actions": s[0]["actions"][:1]}, s[2]]),
        r"0\.jsonl has no velocity of frame 1",
    ),
    "other dt": (edit_samples(lambda s: s[1].update(dt=0.2)), r"line 2: dt = 0\.2; expected 0\.1.*options\.dt=0\.2"),
    "some waypoints": (edit_samples(lambda s: s[1].update(waypoints=[[0, 0, 0]] * 8)), r"line 2 has waypoints"),
    "few waypoints": (
        edit_samples(lambda s: [x | {"waypoints": [[0, 0, 0]] * 7} for x in s]),
        r"line 1: waypoints of shape \(7, 3\); expected \(8, 3\)",
    ),
    "bad mask": (edit_samples(lambda s: s[1].update(valid_mask=[1, 2])), r"line 2: valid_mask is \[1, 2\]"),
    "bad positions": (edit_samples(lambda s: s[1].update(valid_idx=[8])), r"line 2: valid_idx is \[8\]"),
    "frame lost": (
        lambda r: (r / f"frames/{EPISODES[2]}/frame_00004.jpg").unlink(),
        r"has frame 5 after 3; expected 4",
    ),
    "no number": (
        lambda r: (r / f"frames/{EPISODES[2]}/cover.jpg").write_bytes(
            (r / f"frames/{EPISODES[2]}/frame_00001.jpg").read_bytes()
        ),
        r"cover\.jpg has no number",
    ),
    "corrupt": (
        lambda r: (r / f"frames/{EPISODES[2]}/frame_00001.jpg").write_bytes(b"\xff\xd8"),
        r"frame_00001\.jpg, camera rgb, seed_200.*cannot be decoded",
    ),
}


@pytest.mark.parametrize("what", BAD_PREPARED)
def test_a_bad_prepared_episode_is_refused_naming_the_file_and_skip_bad_leaves_it_alone_out(
    what: str, prepared: Path
) -> None:
    damage, pattern = BAD_PREPARED[what]
    damage(prepared)
    with pytest.raises(SourceError) as refused:
        TrackVLASource(prepared).index()
    assert re.search(pattern, str(refused.value)), refused.value
    index = TrackVLASource(prepared, skip_bad=True).index()
    assert [episode.id for episode in index.episodes] == [EPISODES[0]]
    assert index.skipped == {EPISODES[2]: str(refused.value)}


@pytest.mark.parametrize("folder", ["frames", "jsonl"])
def test_a_folder_that_leads_out_of_the_data_set_is_refused(folder: str, prepared: Path) -> None:
    (prepared / folder).rename(prepared.parent / "outside")
    (prepared / folder).symlink_to(prepared.parent / "outside")
    with pytest.raises(SourceError, match=rf"{folder}' in .* leads out of it"):
        TrackVLASource(prepared).index()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dt": 0}, "seconds a step"),
        ({"dt": "0.1"}, "seconds a step"),
        ({"horizon": 1}, "a count from 2"),
        ({"horizon": 8.0}, "a count from 2"),
        ({"align": "pad"}, "refuse or truncate"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        TrackVLASource(tmp_path, **options)


def test_a_folder_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no episode; expected jsonl/seed_X/SCENE/EP\.jsonl"):
        TrackVLASource(tmp_path).index()


def test_the_digest_covers_pictures_numbers_and_texts(raw: Path) -> None:
    digest = TrackVLASource(raw).digest()
    for name in ("0.json", "0_info.json", "0.mp4"):
        file = raw / "sim_data/train/seed_200/scène" / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert TrackVLASource(raw).digest() != digest
        file.write_bytes(before)
    assert TrackVLASource(raw).digest() == digest
