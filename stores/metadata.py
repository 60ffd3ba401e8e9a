"""Reading a store's metadata without trusting it: sizes bounded, shapes compared, tables bound by digest."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.below import read_below
from vla.stores.documents import parse_json
from vla.stores.errors import CorruptionError, StoreError
from vla.stores.filesystem import PARTIAL, explaining
from vla.stores.formats.registry import format_of
from vla.stores.layout import table_file, table_metadata
from vla.stores.manifest import Manifest, store_near
from vla.stores.shard import CRC_BYTES
from vla.stores.tables import LABELS, TABLES, TEXTS, EpisodeTable

MAX_METADATA_BYTES = 16 << 20
"""A `zarr.json` above 16 MiB is no metadata of ours: 100,000 episodes live in arrays, not in attributes. Parsed, JSON
takes some ten times its size."""


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of the store at `root`. Raises `StoreError` where there is none, saying what is there."""
    if root.name.endswith(PARTIAL):
        raise StoreError(f"{root} is what an interrupted run left", fix=f"run again without {PARTIAL}")
    if not root.exists():
        fix = f"vla featurize --backbone NAME --out {root.parent} --name {root.name}"
        raise StoreError(f"{root} does not exist", expected="a store", fix=fix)
    if not (root / "zarr.json").is_file():
        inside = sorted(path.name for path in root.iterdir())[:4] if root.is_dir() else ["a file"]
        listing = ", ".join(inside) or "nothing"
        raise StoreError(
            f"{root} is no store (holds {listing})",
            expected="a folder with zarr.json",
            fix=store_near(root),
        )
    document = read_json(root, "zarr.json")
    _require(root / "zarr.json", document, _GROUP)
    attributes = document.get("attributes")
    return Manifest.from_attributes(attributes if isinstance(attributes, dict) else {}, root / "zarr.json")


def read_tables(root: Path, manifest: Manifest) -> EpisodeTable:
    """Return the episode table. Raises `CorruptionError` where it differs from the manifest's digests."""
    labels = LABELS if any(path in manifest.tables for path in LABELS) else ()
    arrays = {path: _read_single_chunk(root, path) for path in (*TABLES, *labels)}
    for path, sha256 in table_digests(arrays).items():
        if manifest.tables.get(path) != sha256:
            raise CorruptionError(f"{root / path} does not match the manifest", fix=f"vla verify {root}")
    _check_documents(root, table_metadata(arrays))
    try:
        return EpisodeTable.from_arrays(arrays)
    except UnicodeDecodeError as error:
        raise CorruptionError(f"{root}: a name in the episode table is no UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{root}: a label in the episode table is no object of texts ({error})") from None


def table_digests(arrays: dict[str, NDArray[np.generic]]) -> dict[str, str]:
    """SHA-256 (hex) of each array's dtype, shape and bytes."""
    return {
        path: hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()).hexdigest()
        for path, array in arrays.items()
    }


def check_arrays(root: Path, manifest: Manifest) -> None:
    """Compare each array's own metadata with the manifest: shape, dtype, chunks, codecs, all that zarr defines.

    Raises `CorruptionError` naming the file and the field: what another zarr reader would see must be what we read.
    """
    _check_documents(root, format_of(manifest).arrays(manifest))


def _check_documents(root: Path, arrays: dict[str, dict[str, Any]]) -> None:
    for group in sorted({path.partition("/")[0] for path in arrays}):
        name = f"{group}/zarr.json"
        _require(root / name, read_json(root, name), _GROUP | {"attributes": {}})
    for path, wanted in arrays.items():
        name = f"{path}/zarr.json"
        _require(root / name, read_json(root, name), _document(wanted))


def _require(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            shown = repr(found.get(name, "absent"))[:200]  # one line, whatever lies there
            raise CorruptionError(f"{file}: {name} is {shown}", expected=f"{value}", fix="vla verify")


_GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}


def _document(options: dict[str, Any]) -> dict[str, Any]:
    """Return the `zarr.json` that zarr-python writes for the arguments of its `create_array`."""
    fill = options["fill_value"]
    outer = options.get("shards", options["chunks"])
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(options["shape"]),
        "data_type": options["dtype"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(outer)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if fill != fill else fill,
        "codecs": _codecs(options),
        "dimension_names": list(options["dimension_names"]),
        "attributes": options.get("attributes", {}),
        "storage_transformers": [],
    }


_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC: dict[str, Any] = {"name": "crc32c"}


def _codecs(wanted: dict[str, Any]) -> list[Any]:
    inner = [{"name": "bytes"} if np.dtype(wanted["dtype"]).itemsize == 1 else _BYTES]  # one byte has no order
    if "zstd_level" in wanted:
        inner.append({"name": "zstd", "configuration": {"level": wanted["zstd_level"], "checksum": False}})
    inner.append(_CRC)
    if "shards" not in wanted:
        return inner
    configuration = {
        "chunk_shape": list(wanted["chunks"]),
        "codecs": inner,
        "index_codecs": [_BYTES, _CRC],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def read_json(root: Path, name: str) -> dict[str, Any]:
    """Return the JSON object, of bounded size, in the file `name` below `root`. Raises `CorruptionError` naming it."""
    path = root / name
    with explaining(path):
        data = read_below(root, name, MAX_METADATA_BYTES)
    try:
        value = parse_json(data)
    except ValueError:
        raise CorruptionError(f"{path} is not JSON", expected="zarr v3 metadata") from None
    if not isinstance(value, dict):
        raise CorruptionError(f"{path} holds no object", expected="zarr v3 metadata")
    return value


def _read_single_chunk(root: Path, path: str) -> NDArray[np.generic]:
    """Read an array of one chunk, `bytes` + `crc32c`. Its length must be what its metadata declares."""
    metadata_file = root / path / "zarr.json"
    metadata = read_json(root, f"{path}/zarr.json")
    shape, dtype = metadata.get("shape"), metadata.get("data_type")
    ndim, kind = (2, "uint8") if path in TEXTS else (1, "int64")
    whole = isinstance(shape, list) and len(shape) == ndim and all(type(n) is int and n > 0 for n in shape)
    if dtype != kind or not isinstance(shape, list) or not whole:
        raise CorruptionError(f"{metadata_file} declares {dtype} {shape}", expected=f"{kind}, {ndim} axes")
    name = table_file(path)
    file, size = root / name, math.prod(shape) * np.dtype(kind).itemsize + CRC_BYTES
    with explaining(file):
        raw = read_below(root, name, size)  # a file of gigabytes in a table's place is not read at all
    if len(raw) != size:
        raise CorruptionError(f"{file} has another size than {metadata_file} declares")
    body, crc = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise CorruptionError(f"{file} does not match its checksum", fix=f"vla verify {root}")
    return np.frombuffer(body, np.dtype(kind).newbyteorder("<")).reshape(shape)
