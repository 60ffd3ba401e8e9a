"""The HDF5 form: one file a unit, `units/unit-NNNNNN.h5`, with the names of the zarr form inside.

    frames/<feature> [n, V, ...]    chunk = one row, `fletcher32` (4 bytes after each chunk): h5py checks what it reads
    steps/<name>, checksums/<feature>, stats/<feature>, scales/<feature>    one chunk each, `fletcher32`

n is the number of the unit's rows; rows left out are chunks never written (they read as NaN). The commit record holds
the digest of the file and of each small array. Files are pinned to HDF5 1.10's layout: its metadata carry checksums,
any HDF5 since 2016 reads them, and no timestamps are kept, so that equal content makes equal bytes.

Reading trusts nothing: hard links only, no virtual, external or compressed data set, no user block, shapes and dtypes
as the manifest says, and every chunk inside the file.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.below import open_below
from vla.stores.dtypes import FILL
from vla.stores.errors import CorruptionError, MachineError
from vla.stores.filesystem import explaining
from vla.stores.fingerprint import digest_array
from vla.stores.formats.base import RowTable, UnitContent, part_specs
from vla.stores.hdf5_files import open_hdf5
from vla.stores.manifest import Manifest
from vla.stores.shard import CRC_BYTES

if TYPE_CHECKING:
    import h5py

    from vla.stores.commits import Commit

LAYOUT_VERSION = ("v110", "v110")
ROW_OVERHEAD, FILE_OVERHEAD = 256, 1 << 20
"""Upper bounds of what HDF5 adds: a chunk's entry takes 24 bytes, an empty file about 3 KB and some 500 a data set."""


class Hdf5Units:
    """See `UnitFormat`."""

    shared_files = True
    folders: tuple[str, ...] = ("units",)

    def arrays(self, manifest: Manifest) -> dict[str, dict[str, Any]]:
        """See `UnitFormat.arrays`: none, the units hold everything but the tables."""
        del manifest
        return {}

    def unit_files(self, manifest: Manifest, unit: int) -> dict[str, range]:
        """See `UnitFormat.unit_files`."""
        specs = part_specs(manifest)
        parts = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs.values())
        rows = len(manifest.unit_range(unit))
        row_bytes = manifest.row_bytes + len(manifest.features) * (CRC_BYTES + ROW_OVERHEAD)
        overhead = FILE_OVERHEAD + 4096 * (len(specs) + len(manifest.features))
        return {_file(unit): range(1, rows * row_bytes + parts + overhead)}

    def digested_parts(self, manifest: Manifest) -> frozenset[str]:
        """See `UnitFormat.digested_parts`: all of them."""
        return frozenset(part_specs(manifest))

    def encode(self, manifest: Manifest, content: UnitContent) -> Iterator[tuple[str, list[memoryview]]]:
        """See `UnitFormat.encode`. The file is made in memory: it gets its name when it is whole and durable."""
        import h5py

        rows, image = manifest.unit_range(content.unit), io.BytesIO()
        # Not the image of a core file that is open: HDF5 1.14 clears a flag in it and leaves the checksum as it was.
        with h5py.File(image, "w", libver=LAYOUT_VERSION) as file:
            file.attrs.update({"unit": content.unit, "row_start": rows.start, "row_stop": rows.stop})
            file.attrs["manifest_sha256"] = np.bytes_(manifest.sha256())
            for name, shard in content.shards.items():
                info = manifest.features[name]
                dataset = _create(file, f"frames/{name}", shard.rows.shape, info.stored, FILL[info.dtype], rows=1)
                dataset.attrs["dimension_names"] = np.array([dim.encode() for dim in ("row", *info.dims)])
                dataset.attrs["dtype"] = np.bytes_(info.dtype)
                for row in np.flatnonzero(content.present):
                    dataset[row] = shard.rows[row]
            for part, values in content.parts.items():
                fill = np.nan if np.issubdtype(values.dtype, np.floating) else 0
                _create(file, part, values.shape, values.dtype, fill, rows=len(values))[...] = values
        yield _file(content.unit), [image.getbuffer()]

    def feature_file(self, manifest: Manifest, feature: str, unit: int) -> str:
        """See `UnitFormat.feature_file`: one file for all features."""
        del manifest, feature
        return _file(unit)

    def locate(self, root: Path, manifest: Manifest, commit: Commit, feature: str, descriptor: int) -> RowTable:
        """See `UnitFormat.locate`."""
        path, info = root / _file(commit.unit), manifest.features[feature]
        rows = len(manifest.unit_range(commit.unit))
        chunks: list[Any] = []
        with _opened(path, commit, descriptor) as file:
            dataset = _dataset(file, f"frames/{feature}", (rows, *info.shape), info.stored, rows=1)
            dataset.id.chunk_iter(chunks.append)
        offsets, sizes = np.full(rows, -1, np.int64), np.zeros(rows, np.int64)
        if not chunks:
            return RowTable(offsets, sizes)
        found = np.array([(c.chunk_offset[0], c.byte_offset, c.size, c.filter_mask) for c in chunks], np.uint64)
        size, wanted = commit.files[_file(commit.unit)].size, info.row_bytes + CRC_BYTES
        bad = (found[:, 0] >= rows) | (found[:, 2] != wanted) | (found[:, 3] != 0)
        bad |= found[:, 1] > max(size - wanted, 0)
        if bad.any():
            row = int(found[bad.argmax(), 0])
            what = f"the chunk of row {row} of frames/{feature} is not one row inside the file"
            raise CorruptionError(f"unit {commit.unit}: {path}: {what}", fix=f"vla verify {root}")
        at = found[:, 0].astype(np.int64)
        offsets[at], sizes[at] = found[:, 1].astype(np.int64), wanted
        return RowTable(offsets, sizes)

    def read_part(self, root: Path, manifest: Manifest, commit: Commit, part: str) -> NDArray[Any]:
        """See `UnitFormat.read_part`."""
        path, spec = root / _file(commit.unit), part_specs(manifest)[part]
        rows = len(manifest.unit_range(commit.unit))
        shape = (rows, *spec.shape[1:]) if spec.per_row else spec.shape
        try:
            descriptor = open_below(root, _file(commit.unit))
        except CorruptionError as error:
            raise CorruptionError(f"unit {commit.unit}: {error.found}", fix=f"vla verify {root}") from None
        try:
            with _opened(path, commit, descriptor) as file:
                dataset = _dataset(file, part, shape, np.dtype(spec.dtype), rows=shape[0])
                stored = dataset.id.get_storage_size()
                if stored != dataset.nbytes + CRC_BYTES or stored > commit.files[_file(commit.unit)].size:
                    raise _NotOursError(f"{part} has {stored} bytes, not {dataset.nbytes + CRC_BYTES}")
                values: NDArray[Any] = dataset[...]
        finally:
            os.close(descriptor)
        if digest_array(values) != commit.parts[part]:
            raise CorruptionError(
                f"unit {commit.unit}: {path}: {part} differs from its commit", fix=f"vla verify {root}"
            )
        return values


