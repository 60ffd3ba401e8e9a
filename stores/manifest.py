"""The manifest: what a store says it holds. Version 1 of the format.

It lives in the attributes of the root group (`zarr.json`, key `vla`), beside the SHA-256 of its own canonical form.
Everything else hangs from it: commit records name the manifest's digest, and hold the digests of their files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from vla.stores.dtypes import STORED, DtypeName
from vla.stores.errors import CorruptionError, StoreError, UsageError
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings

SCHEMA_VERSION = 1
MAX_ROW_BYTES = 1 << 30
"""A declared row above 1 GiB is taken for a hostile or damaged manifest: DA3's full ray at 8 views is 8 MB."""

MAX_ROWS = 1 << 30
"""More time steps than this (a year at 30 a second) are taken for the same; the largest public set has some 10^8."""
MAX_UNITS = 1 << 22
"""A unit is some files and a commit record: four million of them are more files than a file system holds well."""
MAX_ARRAYS = 1000
"""More features and steps than this are no store of ours either: each is a folder, and a file in every unit."""
_NAME = re.compile(r"(?!\.|__|zarr\.json$)[^/\\\x00-\x1f]{1,200}(?<!\.partial)")
"""Names of arrays are names of folders: none leaves its folder, is hidden, or belongs to zarr or to `filesystem`."""

