"""Reading a store's metadata without trusting it: sizes bounded, shapes compared, tables bound by digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.errors import CorruptionError, StoreError
from vla.stores.filesystem import PARTIAL, explaining
from vla.stores.layout import array_metadata
from vla.stores.manifest import Manifest
from vla.stores.shard import CRC_BYTES
from vla.stores.tables import TABLES, EpisodeTable

MAX_METADATA_BYTES = 64 << 20
"""A `zarr.json` above 64 MiB is no metadata of ours: 100,000 episodes live in arrays, not in attributes."""


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of the store at `root`. Raises `StoreError` where there is none, saying what is there."""
    if root.name.endswith(PARTIAL):
        raise StoreError(f"{root} is what an interrupted run left", fix=f"run again without {PARTIAL}")
    if not root.exists():
        raise StoreError(f"{root} does not exist", expected="a store", fix=f"vla featurize --out {root.parent}")
    if not (root / "zarr.json").is_file():
        inside = sorted(path.name for path in root.iterdir())[:4] if root.is_dir() else ["a file"]
        listing = ", ".join(inside) or "nothing"
        raise StoreError(
            f"{root} is no store (holds {listing})",
            expected="a folder with zarr.json",
            fix="the folder of the store itself",
        )
    attributes = _read_json(root / "zarr.json").get("attributes")
    return Manifest.from_attributes(attributes if isinstance(attributes, dict) else {}, root / "zarr.json")


def read_tables(root: Path, manifest: Manifest) -> EpisodeTable:
    """Return the episode table. Raises `CorruptionError` where it differs from the manifest's digests."""
    arrays = {path: _read_single_chunk(root, path) for path in TABLES}
    for path, sha256 in table_digests(arrays).items():
        if manifest.tables.get(path) != sha256:
            raise CorruptionError(f"{root / path} does not match the manifest", fix=f"vla verify {root}")
    return EpisodeTable.from_arrays(arrays)


def table_digests(arrays: dict[str, NDArray[np.generic]]) -> dict[str, str]:
    """SHA-256 (hex) of each array's dtype, shape and bytes."""
    return {
        path: hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()).hexdigest()
        for path, array in arrays.items()
    }


def check_arrays(root: Path, manifest: Manifest) -> None:
    """Compare each array's own metadata with the manifest: shape, dtype, chunks, codecs.

    Raises `CorruptionError` naming the file and the field: what another zarr reader would see must be what we read.
    """
    for path, wanted in array_metadata(manifest, {}).items():
        file = root / path / "zarr.json"
        found = _read_json(file)
        outer = list(wanted.get("shards", wanted["chunks"]))
        fields: dict[str, tuple[Any, Any]] = {
            "shape": (found.get("shape"), list(wanted["shape"])),
            "data_type": (found.get("data_type"), wanted["dtype"]),
            "chunk_shape": (_configuration(found.get("chunk_grid")).get("chunk_shape"), outer),
            "separator": (_configuration(found.get("chunk_key_encoding")).get("separator"), "."),
            "codecs": (found.get("codecs"), _codecs(wanted)),
        }
        for name, (is_, should) in fields.items():
            if is_ != should:
                raise CorruptionError(f"{file}: {name} is {is_}", expected=f"{should}", fix=f"vla verify {root}")


_BYTES_CRC = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def _codecs(wanted: dict[str, Any]) -> list[Any]:
    if wanted["dtype"] in ("bool", "uint8", "int8"):  # one byte has no order
        return [{"name": "bytes"}, {"name": "crc32c"}]
    if "shards" not in wanted:
        return _BYTES_CRC
    configuration = {
        "chunk_shape": list(wanted["chunks"]),
        "codecs": _BYTES_CRC,
        "index_codecs": _BYTES_CRC,
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def _configuration(value: Any) -> dict[str, Any]:
    inner = value.get("configuration") if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    with explaining(path):
        if not path.is_file():
            raise CorruptionError(f"{path} is missing", expected="zarr v3 metadata")
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise CorruptionError(f"{path} has {path.stat().st_size} bytes", expected="metadata of a store")
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptionError(f"{path} is not JSON", expected="zarr v3 metadata") from None
    if not isinstance(value, dict):
        raise CorruptionError(f"{path} holds no object", expected="zarr v3 metadata")
    return value


def _read_single_chunk(root: Path, path: str) -> NDArray[np.generic]:
    """Read an array of one chunk, `bytes` + `crc32c`. Its length must be what its metadata declares."""
    metadata = _read_json(root / path / "zarr.json")
    shape, dtype = metadata.get("shape"), metadata.get("data_type")
    if dtype not in ("uint8", "int64") or not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise CorruptionError(f"{root / path / 'zarr.json'} declares {dtype} {shape}", expected="a table of ours")
    file = root / path / ("c" + ".0" * len(shape))
    with explaining(file):
        if not file.is_file():
            raise CorruptionError(f"{file} is missing", expected="a table", fix=f"vla verify {root}")
        raw = file.read_bytes()
    body, crc = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
    size = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
    if len(body) != size or google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise CorruptionError(f"{file} does not match its checksum", fix=f"vla verify {root}")
    return np.frombuffer(body, np.dtype(dtype).newbyteorder("<")).reshape(shape)