def _file(unit: int) -> str:
    return f"units/unit-{unit:06d}.h5"


def _create(
    file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], fill: float, *, rows: int
) -> h5py.Dataset:
    return file.create_dataset(
        path,
        shape,
        dtype.newbyteorder("<"),
        chunks=(rows, *shape[1:]),
        fletcher32=True,
        fillvalue=fill,
        track_times=False,
    )


@contextmanager
def _opened(path: Path, commit: Commit, descriptor: int) -> Iterator[h5py.File]:
    """Open the HDF5 file behind a descriptor, which stays the caller's; `path` is its name in errors.

    Whatever is wrong with the file becomes a `CorruptionError`; the disk's errors stay the disk's.
    """
    unit = commit.unit
    expected, fix = "the HDF5 file that was committed", f"vla verify {path.parent.parent}"
    try:
        if os.fstat(descriptor).st_size != commit.files[_file(unit)].size:
            raise _NotOursError("has another size")
        # By descriptor: the name could be that of another file by now.
        with open_hdf5(Path(f"/dev/fd/{descriptor}")) as file:
            if file.userblock_size:
                raise _NotOursError("has a user block")
            yield file
    except MachineError:  # a `RuntimeError`, as those of HDF5
        raise
    except OSError as error:
        if error.errno:
            with explaining(path):
                raise
        what = _first_line(error)
        raise CorruptionError(f"unit {unit}: {path}: {what}", expected=expected, fix=fix) from None
    except (_NotOursError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        raise CorruptionError(f"unit {unit}: {path}: {_first_line(error)}", expected=expected, fix=fix) from None


class _NotOursError(Exception):
    """What HDF5 allows and our files never have; `_opened` says where."""


def _dataset(file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, rows: int) -> h5py.Dataset:
    """Return a data set that is what it should be: no data is read before."""
    import h5py

    group, _, name = path.partition("/")
    parent = _hard(file, group)
    dataset = _hard(parent, name) if isinstance(parent, h5py.Group) else None
    if not isinstance(dataset, h5py.Dataset):
        raise _NotOursError(f"{path} is no data set")
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(at)[0] for at in range(plan.get_nfilters())]
    if plan.get_layout() != h5py.h5d.CHUNKED or filters != [h5py.h5z.FILTER_FLETCHER32]:
        raise _NotOursError(f"{path} is not stored in chunks with fletcher32 and no other filter")
    found = (dataset.dtype, dataset.shape, dataset.chunks)
    if found != (dtype, shape, (rows, *shape[1:])):
        raise _NotOursError(f"{path} is {found[0]} {found[1]} in chunks of {found[2]}, not {dtype} {shape}")
    return dataset


def _hard(group: h5py.Group, name: str) -> Any:
    """Return a member of a group that lies in the file itself: soft and external links are not followed."""
    import h5py

    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise _NotOursError(f"{name!r} is a link to elsewhere")
    return group[name]


def _first_line(error: Exception) -> str:
    return str(error.args[0] if error.args else error).partition("\n")[0][:200]
