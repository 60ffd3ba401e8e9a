"""From RoboTwin files of every form to a store: `vla featurize --backbone toy`, and a head's window out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.sources.registry import open_source
from vla.stores.errors import SourceError, UsageError
from vla.stores.store import open_store

Write = Callable[..., Path]
Joints = Callable[..., NDArray[np.float64]]


def featurize(source: Path | str, out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    arguments = ["featurize", "--backbone", "toy", "--source", str(source), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, [*arguments, *(text for option in options for text in ("--set", option))])
    assert done.exit_code == code, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _made(
    form: str, root: Path, write_task: Write, write_plans: Write, write_images: Write, joints: Joints
) -> tuple[Path, tuple[str, ...]]:
    """Make data of a form; return the source and the options that it needs."""
    if form in ("old", "new"):
        return write_task(root / "task", generation=form, lengths=(4, 5)), ()
    if form == "tasks":
        for name in ("a", "b"):
            write_task(root / "all" / name, lengths=(4,))
        return root / "all", ()
    if form == "planner over a file":
        source = write_task(root / "task", lengths=(4,))
        write_plans(source, [([joints("left", 0, 9)], [joints("right", 0, 7)])])
        chosen = ("actions=planner", "resample=linear", "include_gripper=false")
        return source, tuple(f"source_options.{option}" for option in chosen)
    source = write_plans(root / "task", [([joints("left", n, 4 + n)], [joints("right", n, 4 + n)]) for n in range(2)])
    write_images(source / "images", [4, 5], ("front", "wrist"))
    return source, ()


@pytest.mark.parametrize("form", ["old", "new", "tasks", "planner over a file", "planner over folders"])
def test_every_form_becomes_a_store(
    form: str, tmp_path: Path, write_task: Write, write_plans: Write, write_images: Write, joints: Joints
) -> None:
    root, options = _made(form, tmp_path, write_task, write_plans, write_images, joints)
    report = featurize(root, tmp_path / "stores", *options)
    chosen = {text.split(".")[1].split("=")[0]: text.split("=")[1] for text in options}
    source = open_source(root, **{key: False if value == "false" else value for key, value in chosen.items()})
    index = source.index()
    store = open_store(tmp_path / "stores/toy")
    assert report["frames"] == store.manifest.rows == sum(episode.length for episode in index.episodes)
    assert report["skipped"] == {}
    assert list(store.episodes.ids) == [episode.id for episode in index.episodes]
    assert store.manifest.steps["action"].names == index.steps["action"].names
    assert store.manifest.fps == index.fps
    wanted = np.concatenate([source.steps(n)["action"] for n in range(len(index.episodes))])
    np.testing.assert_array_equal(store.steps("action"), wanted)


def test_bad_pictures_and_bad_numbers_are_left_out_and_counted(tmp_path: Path, write_task: Write) -> None:
    def edit(number: int, file: h5py.File) -> None:
        if number == 0:
            file["joint_action/left_arm"][1] = np.nan
        if number == 2:
            file["observation/head_camera/rgb"][1] = b"torn"

    root = write_task(tmp_path / "task", edit=edit)
    report = featurize(root, tmp_path / "stores", "skip_bad=true")
    assert set(report["skipped"]) == {"episode_0", "episode_2"}
    assert "left_arm, frame 1 is NaN" in report["skipped"]["episode_0"]
    assert "rgb, frame 1 cannot be decoded" in report["skipped"]["episode_2"]
    with pytest.raises(SourceError, match="frame 1 is NaN"):
        CliRunner().invoke(
            app,
            ["featurize", "--backbone", "toy", "--source", str(root), "--out", str(tmp_path / "b")],
            catch_exceptions=False,
        )
    assert not (tmp_path / "b").exists()


def test_paths_without_pictures_are_no_input_of_a_backbone(tmp_path: Path, write_plans: Write, joints: Joints) -> None:
    root = write_plans(tmp_path / "task", [([joints("left", 0, 4)], [joints("right", 0, 4)])])
    with pytest.raises(UsageError, match="'toy' needs image of each frame"):
        CliRunner().invoke(
            app,
            ["featurize", "--backbone", "toy", "--source", str(root), "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )
