"""Options of sources that are empty, zero or left out: an empty one is a value, and nothing is assumed in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.job import FeaturizeConfig, prepare
from vla.featurize.sources.registry import open_source
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Any]
KINDS = ["lerobot", "folders", "hierarchical", "robomimic", "replay-buffer", "robotwin"]


def _write_numbers(root: Path, pictures: int = 4) -> None:
    """Write three [4, H, W, 3] arrays with actions to an HDF5 file or a ReplayBuffer, by the suffix of `root`."""
    frames = np.random.default_rng(0).integers(0, 256, (pictures, 16, 16, 3), np.uint8)
    if root.suffix == ".hdf5":
        with h5py.File(root, "w") as file:
            file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            file["data/demo_0/actions"] = np.zeros((4, 2))
            file["data/demo_0/obs/agentview_image"] = frames
        return
    group = zarr.open_group(root, mode="a", zarr_format=2)
    for name, values in {"data/img": frames, "data/action": np.ones((4, 2), "f4"), "meta/episode_ends": [4]}.items():
        array = np.asarray(values)
        group.create_array(name, shape=array.shape, dtype=array.dtype, compressors=numcodecs.Zstd())[:] = array


@pytest.fixture
def made(tmp_path: Path, write_lerobot: Write, write_pictures: Write) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """`made(kind)` writes a small data set and returns its path and the options that it needs."""

    def write(kind: str) -> tuple[Path, dict[str, Any]]:
        root = tmp_path / "set"
        if kind == "lerobot":
            return write_lerobot(root, lengths=(4, 5)), {}
        if kind in ("robomimic", "replay-buffer"):
            path = root.with_suffix(".hdf5" if kind == "robomimic" else "")
            _write_numbers(path)
            return path, {"fps": 10}
        run = root / ("demo" if kind == "folders" else "task/part/run_0")
        if kind == "robotwin":
            write_pictures(root / "images/episode0/head_camera", 0, 4, name="step_{:04d}.png")
            (root / "data").mkdir()
            with h5py.File(root / "data/episode0.hdf5", "w") as file:
                for arm in ("left", "right"):
                    file[f"joint_action/{arm}_arm"] = np.arange(24.0).reshape(4, 6)
            return root, {"task": "lift"}
        write_pictures(run / "front", 0, 4)
        np.save(run / "actions.npy", np.zeros((4, 2), np.float32))
        return root, {"fps": 10, **({"task": "lift"} if kind == "folders" else {})}

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_list_of_cameras_opens_the_numbers_alone(
    kind: str, made: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    root, options = made(kind)
    source = open_source(root, **options, cameras=[])
    index = source.index()
    assert (index.cameras, index.pictures) == ((), False)
    assert len(source.steps(0)["action"]) == index.episodes[0].length
    with pytest.raises(SourceError, match="cameras"):
        next(iter(source.frames(0, 0, 1)))
    with pytest.raises(UsageError, match="cameras"):
        prepare(FeaturizeConfig(source=str(root), backbone="toy", source_options={**options, "cameras": []}))


def test_numbers_alone_are_inspected_without_pictures(write_lerobot: Write, tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set")
    done = CliRunner().invoke(app, ["inspect", "--source", str(root), "--set", "source_options.cameras=[]", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["cameras"] == []
    assert "pictures" not in facts


@pytest.mark.parametrize("kind", ["folders", "hierarchical", "replay-buffer"])
def test_a_rate_that_no_file_states_has_to_be_given(
    kind: str, made: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    root, options = made(kind)
    assert open_source(root, **options).index().fps == 10
    del options["fps"]
    with pytest.raises((UsageError, SourceError), match="fps"):
        open_source(root, **options).index()


def test_a_default_of_the_format_that_no_file_states_is_listed_as_assumed(
    made: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    root, options = made("robotwin")
    assert open_source(root, **options).index().assumed.keys() == {"fps"}
    assert open_source(root, **options, fps=30).index().assumed == {}
    done = CliRunner().invoke(
        app,
        [
            "featurize",
            "--source",
            str(root),
            "--backbone",
            "toy",
            "--out",
            str(tmp_path),
            "--set",
            "source_options.task=x",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "assumed: fps = 15" in done.stderr.casefold()


@pytest.mark.parametrize("key", ["weights", "options.weights"])
def test_an_empty_text_does_not_stand_for_the_default(key: str) -> None:
    done = CliRunner().invoke(
        app, ["featurize", "--backbone", "vggt", "--source", "synthetic", "--dry-run", "--set", f"{key}="]
    )
    assert isinstance(done.exception, UsageError), done.output
    assert "weights" in str(done.exception)
