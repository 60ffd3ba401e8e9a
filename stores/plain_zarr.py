"""A store as plain zarr v3: one array a feature and a step, regular chunks, no commits, for tools that know no store.

    frames/<feature> [rows, V, ...]   as stored: uint16 for bfloat16, int8 beside its scales (attribute `dtype`)
    steps/<name> [rows, ...]   scales/<feature> [units, C], attribute `unit_rows`   episodes/*, tasks/*   see tables.py

The manifest stands in the root's attributes as `vla_plain`. Written under a temporary name and renamed when whole:
what has no commits cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla.stores.dtypes import FILL
from vla.stores.errors import StoreError, UsageError
from vla.stores.filesystem import PARTIAL, explaining, fsync_dir, fsync_tree, writer_lock
from vla.stores.formats.registry import format_of
from vla.stores.layout import COMMITS, LOCK, array_options, table_metadata
from vla.stores.manifest import Compression, Manifest
from vla.stores.metadata import read_json
from vla.stores.owned import STORE, delete_folder, doomed, remove_debris, remove_owned, require_debris, require_owned
from vla.stores.store import Store

CHUNK_BYTES = 4 << 20
"""Aimed at for a chunk: few enough files, small enough pieces for a reader that wants single rows."""


def write_plain(
    store: Store,
    out: Path,
    compression: Compression,
    *,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> list[int]:
    """Write a complete store as plain zarr v3 at `out`; return the units written.

    Raises `UsageError` for `resume` and where `out` exists without `overwrite`, `StoreError` where what is there was
    not written by this function.
    """
    if resume:
        raise UsageError("plain zarr has no commits, so it cannot be resumed", fix="--overwrite")
    out = out.resolve()  # behind a link, the folder is replaced where the link leads
    partial = out.with_name(out.name + PARTIAL)
    with explaining(out):
        if out.exists():
            _require_replaceable(out, overwrite)
        require_debris(partial, STORE)
        (partial / COMMITS).mkdir(parents=True, exist_ok=True)  # holds the lock while the rest is being written
        with writer_lock(partial):
            remove_debris(doomed(out), STORE)
            remove_owned(partial, STORE, keep=(COMMITS, LOCK))
            _fill(store, partial, compression, progress)
            (partial / LOCK).unlink()
            (partial / COMMITS).rmdir()
            fsync_tree(partial)
            if out.exists():
                delete_folder(out, STORE)
            partial.rename(out)
            fsync_dir(out.parent)
    return list(range(store.manifest.units))


def _require_replaceable(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{out} exists", fix="--overwrite to replace it, or another name")
    attributes = read_json(out, "zarr.json").get("attributes") if (out / "zarr.json").is_file() else None
    if not isinstance(attributes, dict) or "vla_plain" not in attributes:
        raise StoreError(f"{out} is no plain zarr of ours", expected="what --overwrite may replace")
    require_owned(out, STORE)


def _fill(store: Store, folder: Path, compression: Compression, progress: Callable[[int, int], None]) -> None:
    """Write everything, unit by unit; zarr makes the chunks in memory, as layout.write_metadata does."""
    import zarr
    from zarr.abc.buffer import Buffer
    from zarr.codecs import ZstdCodec
    from zarr.storage import MemoryStore

    manifest = store.manifest
    files: dict[str, Buffer] = {}
    attributes = {"vla_plain": manifest.model_dump(mode="json"), "skipped_episodes": store.skipped}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    compressors = ZstdCodec(level=3) if compression == "zstd" else None
    tables: dict[str, Any] = store.episodes.to_arrays()
    arrays = {
        path: group.create_array(path, compressors=compressors, filters=None, config=_EVERY_CHUNK, **options)
        for path, options in (_arrays(manifest) | table_metadata(tables)).items()
    }
    for path, table in tables.items():
        arrays[path][...] = table
    readers = {name: store.reader(name, "always") for name in manifest.features}
    form = format_of(manifest)
    try:
        for unit, commit in sorted(store.commits.items()):
            rows = manifest.unit_range(unit)
            for run in store.present_runs(unit):
                for name, reader in readers.items():
                    values = np.empty((len(run), *reader.info.shape), reader.info.stored)
                    reader.read(run, values)
                    arrays[f"frames/{name}"][int(run[0]) : int(run[-1]) + 1] = values
            for name in manifest.steps:
                part = form.read_part(store.root, manifest, commit, f"steps/{name}")
                arrays[f"steps/{name}"][rows.start : rows.stop] = part
            for name, info in manifest.features.items():
                if info.dtype == "int8":
                    part = form.read_part(store.root, manifest, commit, f"scales/{name}")
                    arrays[f"scales/{name}"][unit] = part
            _flush(files, folder)
            progress(unit + 1, manifest.units)
    finally:
        for reader in readers.values():
            reader.close()


_EVERY_CHUNK: Any = {"write_empty_chunks": True}


def _flush(files: dict[str, Any], folder: Path) -> None:
    """Move the chunks made so far to disk; metadata stay in memory as well, zarr goes on reading them."""
    for path in sorted(files):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(files[path].to_bytes())
        if not path.endswith("zarr.json"):
            del files[path]


def _arrays(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return `create_array` options by path. A chunk never spans two units, so that none is written twice."""
    rows, arrays = manifest.rows, {}
    for name, info in manifest.features.items():
        chunk = max(
            k for k in range(1, manifest.unit_rows + 1) if manifest.unit_rows % k == 0 and _fits(k, info.row_bytes)
        )
        shape = (rows, *info.shape)
        arrays[f"frames/{name}"] = {
            **array_options(shape, info.stored.name, (chunk, *info.shape), ("row", *info.dims)),
            "fill_value": FILL[info.dtype],
            "attributes": {"dtype": info.dtype},
        }
        if info.dtype == "int8":
            shape = (manifest.units, info.shape[-1])
            options = array_options(shape, "float32", (1, shape[1]), ("unit", "channel"))
            arrays[f"scales/{name}"] = {**options, "attributes": {"unit_rows": manifest.unit_rows}}
    for name, step in manifest.steps.items():
        shape, dims = (rows, *step.shape), ("row", *(f"{name}_{axis}" for axis in range(len(step.shape))))
        arrays[f"steps/{name}"] = array_options(shape, step.dtype, (manifest.unit_rows, *step.shape), dims)
    return arrays


def _fits(rows: int, row_bytes: int) -> bool:
    return rows == 1 or rows * row_bytes <= CHUNK_BYTES
