"""Rows of an archive: zarr inner chunks of `bytes` + `zstd` + `crc32c`, one system call and one decompression a row.

The slow path, for stores that are kept rather than trained on: on float16 features zstd saves some 5 to 15 % of the
bytes and reads several times slower than the rows as they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.below import HeldFolder
from vla.stores.commits import Commit
from vla.stores.formats.base import RowTable
from vla.stores.manifest import Manifest
from vla.stores.reader import FeatureReader, Verify
from vla.stores.shard import CRC_BYTES


class CompressedReader(FeatureReader):
    """A `FeatureReader` whose rows vary in size on disk."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        commits: dict[int, Commit],
        name: str,
        verify: Verify,
        held: HeldFolder | None = None,
    ) -> None:
        super().__init__(root, manifest, commits, name, verify, held)
        self._sizes = np.zeros(manifest.rows, np.int64)

    def _keep_table(self, rows: range, table: RowTable) -> None:
        super()._keep_table(rows, table)
        self._sizes[rows.start : rows.stop] = table.sizes

    def _read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        from numcodecs.zstd import decompress

        units = rows // self._manifest.unit_rows
        offsets, sizes = self._locate(rows, units), self._sizes[rows]
        target = out.reshape(len(rows), -1).view(np.uint8)
        for index, row in enumerate(rows.tolist()):
            unit, size = int(units[index]), int(sizes[index])
            chunk = os.pread(self._open(unit), size, int(offsets[index]))
            body = chunk[:-CRC_BYTES]
            # Compared before it is decoded, whatever `verify` says: a decoder is no place for damaged bytes.
            if len(chunk) != size or google_crc32c.value(body) != int.from_bytes(chunk[-CRC_BYTES:], "little"):
                raise self._corrupt(unit, f"differs from its checksum in row {row}")
            try:
                decompress(body, target[index])
            except (RuntimeError, ValueError) as error:
                raise self._corrupt(unit, f"cannot be decompressed in row {row} ({error})") from None
        if self._verify != "never":
            self._check(rows, target)
