"""Files that belong to no episode, and places that are one step away from a data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.robotwin import RoboTwinSource
from vla.featurize.sources.trackvla import TrackVLASource
from vla.stores.errors import PointerError, SourceError

Write = Callable[..., Path]
FRONT = "observation.images.front"


def write_raw(root: Path, episode: int, picture: Any, write_video: Any, **how: Any) -> Path:
    folder = root / "seed_1/SCENE"
    folder.mkdir(parents=True, exist_ok=True)
    steps = [{"base_velocity": [0.1, 0, frame], "step": frame} for frame in range(6)]
    (folder / f"{episode}_info.json").write_text(json.dumps(steps))
    (folder / f"{episode}.json").write_text(json.dumps({"instruction": "follow", "success": True}))
    write_video(folder / f"{episode}.mp4", [picture(episode, frame, 0) for frame in range(6)], **how)
    return folder


def test_a_video_without_steps_is_a_bad_episode(tmp_path: Path, picture: Any, write_video: Any) -> None:
    for episode in (0, 1):
        folder = write_raw(tmp_path, episode, picture, write_video)
    (folder / "1_info.json").unlink()
    with pytest.raises(SourceError, match=r"1_info\.json"):
        TrackVLASource(tmp_path).index()
    index = TrackVLASource(tmp_path, skip_bad=True).index()
    assert [episode.id for episode in index.episodes] == ["seed_1/SCENE/0"]
    assert list(index.skipped) == ["seed_1/SCENE/1"]


def test_a_video_of_its_own_is_read_frame_by_frame_whatever_its_clock(
    tmp_path: Path, picture: Any, write_video: Any, number_of: Any
) -> None:
    write_raw(tmp_path, 0, picture, write_video, times=[0, 1, 5, 6, 7, 20])
    frames = TrackVLASource(tmp_path).frames(0, 0, 6)
    assert [number_of(images[0])[:2] for images in frames] == [(0, frame) for frame in range(6)]


@pytest.mark.parametrize("stray", ["instructions/episode5.json", "_traj_data/episode5.pkl", "images/episode5/0000.png"])
def test_files_of_an_episode_without_data_are_a_warning(stray: str, tmp_path: Path, picture: Any, encoded: Any) -> None:
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data/episode0.hdf5", "w") as file:
        for side in ("left", "right"):
            file[f"joint_action/{side}_arm"], file[f"joint_action/{side}_gripper"] = np.zeros((6, 6)), np.zeros(6)
        shots = [encoded(picture(0, frame, 0), "JPEG") for frame in range(6)]
        file["observation/head_camera/rgb"] = np.array(shots, dtype=f"S{max(map(len, shots))}")
    assert RoboTwinSource(tmp_path, task="lift").index().warnings == ()
    (tmp_path / stray).parent.mkdir(parents=True)
    (tmp_path / stray).write_bytes(b"{}")
    warnings = RoboTwinSource(tmp_path, task="lift").index().warnings
    assert len(warnings) == 1
    assert "episode5" in warnings[0]


def test_the_root_of_a_repository_in_the_hubs_cache_names_its_snapshot(tmp_path: Path, write_lerobot: Write) -> None:
    repository = tmp_path / "datasets--me--pears"
    write_lerobot(repository / "snapshots/0123abc", version="v2.1")
    with pytest.raises(SourceError, match="snapshots/0123abc"):
        open_source(repository)


def test_a_zip_names_the_command_that_unpacks_it(tmp_path: Path) -> None:
    (tmp_path / "a.zarr.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match="unzip"):
        open_source(tmp_path / "a.zarr.zip")


def test_pointers_of_the_first_git_lfs_are_pointers(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    text = f"version https://hawser.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    next(root.glob("videos/*/*/*")).write_text(text)
    with pytest.raises(PointerError):
        LeRobotSource(root).index()


def test_a_camera_is_found_under_each_of_its_names(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version="v2.1")
    video = {"ego": {"original_key": FRONT}, "head": {"original_key": FRONT}}
    (root / "meta/modality.json").write_text(json.dumps({"video": video}))
    for name in ("ego", "head", "front", FRONT):
        assert len(LeRobotSource(root, cameras=[name]).index().cameras) == 1
    with pytest.raises(SourceError, match="twice"):
        LeRobotSource(root, cameras=["ego", "head"]).index()
