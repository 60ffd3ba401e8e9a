"""One shard file: the rows of one feature in one unit, as zarr v3's `sharding_indexed` codec lays them out.

Inner chunk = one row, encoded as its little-endian bytes and their crc32c (4 bytes); after the last row follows the
index: for each of the shard's slots the offset and length (two uint64, both 2**64 - 1 where the slot is empty), and
the crc32c of the index. Source: zarr v3 specification, codecs `sharding_indexed` 1.0 and `crc32c` 1.0.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from vla.stores.errors import CorruptionError
from vla.stores.manifest import FeatureInfo

CRC_BYTES = 4
EMPTY = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class ShardBuffer:
    """The rows of one shard being filled: `rows` [n, *shape] is a view into the bytes that will be written."""

    rows: NDArray[Any]
    raw: NDArray[np.uint8]
    slots: int

    @classmethod
    def allocate(cls, info: FeatureInfo, rows: int, slots: int) -> ShardBuffer:
        """Allocate `rows` rows of a shard that has room for `slots`."""
        dtype = np.dtype(info.dtype)
        raw = np.zeros((rows, info.row_bytes + CRC_BYTES), np.uint8)
        inner = tuple(math.prod(info.shape[axis + 1 :]) * dtype.itemsize for axis in range(len(info.shape)))
        view: NDArray[Any] = np.ndarray((rows, *info.shape), dtype, raw, strides=(raw.strides[0], *inner))
        return cls(view, raw, slots)

    def encode(self, present: NDArray[np.bool_]) -> tuple[list[memoryview], NDArray[np.uint32]]:
        """Return the file's bytes and the crc32c of each row [n]; rows not `present` become empty slots."""
        size = self.raw.shape[1] - CRC_BYTES
        crcs = np.zeros(len(self.raw), np.uint32)
        for row in np.flatnonzero(present):
            crcs[row] = google_crc32c.value(self.raw[row, :size])
        self.raw[:, size:] = crcs.astype("<u4")[:, None].view(np.uint8)
        index = np.full((self.slots, 2), EMPTY, "<u8")
        kept = np.flatnonzero(present)
        index[kept, 0] = np.arange(len(kept), dtype="<u8") * np.uint64(self.raw.shape[1])
        index[kept, 1] = self.raw.shape[1]
        body = self.raw if len(kept) == len(self.raw) else self.raw[kept]
        tail = index.tobytes()
        crc = struct.pack("<I", google_crc32c.value(tail))
        return [body.data.cast("B"), memoryview(tail + crc)] if len(kept) else [memoryview(tail + crc)], crcs


def index_bytes(slots: int) -> int:
    """Size of a shard's index with its checksum."""
    return slots * 16 + CRC_BYTES


def decode_index(tail: bytes, info: FeatureInfo, file_bytes: int, where: str) -> NDArray[np.int64]:
    """Return each slot's byte offset [slots], -1 where empty. Raises `CorruptionError` naming `where`.

    Offsets and lengths are checked against the file's size, so that no read can leave the file.
    """
    body, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise CorruptionError(f"{where}: the shard index does not match its checksum")
    index = np.frombuffer(body, "<u8").reshape(-1, 2)
    empty = (index == EMPTY).all(axis=1)
    wanted = info.row_bytes + CRC_BYTES
    bad = ~empty & ((index[:, 1] != wanted) | (index[:, 0] > max(file_bytes - wanted, 0)))
    if bad.any():
        raise CorruptionError(f"{where}: slot {int(bad.argmax())} of the shard index points outside the file")
    return np.where(empty, -1, index[:, 0].astype(np.int64))
