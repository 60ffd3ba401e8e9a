"""Plain folders of pictures and .npy files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.sources.folders import FoldersSource
from vla.featurize.sources.registry import open_source
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., None]
LENGTHS = (4, 12, 5)
NAMES = ("demo_1", "demo 2 é", "demo_10")
"""With a space and an accent; `demo_10` sorts before `demo_2` as text."""


def actions_of(episode: int) -> np.ndarray[Any, Any]:
    frames = np.arange(LENGTHS[episode])
    return np.stack([frames + 100 * episode, -frames, frames / 7], axis=1)


@pytest.fixture
def root(tmp_path: Path, write_pictures: Write) -> Path:
    top = tmp_path / "demos with space"
    for episode, name in enumerate(NAMES):
        for camera, view in enumerate(("front", "wrist cam")):
            write_pictures(top / name / view, episode, LENGTHS[episode], camera, "im{}.jpg" if camera else "{}.png")
        np.save(top / name / "actions.npy", actions_of(episode))
        np.save(top / name / "state.npy", np.full((LENGTHS[episode], 2), episode, np.int64))
        (top / name / "instruction.txt").write_text(f" do thing {episode} – ü\n", encoding="utf-8")
    return top


def test_every_frame_is_the_one_that_its_step_belongs_to(root: Path, number_of: Callable[..., Any]) -> None:
    source = open_source(root, fps=10)
    assert isinstance(source, FoldersSource)
    index = source.index()
    ids = ["demo 2 é", "demo_1", "demo_10"]
    assert [(e.id, e.length) for e in index.episodes] == [(name, LENGTHS[NAMES.index(name)]) for name in ids]
    assert index.cameras == ("front", "wrist cam")
    assert index.episodes[0].task == "do thing 1 – ü"
    for position, name in enumerate(ids):
        episode = NAMES.index(name)
        steps = source.steps(position)
        np.testing.assert_array_equal(steps["action"], actions_of(episode).astype(np.float32))
        assert steps["state"].dtype == np.float32
        np.testing.assert_allclose(steps["timestamp"], np.arange(LENGTHS[episode]) / 10)
        seen = [[number_of(image) for image in views] for views in source.frames(position, 1, LENGTHS[episode])]
        assert seen == [[(episode, f, 0), (episode, f, 1)] for f in range(1, LENGTHS[episode])]


def test_cameras_are_chosen_in_the_order_asked_for(root: Path, number_of: Callable[..., Any]) -> None:
    source = FoldersSource(root, fps=10, cameras=["wrist cam", "front"])
    assert source.index().cameras == ("wrist cam", "front")
    assert [number_of(image)[2] for image in next(source.frames(1, 0, 1))] == [1, 0]
    with pytest.raises(SourceError, match=r"has no camera 'side'; it has front, wrist cam"):
        FoldersSource(root, fps=10, cameras=["side"]).index()
    with pytest.raises(UsageError, match="distinct names"):
        FoldersSource(root, fps=10, cameras=["front", "front"])


def test_map_takes_other_files_for_action_and_state_and_adds_columns(root: Path) -> None:
    for episode, name in enumerate(NAMES):
        np.save(root / name / "joint_action.npy", actions_of(episode) * 2)
        np.save(root / name / "force.npy", actions_of(episode)[:, 0])
    source = FoldersSource(root, fps=10, map={"action": "joint_action", "force": "force.npy"})
    assert source.index().steps["force"].shape == (1,)
    np.testing.assert_array_equal(source.steps(1)["action"], (actions_of(0) * 2).astype(np.float32))
    assert source.index().mapping == {"action": "joint_action.npy", "force": "force.npy"}


def test_one_task_serves_the_episodes_that_have_no_instruction(root: Path) -> None:
    (root / "demo_1/instruction.txt").unlink()
    with pytest.raises(SourceError, match=r"demo_1/instruction\.txt is missing.*source_options\.task="):
        FoldersSource(root, fps=10).index()
    tasks = [episode.task for episode in FoldersSource(root, fps=10, task="tidy up").index().episodes]
    assert tasks == ["do thing 1 – ü", "tidy up", "do thing 2 – ü"]


def test_the_digest_changes_with_any_file_that_is_used_and_with_no_other(root: Path) -> None:
    digest = FoldersSource(root, fps=10).digest()
    (root / "demo_1/notes.md").write_text("nothing")
    assert FoldersSource(root, fps=10).digest() == digest
    for name in ("actions.npy", "state.npy", "instruction.txt", "front/2.png", "wrist cam/im3.jpg"):
        file = root / "demo_1" / name
        before = file.read_bytes()
        if file.suffix == ".npy":
            np.save(file, np.load(file) + 1)
        elif file.suffix == ".txt":
            file.write_text("something else")
        else:
            file.write_bytes(before + b"\0")
        assert FoldersSource(root, fps=10).digest() != digest, name
        file.write_bytes(before)
    assert FoldersSource(root, fps=10).digest() == digest


def save_objects(folder: Path) -> None:
    np.save(folder / "actions.npy", np.array([[1, None, "x"]] * 12, object), allow_pickle=True)


def link_out(folder: Path) -> None:
    outside = folder.parents[1] / "outside.npy"
    (folder / "actions.npy").rename(outside)
    (folder / "actions.npy").symlink_to(outside)


def link_camera_out(folder: Path) -> None:
    outside = folder.parents[1] / "outside"
    (folder / "front").rename(outside)
    (folder / "front").symlink_to(outside)


def mutate(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        np.save(folder / file, change(np.load(folder / file).astype(np.float64)))

    return edit


def with_value(value: float) -> Callable[[Any], Any]:
    def put(array: Any) -> Any:
        array[7, 0] = value
        return array

    return put


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "too few actions": (
        mutate("actions.npy", lambda a: a[:9]),
        r"actions\.npy has 9, state\.npy has 12, front has 12, wrist cam has 12; expected one frame for each step",
    ),
    "too few states": (mutate("state.npy", lambda a: a[:9]), r"actions\.npy has 12, state\.npy has 9"),
    "a picture lost": (lambda f: (f / "front/5.png").unlink(), r"front has 11"),
    "no pictures": (lambda f: [p.unlink() for p in (f / "front").iterdir()], r"has cameras wrist cam; expected front"),
    "camera missing": (lambda f: (f / "wrist cam").rename(f / "hand"), r"has cameras front, hand; expected front, wr"),
    "two of a name": (lambda f: (f / "front/5.jpg").write_bytes(b""), r"holds 5\.jpg and 5\.png|5\.png and 5\.jpg"),
    "corrupt first": (lambda f: (f / "front/0.png").write_bytes(b"no"), r"front/0\.png, camera front.*cannot be dec"),
    "nan": (mutate("actions.npy", with_value(np.nan)), r"actions\.npy, frame 7 is NaN or infinite"),
    "infinite state": (mutate("state.npy", with_value(np.inf)), r"state\.npy, frame 7 is NaN or infinite"),
    "beyond float32": (mutate("actions.npy", with_value(1e39)), r"actions\.npy, frame 7 is NaN or infinite"),
    "objects": (save_objects, r"actions\.npy holds values of dtype object; expected numbers, never pickled"),
    "no npy": (lambda f: (f / "actions.npy").write_bytes(b"\x80\x04."), r"actions\.npy is no \.npy array"),
    "empty npy": (lambda f: (f / "actions.npy").write_bytes(b""), r"actions\.npy is no \.npy array"),
    "a pipe": (
        lambda f: [(f / "actions.npy").unlink(), os.mkfifo(f / "actions.npy")],
        r"actions\.npy is no regular file",
    ),
    "no frames": (mutate("actions.npy", lambda a: a[:0]), r"actions\.npy has shape \(0, 3\); expected \[T, D\]"),
    "three axes": (mutate("actions.npy", lambda a: a[None]), r"actions\.npy has shape \(1, 12, 3\)"),
    "other width": (mutate("actions.npy", lambda a: a[:, :2]), r"has action \[2\].*expected action \[3\]"),
    "no actions": (lambda f: (f / "actions.npy").unlink(), r"actions\.npy is missing; .* holds state\.npy.*--map act"),
    "two states": (lambda f: np.save(f / "qpos.npy", np.ones((12, 2))), r"state\.npy and qpos\.npy.*--map state=qpos"),
    "no state": (lambda f: (f / "state.npy").unlink(), r"has action \[3\]; expected action \[3\], state \[2\], as"),
    "empty text": (lambda f: (f / "instruction.txt").write_text(" \n"), r"instruction\.txt is empty"),
    "latin text": (lambda f: (f / "instruction.txt").write_bytes(b"\xff\xfe\xfa"), r"cannot read .*instruction\.txt"),
    "link out": (link_out, r"actions\.npy' in .* leads out of it, to .*outside\.npy.*cp -rL"),
    "camera out": (link_camera_out, r"front' in .* leads out of it"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_episode_is_refused_naming_the_file_and_skip_bad_leaves_it_alone_out(what: str, root: Path) -> None:
    damage, pattern = BAD[what]
    damage(root / NAMES[1])
    with pytest.raises(SourceError) as refused:
        FoldersSource(root, fps=10).index()
    message = str(refused.value)
    assert re.search(pattern, message), message
    assert NAMES[1] in message
    assert "\n" not in message
    index = FoldersSource(root, fps=10, skip_bad=True).index()
    assert [episode.id for episode in index.episodes] == ["demo_1", "demo_10"]
    assert index.skipped == {NAMES[1]: message}


def test_a_header_that_declares_more_than_the_file_holds_allocates_nothing(
    root: Path, cut_header: Callable[[Path, tuple[int, ...]], None]
) -> None:
    cut_header(root / "demo_1/actions.npy", (1 << 40, 1 << 20))
    with pytest.raises(SourceError, match=r"actions\.npy has \d+ bytes; expected 4611686018427\d+ as its header says"):
        FoldersSource(root, fps=10).index()


@pytest.mark.parametrize("damage", ["corrupt", "smaller"])
def test_a_picture_that_is_bad_later_on_is_refused_when_it_is_read(
    damage: str, root: Path, picture: Callable[..., Any], encoded: Callable[..., bytes]
) -> None:
    data = {
        "corrupt": encoded(picture(1, 6, 0))[:80],
        "smaller": encoded(picture(1, 6, 0)[:32, :32]),
    }[damage]
    (root / NAMES[1] / "front/6.png").write_bytes(data)
    source = FoldersSource(root, fps=10)
    assert len(list(source.frames(0, 0, 6))) == 6
    pattern = {"corrupt": "cannot be decoded", "smaller": "has 32 x 32 pixels; expected 64 x 64"}
    with pytest.raises(SourceError, match=rf"6\.png, camera front, {NAMES[1]}, frame 6.*{pattern[damage]}"):
        list(source.frames(0, 6, 7))


def test_an_episode_of_other_resolution_than_most_is_refused(
    root: Path, picture: Callable[..., Any], encoded: Callable[..., bytes]
) -> None:
    for file in (root / "demo_1/front").iterdir():
        file.write_bytes(encoded(picture(0, 0, 0)[:48]))
    with pytest.raises(SourceError, match=r"demo_1, camera front has 64 x 48 pixels; expected 64 x 64, as demo 2 é"):
        FoldersSource(root, fps=10).index()


def test_a_folder_without_episodes_and_one_whose_episodes_are_all_bad_are_refused(tmp_path: Path, root: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no folder"):
        FoldersSource(tmp_path / "empty", fps=10).index()
    for name in NAMES:
        (root / name / "actions.npy").unlink()
    with pytest.raises(SourceError, match=r"no episode of .* is left; the first: .*actions\.npy is missing"):
        FoldersSource(root, fps=10, skip_bad=True).index()


def test_a_name_that_no_store_can_keep_is_refused(root: Path) -> None:
    (root / "demo_1").rename(root / "line\nbreak")
    with pytest.raises(SourceError, match=r"holds the name 'line\\nbreak'.*rename it"):
        FoldersSource(root, fps=10).index()


def test_options_that_mean_nothing_are_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="frames per second"):
        FoldersSource(root, fps=0)
    with pytest.raises(UsageError, match="--map timestamp"):
        FoldersSource(root, fps=10, map={"timestamp": "clock"})
    with pytest.raises(SourceError, match=r"frames 0 to 13 of demo 2 é"):
        FoldersSource(root, fps=10).frames(0, 0, 13)
