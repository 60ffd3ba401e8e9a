"""Where each thing of a store lies, and the zarr v3 metadata that lets any zarr reader open it.

    zarr.json                      root group; the manifest in its attributes
    episodes/*, tasks/*, labels/*  see tables.py
    commits/unit-NNNNNN.json       see commits.py
    commits/writer.lock            empty; locked by the one writer

and the units, in the form that the manifest names: formats/zarr_shards.py, formats/hdf5_units.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.manifest import Manifest
from vla.stores.tables import LABELS, TABLES, TEXTS

COMMITS = "commits"
LOCK = f"{COMMITS}/writer.lock"
CLAIMS = f"{COMMITS}/claims.lock"
METADATA = "zarr.json"
RECORD_NAME = re.compile(r"unit-(\d{6,})\.json")
"""File names of commit records; the group is the unit."""

TABLE_FOLDERS = frozenset(table.partition("/")[0] for table in (*TABLES, *LABELS))


def commit_file(unit: int) -> str:
    """Path of a unit's commit record."""
    return f"{COMMITS}/unit-{unit:06d}.json"


def table_file(table: str) -> str:
    """Path of the only chunk of a table."""
    return f"{table}/c" + ".0" * (2 if table in TEXTS else 1)


def is_metadata(path: str) -> bool:
    """Whether a path in a store is one that opening reads: `zarr.json` files, tables and commit records.

    Every other file of a store belongs to a unit, or is a lock. Copies of a store's metadata are chosen by this
    function alone, so that a new table is part of them.
    """
    folder, _, name = path.rpartition("/")
    if folder == COMMITS:
        return RECORD_NAME.fullmatch(name) is not None
    return name == METADATA or path in _TABLE_FILES


_TABLE_FILES = frozenset(map(table_file, (*TABLES, *LABELS)))


def table_metadata(tables: dict[str, NDArray[np.generic]]) -> dict[str, dict[str, Any]]:
    """Return `array_options` of the episode and task tables, by path."""
    arrays = {}
    for path, table in tables.items():
        dims = (path.partition("/")[0].removesuffix("s"), "byte")[: table.ndim]
        arrays[path] = array_options(table.shape, str(table.dtype), table.shape, dims)
    return arrays


def array_options(shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], dims: tuple[str, ...]) -> dict[str, Any]:
    """Return keyword arguments of zarr's `create_array`; NaN fills what is never written, 0 where there is no NaN."""
    floating = np.issubdtype(np.dtype(dtype), np.floating)
    return {
        "shape": shape,
        "dtype": dtype,
        "chunks": chunks,
        "dimension_names": dims,
        "fill_value": float("nan") if floating else 0,
    }


def write_metadata(
    root: Path,
    manifest: Manifest,
    tables: dict[str, NDArray[np.generic]],
    arrays: dict[str, dict[str, Any]],
    folders: tuple[str, ...],
) -> None:
    """Write the group and array metadata and the tables, made by zarr-python, into the folder `root`.

    `arrays` are those of the store's form (`zstd_level` where rows are compressed), `folders` its folders. Made in
    memory and written here: zarr's own file store needs hard links, and after an error its background tasks go on
    writing into a folder that has been given up.
    """
    import zarr
    from zarr.abc.buffer import Buffer
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=manifest.attributes())
    for path, options in (arrays | table_metadata(tables)).items():
        options = dict(options)
        level = options.pop("zstd_level", None)
        array = group.create_array(
            path,
            compressors=[Crc32cCodec()] if level is None else [ZstdCodec(level=level), Crc32cCodec()],
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
            **options,
        )
        if path in tables:
            array[...] = tables[path]
    for folder in (COMMITS, *folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path, content in sorted(files.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.to_bytes())