Role = Literal["action", "state", "privileged", "other"]
FormatName = Literal["zarr", "h5"]
Compression = Literal["none", "zstd"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Frames a second."""


MAX_COPIES = 255
"""Augmented copies of a row: which one is drawn is kept as a uint8."""


def copy_name(feature: str, copy: int) -> str:
    """Return the array that holds augmented copy 1, 2, … of a feature; copy 0 is the feature itself."""
    return f"{feature}.aug{copy}" if copy else feature


_UNSAID = (("format", "zarr"), ("compression", "none"))


class FeatureInfo(Settings):
    """One array of features: `shape` per row, the view axis V first; `dims` its axis names; `dtype` see dtypes.py."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: DtypeName

    @property
    def stored(self) -> np.dtype[Any]:
        """The numpy dtype of the rows as they are stored and read: uint16 for bfloat16."""
        return np.dtype(STORED[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.stored.itemsize


class StepInfo(Settings):
    """One array of per-frame numbers: `shape` per row, what heads may do with it, names of its components."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float64", "int32", "int64", "bool"]
    role: Role
    names: tuple[str, ...] = ()


def store_near(place: Path) -> str:
    """Return a store one level below a place, or up to two above it, as what to type instead of the place."""
    places = [*sorted(place.glob("*/commits")), *(above / "commits" for above in place.absolute().parents[:2])]
    return next((f"the store {path.parent}" for path in places if path.is_dir()), "the folder of a store")


class Manifest(Settings):
    """What a store holds and where it came from. Lengths are in rows; one row is one time step of all views.

    `fingerprint` is all that the features depend on; `tables` the digests of the episode and task tables;
    `provenance` is for people (licences, versions, the source's path) and is not part of the fingerprint.
    `format` is how a unit lies on disk (formats/), `compression` what becomes of a row's bytes: neither changes a
    value.
    """

    schema_version: int = SCHEMA_VERSION
    format: FormatName = "zarr"
    compression: Compression = "none"
    rows: int = Field(gt=0, le=MAX_ROWS)
    unit_rows: int = Field(gt=0, le=1 << 20)
    fps: Rate
    cameras: tuple[str, ...]
    features: dict[str, FeatureInfo]
    steps: dict[str, StepInfo]
    fingerprint: dict[str, Any]
    tables: dict[str, str]
    provenance: dict[str, Any]

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write `format` and `compression` only where they say something, so that older stores keep their digests."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if (key, value) not in _UNSAID}

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
    def augment(self) -> dict[str, Any]:
        """How the augmented copies were made, part of the fingerprint; empty where there are none."""
        return dict(self.fingerprint.get("augment", {}))

    @property
    def copies(self) -> int:
        """How many augmented copies stand beside every feature, K arrays of its shape and dtype (`copy_name`)."""
        return int(self.augment.get("copies", 0))

    @property
    def plain(self) -> dict[str, FeatureInfo]:
        """The features without their augmented copies."""
        numbers = range(1, self.copies + 1)
        copies = {copy_name(name, number) for name in self.features for number in numbers}
        return {name: info for name, info in self.features.items() if name not in copies}

    @property
    def random_weights(self) -> bool:
        """Whether the backbone's weights were random: such features test a pipeline, never a policy."""
        return bool(self.provenance.get("random_weights", False))

    @property
    def picture_sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the pictures that each camera's features were made from; {} where nobody knew, as in
        stores made before this was kept."""
        sizes = self.provenance.get("picture_sizes", {})
        return {camera: (int(height), int(width)) for camera, (height, width) in sizes.items()}

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
            raise StoreError(f"{path} is a zarr group but no store of ours", fix=store_near(path.parent))
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}",
                expected=f"{SCHEMA_VERSION}",
                fix="the version of vla that wrote it",
            )
        try:
            whole = attributes.get("vla_sha256") == digest(raw)
        except (ValueError, RecursionError):  # NaN, or nested deeper than any manifest
            whole = False
        if not whole:
            raise CorruptionError(f"{path}: the manifest does not match its digest", fix=f"vla verify {path.parent}")
        try:
            manifest = cls.build(raw, where=str(path))
        except UsageError as error:  # nobody typed it
            raise StoreError(str(error)) from None
        manifest.require_sound(path)
        return manifest

    def require_sound(self, path: Path) -> None:
        """Raise `StoreError` naming `path` where a name or a shape is one that no store can have."""
        if len(self.features) + len(self.steps) > MAX_ARRAYS:
            count = len(self.features) + len(self.steps)
            raise StoreError(f"{path} declares {count} arrays", expected=f"at most {MAX_ARRAYS}")
        if self.units > MAX_UNITS:
            raise StoreError(f"{path} declares {self.units} units", expected=f"at most {MAX_UNITS}")
        for name in (*self.features, *self.steps):
            if _NAME.fullmatch(name) is None:
                raise StoreError(f"{path}: {name!r} cannot be the name of an array", expected="the name of a folder")
        if self.format == "h5" and self.compression != "none":
            raise StoreError(
                f"{path}: the h5 form is not compressed", expected="--format zarr", fix="--set store.compression=none"
            )
        for name, feature in self.features.items():
            shape = feature.shape
            if feature.row_bytes > MAX_ROW_BYTES or len(shape) != len(feature.dims) or min(shape, default=0) < 1:
                raise StoreError(f"{path}: feature {name!r} declares shape {shape}, dims {feature.dims}")
        self._require_copies(path)
        try:
            _ = self.picture_sizes
        except (AttributeError, TypeError, ValueError):
            found = f"{path}: provenance.picture_sizes is {self.provenance['picture_sizes']!r}"
            raise StoreError(found, expected="[height, width] by camera") from None
        for name, step in self.steps.items():
            if min(step.shape, default=1) < 1 or 8 * math.prod(step.shape) > MAX_ROW_BYTES:
                raise StoreError(f"{path}: steps {name!r} declare shape {step.shape}")

    def _require_copies(self, path: Path) -> None:
        record = self.fingerprint.get("augment", {"copies": 0})
        copies = record.get("copies") if isinstance(record, Mapping) else None
        if type(copies) is not int or not 0 <= copies <= MAX_COPIES:
            raise StoreError(f"{path} declares {copies!r} augmented copies", expected=f"0 to {MAX_COPIES}")
        for name, info in self.plain.items():
            for number in range(1, copies + 1):
                of = self.features.get(copy_name(name, number))
                if of is None or (of.shape, of.dtype) != (info.shape, info.dtype):
                    raise StoreError(f"{path} lacks {copy_name(name, number)!r}", expected=f"an array like {name!r}")
