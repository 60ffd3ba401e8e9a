"""Which form a store has."""

from __future__ import annotations

from vla.stores.formats.base import UnitFormat
from vla.stores.formats.hdf5_units import Hdf5Units
from vla.stores.formats.zarr_shards import ZarrShards
from vla.stores.manifest import FormatName, Manifest

FORMATS: dict[FormatName, UnitFormat] = {"zarr": ZarrShards(), "h5": Hdf5Units()}


def format_of(manifest: Manifest) -> UnitFormat:
    """Return the form of the store that `manifest` describes."""
    return FORMATS[manifest.format]


def unit_files(manifest: Manifest, unit: int) -> dict[str, range]:
    """Return `{path: possible sizes in bytes}` of every file of a unit but its commit record."""
    return format_of(manifest).unit_files(manifest, unit)
