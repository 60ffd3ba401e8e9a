"""What a form of the store has to do: name the files of a unit, encode them, find rows in them, read its small arrays.

Both forms keep 4 bytes of checksum after each row, so that one reader serves both (reader.py). What is small (steps,
row checksums, statistics, scales) is a *part* of the unit: `part_specs` says which there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla.stores.manifest import Manifest
from vla.stores.shard import ShardBuffer
from vla.stores.statistics import MOMENTS

if TYPE_CHECKING:
    from vla.stores.commits import Commit


@dataclass(frozen=True)
class PartSpec:
    """One small array of a unit: shape and numpy dtype; `per_row` where its first axis counts the unit's rows."""

    shape: tuple[int, ...]
    dtype: str
    per_row: bool


@dataclass(frozen=True)
class RowTable:
    """Where the n rows of a feature lie in the unit's file: int64 [n] each; offset -1 where a row was left out."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class UnitContent:
    """A whole unit, ready to be written: encoded rows, their crc32c uint32 [n], which are `present` [n], the parts."""

    unit: int
    present: NDArray[np.bool_]
    shards: dict[str, ShardBuffer]
    crcs: dict[str, NDArray[np.uint32]]
    parts: dict[str, NDArray[Any]]


class UnitFormat(Protocol):
    """One form of the store. Stateless. Paths are relative to the store, with '/' between their names."""

    folders: tuple[str, ...]
    """Folders that hold files of units and nothing else but metadata."""

    shared_files: bool
    """Whether a file holds several arrays; its folders are then not those of zarr arrays."""

    def arrays(self, manifest: Manifest) -> dict[str, dict[str, Any]]:
        """Return the zarr arrays of a store beside its tables: see `layout.array_options`."""
        ...

    def unit_files(self, manifest: Manifest, unit: int) -> dict[str, range]:
        """Return `{path: possible sizes in bytes}` of every file of a unit but its commit record."""
        ...

    def digested_parts(self, manifest: Manifest) -> frozenset[str]:
        """Return the parts whose digests a commit record holds, because no file of their own has one."""
        ...

    def encode(self, manifest: Manifest, content: UnitContent) -> Iterator[tuple[str, list[memoryview]]]:
        """Yield each file of the unit: its path and its bytes."""
        ...

    def feature_file(self, manifest: Manifest, feature: str, unit: int) -> str:
        """Return the path of the file that holds a unit's rows of a feature."""
        ...

    def locate(self, root: Path, manifest: Manifest, commit: Commit, feature: str, descriptor: int) -> RowTable:
        """Find the rows of a feature in a committed unit; `descriptor` is its open file, of the committed size.

        Raises `CorruptionError` naming the file where a row would lie outside it.
        """
        ...

    def read_part(self, root: Path, manifest: Manifest, commit: Commit, part: str) -> NDArray[Any]:
        """Return a part of a committed unit after comparing it with the commit. Raises `CorruptionError`."""
        ...


def part_specs(manifest: Manifest) -> dict[str, PartSpec]:
    """Return `{part: PartSpec}` of a unit: `steps/*`, `checksums/*`, `stats/*`, `scales/*`; rows as in a full unit."""
    rows, specs = manifest.unit_rows, {}
    for name, info in manifest.features.items():
        specs[f"checksums/{name}"] = PartSpec((rows,), "uint32", True)
        specs[f"stats/{name}"] = PartSpec((len(MOMENTS), info.shape[-1]), "float64", False)
        if info.dtype == "int8":
            specs[f"scales/{name}"] = PartSpec((info.shape[-1],), "float32", False)
    for name, step in manifest.steps.items():
        specs[f"steps/{name}"] = PartSpec((rows, *step.shape), step.dtype, True)
    return specs
