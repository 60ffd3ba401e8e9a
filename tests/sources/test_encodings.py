"""Zarr and HDF5 files that leave out, or write otherwise, what their formats allow; Git-LFS pointers in their place."""

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

from vla.featurize.caches.arrays import ArraysCache
from vla.featurize.caches.zarr_arrays import open_zarr_array
from vla.featurize.sources.files import read_json, read_numbers, read_text
from vla.featurize.sources.pickles import load_pickle
from vla.featurize.sources.replay_buffer import ReplayBufferSource
from vla.featurize.sources.robomimic import RobomimicSource
from vla.featurize.sources.robotwin_hdf5 import read_demo
from vla.pretrained.hub import read_json as read_config
from vla.pretrained.hub import weight_files
from vla.pretrained.weights import read_tensors
from vla.stores.errors import PointerError, SourceError

ACTION = np.arange(24, dtype=np.float32).reshape(12, 2) + 1
PIXELS = np.arange(12 * 4 * 5 * 3).reshape(12, 4, 5, 3).astype(np.uint8) | 1
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def write_buffer(root: Path, **how: Any) -> Path:
    """Write a replay buffer of two episodes; `how` goes to zarr for the array of actions."""
    group = zarr.open_group(root, mode="w", zarr_format=2)
    for name, values in {"data/img": PIXELS, "meta/episode_ends": np.array([5, 12])}.items():
        group.create_array(name, data=values)
    dtype = how.pop("dtype", "<f4")
    action = group.create_array("data/action", shape=ACTION.shape, dtype=dtype, **{"chunks": (5, 2)} | how)
    action[:] = ACTION
    return root


