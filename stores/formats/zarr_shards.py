"""The zarr form: one zarr v3 group, each unit one shard of every array.

    frames/<feature>   [rows, V, ...]   sharded: one shard = one unit, inner chunk = one row, `bytes` + `crc32c`
                                        (archives: `bytes` + `zstd` + `crc32c`)
    steps/<name>       [rows, ...]      one chunk = one unit, `bytes` + `crc32c`, as are all that follow
    checksums/<feature>[rows]           crc32c of each row, uint32; the commit holds this file's digest
    stats/<feature>    [units, 5, C]    see statistics.py
    scales/<feature>   [units, C]       of int8 features, see dtypes.py

Chunk keys use '.' as separator, so that one folder per array has to be made durable, not one per unit.
Floating-point arrays are filled with NaN: a foreign reader that reaches a row never committed sees no plausible number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.committed import read_committed
from vla.stores.dtypes import FILL
from vla.stores.formats.base import PartSpec, RowTable, UnitContent, part_specs
from vla.stores.layout import array_options
from vla.stores.manifest import FeatureInfo, Manifest
from vla.stores.shard import CRC_BYTES, ZSTD_LEVEL, chunk_sizes, decode_index, index_bytes

if TYPE_CHECKING:
    from vla.stores.commits import Commit


class ZarrShards:
    """See `UnitFormat`."""

    shared_files = False
    folders: tuple[str, ...] = ("frames", "steps", "checksums", "stats", "scales")

    def arrays(self, manifest: Manifest) -> dict[str, dict[str, Any]]:
        """See `UnitFormat.arrays`."""
        rows, unit = manifest.rows, manifest.unit_rows
        arrays: dict[str, dict[str, Any]] = {}
        for name, feature in manifest.features.items():
            arrays[f"frames/{name}"] = {
                **array_options((rows, *feature.shape), feature.stored.name, (1, *feature.shape), _dims(feature)),
                "shards": (unit, *feature.shape),
                "fill_value": FILL[feature.dtype],
            }
            if feature.dtype == "bfloat16":
                arrays[f"frames/{name}"]["attributes"] = {"dtype": "bfloat16"}
            if _zstd(manifest):
                arrays[f"frames/{name}"]["zstd_level"] = ZSTD_LEVEL
        for part, spec in part_specs(manifest).items():
            if spec.per_row:
                dims = ("row", *(f"{part.partition('/')[2]}_{axis}" for axis in range(len(spec.shape) - 1)))
                arrays[part] = array_options((rows, *spec.shape[1:]), spec.dtype, spec.shape, dims)
            else:
                dims = ("unit", "moment", "channel") if part.startswith("stats/") else ("unit", "channel")
                arrays[part] = array_options((manifest.units, *spec.shape), spec.dtype, (1, *spec.shape), dims)
        return arrays

    def unit_files(self, manifest: Manifest, unit: int) -> dict[str, range]:
        """See `UnitFormat.unit_files`."""
        slots, files = manifest.unit_rows, {}
        rows = len(manifest.unit_range(unit))
        for name, info in manifest.features.items():
            row, index = chunk_sizes(info, zstd=_zstd(manifest)), index_bytes(slots)
            step = 1 if _zstd(manifest) else row.start
            files[self.feature_file(manifest, name, unit)] = range(index, index + rows * (row.stop - 1) + 1, step)
        for part, spec in part_specs(manifest).items():
            size = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize + CRC_BYTES
            files[_part_file(part, spec, unit)] = range(size, size + 1)
        return files

    def digested_parts(self, manifest: Manifest) -> frozenset[str]:
        """See `UnitFormat.digested_parts`: each part is a file, and the record holds its digest."""
        del manifest
        return frozenset()

    def encode(self, manifest: Manifest, content: UnitContent) -> Iterator[tuple[str, list[memoryview]]]:
        """See `UnitFormat.encode`."""
        for name, shard in content.shards.items():
            path = self.feature_file(manifest, name, content.unit)
            if _zstd(manifest):
                yield path, shard.encode_compressed(content.present)
            else:
                yield path, shard.encode(content.present, content.crcs[name])
        for part, spec in part_specs(manifest).items():
            values = content.parts[part]
            padded = np.full(spec.shape, _fill(spec.dtype), np.dtype(spec.dtype).newbyteorder("<"))
            padded[: len(values)] = values
            yield _part_file(part, spec, content.unit), _checked(padded)

    def feature_file(self, manifest: Manifest, feature: str, unit: int) -> str:
        """See `UnitFormat.feature_file`."""
        return f"frames/{feature}/c.{unit}" + ".0" * len(manifest.features[feature].shape)

    def locate(self, root: Path, manifest: Manifest, commit: Commit, feature: str, descriptor: int) -> RowTable:
        """See `UnitFormat.locate`."""
        path = self.feature_file(manifest, feature, commit.unit)
        slots, size = manifest.unit_rows, commit.files[path].size
        tail = os.pread(descriptor, index_bytes(slots), size - index_bytes(slots))
        possible = chunk_sizes(manifest.features[feature], zstd=_zstd(manifest))
        offsets, sizes = decode_index(tail, possible, size, str(root / path))
        rows = len(manifest.unit_range(commit.unit))
        return RowTable(offsets[:rows], sizes[:rows])

    def read_part(self, root: Path, manifest: Manifest, commit: Commit, part: str) -> NDArray[Any]:
        """See `UnitFormat.read_part`."""
        spec = part_specs(manifest)[part]
        raw = read_committed(root, commit, _part_file(part, spec, commit.unit))
        values = np.frombuffer(raw[:-CRC_BYTES], np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.shape)
        return values[: len(manifest.unit_range(commit.unit))] if spec.per_row else values


def _zstd(manifest: Manifest) -> bool:
    return manifest.compression == "zstd"


def _dims(feature: FeatureInfo) -> tuple[str, ...]:
    return ("row", *feature.dims)


def _part_file(part: str, spec: PartSpec, unit: int) -> str:
    axes = len(spec.shape) - (1 if spec.per_row else 0)
    return f"{part}/c.{unit}" + ".0" * axes


def _fill(dtype: str) -> float:
    return np.nan if np.issubdtype(np.dtype(dtype), np.floating) else 0


def _checked(values: NDArray[Any]) -> list[memoryview]:
    """Encode an array as zarr's `bytes` + `crc32c` codecs do."""
    raw = values.tobytes()
    return [memoryview(raw), memoryview(int(google_crc32c.value(raw)).to_bytes(CRC_BYTES, "little"))]
