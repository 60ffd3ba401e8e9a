"""What an HDF5 file holds beside the numbers that are read: texts, structures, records that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.featurize.caches.robomimic import RobomimicCache
from vla.featurize.sources.robomimic import RobomimicSource
from vla.stores.errors import SourceError

ACTION = np.arange(24, dtype=np.float32).reshape(12, 2) + 1
PIXELS = np.arange(12 * 4 * 5 * 3).reshape(12, 4, 5, 3).astype(np.uint8) | 1
DEMOS = ("demo_0", "demo_1")


def write_demos(path: Path, edit: Callable[[h5py.File], None], action: Any = ACTION) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for demo in DEMOS:
            data.create_dataset(f"{demo}/actions", data=action)
            data.create_dataset(f"{demo}/obs/front_image", data=PIXELS)
            data.create_dataset(f"{demo}/obs/robot0_eef_pos", data=ACTION)
        edit(file)
    return path


def beside(name: str, value: Callable[[h5py.File], Any]) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        for demo in DEMOS:
            file[f"data/{demo}/obs/{name}"] = value(file)

    return edit


ODD: dict[str, Callable[[h5py.File], Any]] = {
    "texts": lambda file: np.array(["a"] * 12, dtype=h5py.string_dtype()),
    "one text": lambda file: "lift",
    "complex numbers": lambda file: np.zeros(12, "c8"),
    "structures": lambda file: np.zeros(12, [("x", "f4"), ("y", "f4")]),
    "a reference": lambda file: file["data"].ref,
    "bytes": lambda file: np.void(b"abc"),
    "nothing": lambda file: h5py.Empty("f4"),
    "a type": lambda file: np.dtype("f8"),
    "one number": lambda file: 3.0,
}


@pytest.mark.parametrize("what", ODD)
def test_observations_that_are_no_numbers_do_no_harm(what: str, tmp_path: Path) -> None:
    source = RobomimicSource(write_demos(tmp_path / "a.hdf5", beside("odd", ODD[what])))
    assert [episode.length for episode in source.index().episodes] == [12, 12]
    with pytest.raises((SourceError, ValueError), match="odd"):
        RobomimicSource(tmp_path / "a.hdf5", state=["odd"]).index()


def test_a_gripper_of_one_number_is_part_of_the_state(tmp_path: Path) -> None:
    gripper = np.linspace(0, 1, 12, dtype=np.float32)
    path = write_demos(tmp_path / "a.hdf5", beside("robot0_gripper_qpos", lambda file: gripper))
    source = RobomimicSource(path)
    np.testing.assert_array_equal(source.steps(1)["state"], np.c_[ACTION, gripper])
    cache = RobomimicCache(
        path, features={"feature": "robot0_eef_pos"}, state=["robot0_eef_pos", "robot0_gripper_qpos"]
    )
    np.testing.assert_array_equal(cache.steps(1)["state"], np.c_[ACTION, gripper])


def test_an_action_of_one_number_is_a_vector_of_one(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "a.hdf5", lambda file: None, ACTION[:, 0])
    np.testing.assert_array_equal(RobomimicSource(path).steps(0)["action"], ACTION[:, :1])
    cache = RobomimicCache(path, features={"feature": "robot0_eef_pos"})
    assert cache.index().steps["action"].shape == (1,)
    np.testing.assert_array_equal(cache.steps(0)["action"], ACTION[:, :1])


@pytest.mark.parametrize("stated", ["13", b"13", np.array([13.0]), 13])
def test_a_length_is_compared_however_the_file_writes_it(stated: Any, tmp_path: Path) -> None:
    def edit(file: h5py.File) -> None:
        file["data/demo_1"].attrs["num_samples"] = stated

    path = write_demos(tmp_path / "a.hdf5", edit)
    with pytest.raises(SourceError, match="demo_1"):
        RobomimicSource(path).index()
    with pytest.raises(SourceError, match="demo_1"):
        RobomimicCache(path, features={"feature": "robot0_eef_pos"}).index()
    assert list(RobomimicSource(path, skip_bad=True).index().skipped) == ["demo_1"]


@pytest.mark.parametrize("name", ["rewards", "dones", "obs/other", "states"])
def test_arrays_of_another_length_beside_those_that_are_read_are_a_warning(name: str, tmp_path: Path) -> None:
    def edit(file: h5py.File) -> None:
        for demo in DEMOS:
            file[f"data/{demo}/{name}"] = np.zeros((12 if demo == "demo_0" else 11, 3))

    warnings = RobomimicSource(write_demos(tmp_path / "a.hdf5", edit)).index().warnings
    assert len(warnings) == 1
    assert f"demo_1/{name}" in warnings[0]
