"""`vla featurize` on each source whose episodes are files of their own: command in, complete store out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.sources.registry import open_source
from vla.stores.errors import SourceError
from vla.stores.store import Store, open_store
from vla.stores.verify import verify_store

Write = Callable[..., Any]
Make = Callable[[Path], list[str]]
LENGTHS = (5, 9, 7)


@pytest.fixture
def make(write_pictures: Write, write_video: Write, picture: Write) -> dict[str, Make]:
    """`make[kind](root)` writes three episodes of a kind and returns the options it needs."""

    def folders(root: Path) -> list[str]:
        for episode, length in enumerate(LENGTHS):
            write_pictures(root / f"demo {episode}/front", episode, length)
            np.save(root / f"demo {episode}/actions.npy", np.full((length, 2), episode, np.float32))
        return ["--set", "source_options.task=tidy up", "--set", "source_options.fps=10"]

    def hierarchical(root: Path) -> list[str]:
        for episode, length in enumerate(LENGTHS):
            run = root / f"stage{episode + 1}/run_0"
            write_pictures(run / "left_frame", episode, length)
            np.save(run / "actions.npy", np.full((length, 2), episode, np.float32))
            np.save(run / "qpos.npy", np.full((length, 3), episode, np.float32))
        entries = [{"stage": n + 1, "subtask": f"part {n % 2}"} for n in range(3)]
        entries[2]["high_level_task"] = "another"
        file = root.parent / "instruction.json"
        file.write_text(json.dumps({"high_level_task": "all of it", "task_instructions": entries}))
        return ["--set", f"source_options.instruction_json={file}", "--set", "source_options.fps=50"]

    def trackvla(root: Path) -> list[str]:
        folder = root / "sim_data/train/seed_1/scene"
        folder.mkdir(parents=True)
        for episode, length in enumerate(LENGTHS):
            write_video(folder / f"{episode}.mp4", [picture(episode, frame, 0) for frame in range(length)])
            steps = [{"base_velocity": [episode, 0, 0.5]}] * length
            (folder / f"{episode}_info.json").write_text(json.dumps(steps))
            (folder / f"{episode}.json").write_text(json.dumps({"success": 1, "instruction": "follow"}))
        return []

    return {"folders": folders, "hierarchical": hierarchical, "trackvla": trackvla}


def featurize(root: Path, out: Path, *options: str) -> tuple[Store, dict[str, Any]]:
    """Run the command and return the store and its report."""
    command = ["featurize", "--backbone", "toy", "--source", str(root), "--out", str(out), "--json", *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    return open_store(report["out"]), report


@pytest.mark.parametrize("kind", ["folders", "hierarchical", "trackvla"])
def test_a_raw_folder_becomes_a_complete_store_with_its_steps(kind: str, make: dict[str, Make], tmp_path: Path) -> None:
    root = tmp_path / "raw data"
    options = make[kind](root)
    store, _ = featurize(root, tmp_path / "stores", *options)
    assert store.complete
    assert verify_store(store.root).findings == []
    assert store.manifest.fingerprint["source"]["kind"] == kind
    source = open_source(root, **_given(options))
    for position, episode in enumerate(source.index().episodes):
        rows = slice(int(store.episodes.row_start[position]), int(store.episodes.row_start[position]) + episode.length)
        assert store.episodes.ids[position] == episode.id
        for name, values in source.steps(position).items():
            np.testing.assert_array_equal(store.steps(name)[rows], values)


def _given(options: list[str]) -> dict[str, str]:
    return {key.removeprefix("source_options."): value for key, _, value in (o.partition("=") for o in options[1::2])}


def test_the_pair_of_task_and_subtask_reaches_the_store(make: dict[str, Make], tmp_path: Path) -> None:
    options = make["hierarchical"](tmp_path / "raw")
    store, _ = featurize(tmp_path / "raw", tmp_path / "stores", *options)
    table = store.episodes
    assert table.tasks == ("part 0", "part 1")
    pairs = [(table.texts(n)["high_level_task"], table.texts(n)["subtask"]) for n in range(3)]
    assert pairs == [("all of it", "part 0"), ("all of it", "part 1"), ("another", "part 0")]


def test_waypoints_reach_the_store_with_their_mask(make: dict[str, Make], tmp_path: Path) -> None:
    make["trackvla"](tmp_path / "raw")
    store, _ = featurize(tmp_path / "raw", tmp_path / "stores")
    waypoints, valid = store.steps("waypoints"), store.steps("waypoints_valid")
    assert (waypoints.shape, waypoints.dtype) == ((21, 8, 3), np.float32)
    assert (valid.shape, valid.dtype) == ((21, 8), np.bool_)
    ends = np.cumsum(LENGTHS) - 1
    assert valid[ends].sum(axis=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", ["folders", "hierarchical", "trackvla"])
def test_skip_bad_counts_an_episode_found_bad_at_once_and_one_found_bad_on_the_way(
    kind: str, make: dict[str, Make], tmp_path: Path
) -> None:
    root = tmp_path / "raw"
    options = make[kind](root)
    if kind == "trackvla":
        folder = root / "sim_data/train/seed_1/scene"
        (folder / "0_info.json").write_text("[]")
        video = (folder / "2.mp4").read_bytes()
        at = video.index(b"mdat") + 400
        (folder / "2.mp4").write_bytes(video[:at] + bytes(600) + video[at + 600 :])
    else:
        first, last = (
            (next(root.glob(pattern)) for pattern in ("*0*", "*2*"))
            if kind == "folders"
            else (
                root / "stage1/run_0",
                root / "stage3/run_0",
            )
        )
        np.save(first / "actions.npy", np.full((5, 2), np.nan))
        next(last.rglob("4.jpg")).write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(SourceError):
        featurize(root, tmp_path / "refused", *options)
    assert not (tmp_path / "refused").exists()
    store, report = featurize(root, tmp_path / "stores", "--skip-bad", *options)
    assert len(report["skipped"]) == 2
    assert int(store.usable.sum()) == 1
    assert store.complete
