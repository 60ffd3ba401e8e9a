"""The manifest: what a store says it holds. Version 1 of the format.

It lives in the attributes of the root group (`zarr.json`, key `vla`), beside the SHA-256 of its own canonical form.
Everything else hangs from it: commit records name the manifest's digest, and hold the digests of their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vla.stores.errors import CorruptionError, StoreError
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings

SCHEMA_VERSION = 1
MAX_ROW_BYTES = 1 << 30
"""A declared row above 1 GiB is taken for a hostile or damaged manifest: DA3's full ray at 8 views is 8 MB."""

Role = Literal["action", "state", "privileged", "other"]


class FeatureInfo(Settings):
    """One array of features: `shape` per row with the view axis V first, `dims` its axis names."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: Literal["float16", "float32"]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class StepInfo(Settings):
    """One array of per-frame numbers: `shape` per row, what heads may do with it, names of its components."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float64", "int32", "int64", "bool"]
    role: Role
    names: tuple[str, ...] = ()


class Manifest(Settings):
    """What a store holds and where it came from. Lengths are in rows; one row is one time step of all views.

    `fingerprint` is all that the features depend on; `tables` the digests of the episode and task tables;
    `provenance` is for people (licences, versions, the source's path) and is not part of the fingerprint.
    """

    schema_version: int = SCHEMA_VERSION
    rows: int = Field(gt=0)
    unit_rows: int = Field(gt=0, le=1 << 20)
    fps: float = Field(gt=0)
    cameras: tuple[str, ...]
    features: dict[str, FeatureInfo]
    steps: dict[str, StepInfo]
    fingerprint: dict[str, Any]
    tables: dict[str, str]
    provenance: dict[str, Any]

    @property
    def units(self) -> int:
        """How many units the store is planned to have."""
        return -(-self.rows // self.unit_rows)

    def unit_range(self, unit: int) -> range:
        """Return the rows of a unit."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all features."""
        return sum(info.row_bytes for info in self.features.values())

    @property
    def random_weights(self) -> bool:
        """Whether the backbone's weights were random: such features test a pipeline, never a policy."""
        return bool(self.provenance.get("random_weights", False))

    def sha256(self) -> str:
        """Digest of the canonical form; commit records carry it."""
        return digest(self.model_dump(mode="json"))

    def attributes(self) -> dict[str, Any]:
        """Return the root group's attributes."""
        return {"vla": self.model_dump(mode="json"), "vla_sha256": self.sha256()}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], path: Path) -> Manifest:
        """Check and return the manifest. Raises `StoreError` or `CorruptionError` naming `path`."""
        raw = attributes.get("vla")
        if not isinstance(raw, Mapping):
            raise StoreError(f"{path} is a zarr group but no store of ours", fix="vla featurize --out DIR")
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}",
                expected=f"{SCHEMA_VERSION}",
                fix="the version of vla that wrote it",
            )
        if attributes.get("vla_sha256") != digest(raw):
            raise CorruptionError(f"{path}: the manifest does not match its digest", fix=f"vla verify {path.parent}")
        manifest = cls.build(raw, where=str(path))
        for name, info in manifest.features.items():
            if info.row_bytes > MAX_ROW_BYTES or len(info.shape) != len(info.dims) or min(info.shape, default=0) < 1:
                raise StoreError(f"{path}: feature {name!r} declares shape {info.shape}, dims {info.dims}")
        return manifest
