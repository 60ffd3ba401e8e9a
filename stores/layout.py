"""Where each thing of a store lies, and the zarr v3 metadata that lets any zarr reader open it.

    zarr.json                      root group; the manifest in its attributes
    frames/<feature>   [rows, V, ...]   sharded: one shard = one unit, inner chunk = one row, `bytes` + `crc32c`
    steps/<name>       [rows, ...]      one chunk = one unit, `bytes` + `crc32c`
    checksums/<feature>[rows]           crc32c of each row, uint32; the commit holds this file's digest
    stats/<feature>    [units, 5, C]    see statistics.py; one chunk = one unit
    episodes/*, tasks/*                 see tables.py
    commits/unit-NNNNNN.json            see commits.py
    commits/writer.lock                 empty; locked by the one writer

Chunk keys use '.' as separator, so that one folder per array has to be made durable, not one per unit.
Floating-point arrays are filled with NaN: a foreign reader that reaches a row never committed sees no plausible number.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.manifest import Manifest
from vla.stores.shard import CRC_BYTES, index_bytes
from vla.stores.statistics import MOMENTS

COMMITS = "commits"
LOCK = f"{COMMITS}/writer.lock"


def feature_file(feature: str, unit: int, ndim: int) -> str:
    """Path of the shard that holds a unit of a feature whose rows have `ndim` axes."""
    return f"frames/{feature}/c.{unit}" + ".0" * ndim


def step_file(name: str, unit: int, ndim: int) -> str:
    """Path of the chunk that holds a unit of a step array."""
    return f"steps/{name}/c.{unit}" + ".0" * ndim


def checksum_file(feature: str, unit: int) -> str:
    """Path of the checksums of a unit of a feature."""
    return f"checksums/{feature}/c.{unit}"


def statistics_file(feature: str, unit: int) -> str:
    """Path of the statistics of a unit of a feature."""
    return f"stats/{feature}/c.{unit}.0.0"


def commit_file(unit: int) -> str:
    """Path of a unit's commit record."""
    return f"{COMMITS}/unit-{unit:06d}.json"


def unit_files(manifest: Manifest, unit: int) -> dict[str, range]:
    """Return `{path: possible sizes in bytes}` of every file of a unit but its commit record."""
    slots, files = manifest.unit_rows, {}
    for name, info in manifest.features.items():
        rows = len(manifest.unit_range(unit))
        sizes = [index_bytes(slots) + kept * (info.row_bytes + CRC_BYTES) for kept in (0, 1, rows)]
        files[feature_file(name, unit, len(info.shape))] = range(sizes[0], sizes[2] + 1, sizes[1] - sizes[0])
        files[checksum_file(name, unit)] = _exactly(4 * slots)
        files[statistics_file(name, unit)] = _exactly(8 * len(MOMENTS) * info.shape[-1])
    for name, step in manifest.steps.items():
        size = slots * math.prod(step.shape) * np.dtype(step.dtype).itemsize
        files[step_file(name, unit, len(step.shape))] = _exactly(size)
    return files


def _exactly(size: int) -> range:
    return range(size + CRC_BYTES, size + CRC_BYTES + 1)


def array_metadata(manifest: Manifest, tables: dict[str, NDArray[np.generic]]) -> dict[str, dict[str, Any]]:
    """Return `{array path: keyword arguments of zarr's create_array}` for a whole store."""
    rows, unit = manifest.rows, manifest.unit_rows
    arrays: dict[str, dict[str, Any]] = {}
    for name, feature in manifest.features.items():
        channels = feature.shape[-1]
        arrays[f"frames/{name}"] = {
            **_array((rows, *feature.shape), feature.dtype, (1, *feature.shape), ("row", *feature.dims)),
            "shards": (unit, *feature.shape),
        }
        arrays[f"checksums/{name}"] = _array((rows,), "uint32", (unit,), ("row",))
        shape = (manifest.units, len(MOMENTS), channels)
        arrays[f"stats/{name}"] = _array(shape, "float64", (1, *shape[1:]), ("unit", "moment", "channel"))
    for name, step in manifest.steps.items():
        dims = ("row", *(f"{name}_{axis}" for axis in range(len(step.shape))))
        arrays[f"steps/{name}"] = _array((rows, *step.shape), step.dtype, (unit, *step.shape), dims)
    return arrays | table_metadata(tables)


def table_metadata(tables: dict[str, NDArray[np.generic]]) -> dict[str, dict[str, Any]]:
    """Return the part of `array_metadata` that describes the episode and task tables."""
    arrays = {}
    for path, table in tables.items():
        dims = ("episode" if path.startswith("episodes/") else "task", "byte")[: table.ndim]
        arrays[path] = _array(table.shape, str(table.dtype), table.shape, dims)
    return arrays


def _array(shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], dims: tuple[str, ...]) -> dict[str, Any]:
    floating = np.issubdtype(np.dtype(dtype), np.floating)
    return {
        "shape": shape,
        "dtype": dtype,
        "chunks": chunks,
        "dimension_names": dims,
        "fill_value": float("nan") if floating else 0,
    }


def write_metadata(root: Path, manifest: Manifest, tables: dict[str, NDArray[np.generic]]) -> None:
    """Write the group and array metadata and the tables, made by zarr-python, into the folder `root`.

    Made in memory and written here: zarr's own file store needs hard links, and after an error its background tasks
    go on writing into a folder that has been given up.
    """
    import zarr
    from zarr.abc.buffer import Buffer
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=manifest.attributes())
    for path, options in array_metadata(manifest, tables).items():
        array = group.create_array(
            path,
            compressors=Crc32cCodec(),
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
            **options,
        )
        if path in tables:
            array[...] = tables[path]
    (root / COMMITS).mkdir(parents=True, exist_ok=True)
    for path, content in sorted(files.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.to_bytes())
