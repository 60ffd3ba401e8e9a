"""Our stores in other people's readers: the same values, or the test says which package is not there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.store import open_store

EVERY_DTYPE = {
    "grid": ((2, 3, 4), "float16"),
    "pooled": ((2, 5), "float32"),
    "tokens": ((2, 2, 3), "bfloat16"),
    "small": ((2, 6), "int8"),
}
FORMS = ("zarr", "zstd", "plain-zarr")
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> dict[str, Path]:
    """`{form: folder}` of one store in every zarr form, and in h5."""
    folder = tmp_path_factory.mktemp("foreign")
    make_store(folder / "zarr", features=EVERY_DTYPE)
    targets = {
        "zstd": {"format": "zarr", "compression": "zstd"},
        "plain-zarr": {"format": "plain-zarr", "compression": "zstd"},
        "h5": {"format": "h5"},
    }
    for name, options in targets.items():
        convert_store(folder / "zarr", folder / name, ConvertOptions.build(options))
    return {name: folder / name for name in ("zarr", *targets)}


def wanted(stores: dict[str, Path]) -> dict[str, np.ndarray[Any, Any]]:
    store = open_store(stores["zarr"])
    arrays = {f"frames/{name}": store.read(name, np.arange(20)) for name in EVERY_DTYPE}
    return arrays | {f"steps/{name}": store.steps(name) for name in store.manifest.steps}


@every_form
def test_zarr_python(stores: dict[str, Path], form: str) -> None:
    group = zarr.open_group(stores[form], mode="r")
    for path, values in wanted(stores).items():
        read = group[path][:]
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)


@every_form
def test_xarray(stores: dict[str, Path], form: str) -> None:
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    for group in ("frames", "steps"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about consolidated metadata, which a store does not have
            opened = xarray.open_zarr(stores[form] / group, consolidated=False, mask_and_scale=False, chunks=None)
        for path, values in wanted(stores).items():
            if path.startswith(group):
                array = opened[path.partition("/")[2]]
                assert array.dims[0] == "row"
                np.testing.assert_array_equal(array.values, values)


@every_form
def test_zarrs(stores: dict[str, Path], form: str) -> None:
    pytest.importorskip("zarrs", reason="zarrs is not installed")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.open_group(stores[form], mode="r")
        for path, values in wanted(stores).items():
            np.testing.assert_array_equal(group[path][:], values)


@every_form
def test_tensorstore(stores: dict[str, Path], form: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    for path, values in wanted(stores).items():
        store = {"driver": "file", "path": str(stores[form] / path)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
        np.testing.assert_array_equal(array.read().result(), values)


def test_h5py(stores: dict[str, Path]) -> None:
    units = sorted((stores["h5"] / "units").iterdir())
    for path, values in wanted(stores).items():
        parts = []
        for unit in units:
            with h5py.File(unit) as file:
                parts.append(file[path][:])
        np.testing.assert_array_equal(np.concatenate(parts), values)


def test_a_flipped_bit_is_noticed_by_foreign_readers_too(stores: dict[str, Path], tmp_path: Path) -> None:
    """`crc32c` in every chunk is zarr's own: whoever reads our shards checks it."""
    import shutil

    shutil.copytree(stores["zarr"], tmp_path / "s")
    shard = tmp_path / "s/frames/grid/c.1.0.0.0"
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(tmp_path / "s", mode="r")["frames/grid"][:]
