"""One shard file: the rows of one feature in one unit, as zarr v3's `sharding_indexed` codec lays them out.

Inner chunk = one row, encoded as its little-endian bytes and their crc32c (4 bytes); in archives the bytes are
compressed with zstd first. After the last row follows the index: for each of the shard's slots the offset and length
(two uint64, both 2**64 - 1 where the slot is empty), and the crc32c of the index. Source: zarr v3 specification,
codecs `sharding_indexed` 1.0 and `crc32c` 1.0.
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
ZSTD_LEVEL = 3
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
        dtype = info.stored
        raw = np.zeros((rows, info.row_bytes + CRC_BYTES), np.uint8)
        inner = tuple(math.prod(info.shape[axis + 1 :]) * dtype.itemsize for axis in range(len(info.shape)))
        view: NDArray[Any] = np.ndarray((rows, *info.shape), dtype, raw, strides=(raw.strides[0], *inner))
        return cls(view, raw, slots)

    def checksums(self, present: NDArray[np.bool_]) -> NDArray[np.uint32]:
        """Return the crc32c of each row [n]; 0 for rows not `present`."""
        size = self.raw.shape[1] - CRC_BYTES
        crcs = np.zeros(len(self.raw), np.uint32)
        for row in np.flatnonzero(present):
            crcs[row] = google_crc32c.value(self.raw[row, :size])
        return crcs

    def encode(self, present: NDArray[np.bool_], crcs: NDArray[np.uint32]) -> list[memoryview]:
        """Return the file's bytes, given each row's crc32c [n]; rows not `present` become empty slots."""
        size = self.raw.shape[1] - CRC_BYTES
        self.raw[:, size:] = crcs.astype("<u4")[:, None].view(np.uint8)
        kept = np.flatnonzero(present)
        body = self.raw if len(kept) == len(self.raw) else self.raw[kept]
        tail = encode_index(self.slots, kept, np.full(len(kept), self.raw.shape[1], np.int64))
        return [body.data.cast("B"), memoryview(tail)] if len(kept) else [memoryview(tail)]

    def encode_compressed(self, present: NDArray[np.bool_]) -> list[memoryview]:
        """Return the file's bytes with each row as `zstd` makes it, and the crc32c of that."""
        from numcodecs.zstd import compress

        kept, chunks = np.flatnonzero(present), []
        for row in kept:
            body = compress(self.raw[row, : self.raw.shape[1] - CRC_BYTES], ZSTD_LEVEL)
            chunks.append(memoryview(body + struct.pack("<I", google_crc32c.value(body))))
        sizes = np.array([chunk.nbytes for chunk in chunks], np.int64)
        return [*chunks, memoryview(encode_index(self.slots, kept, sizes))]


def chunk_sizes(info: FeatureInfo, *, zstd: bool) -> range:
    """Return the possible sizes of a row in a shard, its checksum included.

    zstd adds at most 1/256 and 64 bytes (zstd.h, ZSTD_COMPRESSBOUND).
    """
    size = info.row_bytes
    if not zstd:
        return range(size + CRC_BYTES, size + CRC_BYTES + 1)
    return range(CRC_BYTES + 1, size + (size >> 8) + 1024 + CRC_BYTES)


def encode_index(slots: int, kept: NDArray[np.int64], sizes: NDArray[np.int64]) -> bytes:
    """Return the index of a shard whose slots `kept` [k] hold chunks of `sizes` [k] bytes, one after the other."""
    index = np.full((slots, 2), EMPTY, "<u8")
    index[kept, 0] = np.cumsum(sizes) - sizes
    index[kept, 1] = sizes
    tail = index.tobytes()
    return tail + struct.pack("<I", google_crc32c.value(tail))


def index_bytes(slots: int) -> int:
    """Size of a shard's index with its checksum."""
    return slots * 16 + CRC_BYTES


def decode_index(tail: bytes, sizes: range, file_bytes: int, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each slot's byte offset [slots], -1 where empty, and its size [slots].

    Raises `CorruptionError` naming `where`. Sizes are compared with the possible `sizes`, and the ends of the chunks
    with the file's, so that no read can leave the file.
    """
    body, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise CorruptionError(f"{where}: the shard index does not match its checksum")
    index = np.frombuffer(body, "<u8").reshape(-1, 2)
    empty = (index == EMPTY).all(axis=1)
    start, size = index[:, 0], index[:, 1]
    bad = (size < sizes.start) | (size >= sizes.stop) | (size > file_bytes)
    bad |= start > file_bytes - np.where(bad, 0, size)
    bad &= ~empty
    if bad.any():
        raise CorruptionError(f"{where}: slot {int(bad.argmax())} of the shard index points outside the file")
    return np.where(empty, -1, start.astype(np.int64)), np.where(empty, 0, size.astype(np.int64))