def edit_array(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = root / "data/action/.zarray"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


ZARRS: dict[str, dict[str, Any]] = {
    "big-endian": {"dtype": ">f4"},
    "order F": {"order": "F"},
    "no compressor": {"compressors": None},
    "zlib": {"compressors": numcodecs.Zlib(1)},
    "fill value null": {"fill_value": None},
    "a delta filter": {"filters": [numcodecs.Delta(dtype="<f4")]},
    "a shuffle filter": {"filters": [numcodecs.Shuffle(4)]},
    "doubles": {"dtype": "<f8"},
    "whole numbers": {"dtype": "|u1"},
    "one chunk": {"chunks": (12, 2)},
}


@pytest.mark.parametrize("how", ZARRS)
def test_a_zarr_v2_array_is_read_however_it_is_encoded(how: str, tmp_path: Path) -> None:
    source = ReplayBufferSource(write_buffer(tmp_path / "a.zarr", **ZARRS[how]), fps=10)
    np.testing.assert_array_equal(source.steps(1)["action"], ACTION[5:])


def test_a_zarr_v2_array_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", fill_value=None)
    for key in ("dimension_separator", "filters"):
        edit_array(root, lambda found, key=key: found.pop(key, None) and None)
    for file in root.rglob(".zattrs"):
        file.unlink()
    np.testing.assert_array_equal(ReplayBufferSource(root, fps=10).steps(0)["action"], ACTION[:5])


def test_consolidated_metadata_and_nested_chunks_are_read(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", chunk_key_encoding={"name": "v2", "separator": "/"})
    zarr.consolidate_metadata(root, zarr_format=2)
    np.testing.assert_array_equal(ReplayBufferSource(root, fps=10).steps(0)["action"], ACTION[:5])


def test_a_chunk_that_zarr_left_out_is_its_fill_value_when_that_is_asked_for(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", fill_value=0.5)
    whole = ReplayBufferSource(root, fps=10, empty_chunks="fill").digest()
    (root / "data/action/1.0").unlink()
    with pytest.raises(SourceError, match=r"1\.0.*empty_chunks=fill"):
        ReplayBufferSource(root, fps=10).index()
    source = ReplayBufferSource(root, fps=10, empty_chunks="fill")
    np.testing.assert_array_equal(source.steps(1)["action"], [*np.full((5, 2), 0.5), *ACTION[10:]])
    assert source.digest() != whole
    edit_array(root, lambda found: found.update(fill_value=None))
    with pytest.raises(SourceError, match=r"1\.0"):
        ReplayBufferSource(root, fps=10, empty_chunks="fill").index()


def test_filters_that_make_objects_are_never_run(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr")
    edit_array(root, lambda found: found.update(filters=[{"id": "pickle", "protocol": 5}]))
    with pytest.raises(SourceError, match="pickle"):
        ReplayBufferSource(root, fps=10).index()


def write_demos(path: Path, put: Callable[[h5py.Group, str, Any], Any], env_args: Any = None) -> Path:
    with h5py.File(path, "w") as file:
        stated = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        data = file.create_group("data")
        data.attrs["env_args"] = stated if env_args is None else env_args(stated)
        for demo in ("demo_0", "demo_1"):
            put(data.create_group(demo), "actions", ACTION)
            data[demo].create_dataset("obs/front_image", data=PIXELS)
    return path


def committed(group: h5py.Group, name: str, values: Any) -> None:
    if "/real" not in group.file:
        group.file["real"] = np.dtype(">f8")
    group.create_dataset(name, data=values, dtype=group.file["real"])


def compact(group: h5py.Group, name: str, values: Any) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.IEEE_F32LE, space, plist).write(
        h5py.h5s.ALL, h5py.h5s.ALL, values
    )


HDF5S: dict[str, Callable[[h5py.Group, str, Any], Any]] = {
    "contiguous": lambda group, name, values: group.create_dataset(name, data=values),
    "chunked": lambda group, name, values: group.create_dataset(name, data=values, chunks=(5, 1), compression="gzip"),
    "compact": compact,
    "committed type": committed,
    "big-endian": lambda group, name, values: group.create_dataset(name, data=values, dtype=">f4"),
    "halves": lambda group, name, values: group.create_dataset(name, data=values, dtype="f2"),
    "uint16": lambda group, name, values: group.create_dataset(name, data=values, dtype=">u2"),
    "growing": lambda group, name, values: group.create_dataset(name, data=values, maxshape=(None, 2), fletcher32=True),
}


@pytest.mark.parametrize("how", HDF5S)
def test_an_hdf5_array_is_read_however_it_is_laid_out(how: str, tmp_path: Path) -> None:
    source = RobomimicSource(write_demos(tmp_path / "a.hdf5", HDF5S[how]))
    np.testing.assert_array_equal(source.steps(1)["action"], ACTION)


def test_booleans_of_hdf5_are_numbers(tmp_path: Path) -> None:
    source = RobomimicSource(write_demos(tmp_path / "a.hdf5", lambda g, n, v: g.create_dataset(n, data=v > 5)))
    np.testing.assert_array_equal(source.steps(0)["action"], ACTION > 5)


ATTRIBUTES: dict[str, Callable[[str], Any]] = {
    "text": str,
    "bytes": lambda text: np.bytes_(text.encode()),
    "an array of one": lambda text: np.array([text.encode()]),
    "an array of one text": lambda text: np.array([text], h5py.string_dtype()),
}


@pytest.mark.parametrize("how", ATTRIBUTES)
def test_a_text_attribute_is_read_however_it_is_written(how: str, tmp_path: Path) -> None:
    source = RobomimicSource(write_demos(tmp_path / "a.hdf5", HDF5S["contiguous"], ATTRIBUTES[how]))
    assert source.index().fps == 20
    assert source.index().episodes[0].task == "lift the cube"


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "npy": ("a.npy", read_numbers),
    "json": ("a.json", lambda path: read_json(path, "facts")),
    "text": ("a.txt", read_text),
    "pickle": ("a.pkl", load_pickle),
    "robomimic": ("a.hdf5", lambda path: RobomimicSource(path).index()),
    "robotwin": ("a.hdf5", lambda path: read_demo(path, ["left"])),
    "zarr": (".zarray", lambda path: open_zarr_array(path.parent)),
    "array": ("a.npy", lambda path: ArraysCache(path.parent, skip_bad=True).index()),
    "tensors": ("a.safetensors", lambda path: ArraysCache(path.parent, skip_bad=True).index()),
    "weights": ("a.safetensors", read_tensors),
    "pickled weights": ("a.pth", read_tensors),
    "config": ("config.json", read_config),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_pointer_as_what_it_is(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(PointerError, match=r"lfs pull"):
        read(tmp_path / name)


def test_a_model_whose_weights_are_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(PointerError):
        weight_files(tmp_path)


def test_a_chunk_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", compressors=None)
    (root / "data/action/1.0").write_text(POINTER)
    with pytest.raises(PointerError):
        ReplayBufferSource(root, fps=10).index()
