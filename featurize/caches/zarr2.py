"""Zarr v2 arrays on a local disk, as the caches use them: numbers only, every chunk there.

The metadata are checked before zarr opens the array: an object type or a `pickle` filter would run code, and a chunk
whose file is missing would read as zeros without a word. A truncated Blosc chunk would decode to whatever lies behind
it in memory, so its header is compared with the size of its file. The size of a chunk is a number in the metadata, so
it is compared with the size of its file as well.
"""

from __future__ import annotations

import lzma
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.checks import SKIP
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer
from vla.stores.untrusted import is_backed

COMPRESSORS = {"blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma"}

FILTERS = {"delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype", *COMPRESSORS}
"""Those of numcodecs that turn numbers into numbers; `pickle`, `json2` and the object filters would make objects."""


@dataclass(frozen=True)
class Zarr2:
    """One array, its metadata checked. `shape` as on disk, `dtype` the name of numpy's.

    `has_fill` says whether a chunk that is not stored has a value at all.
    """

    path: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    separator: str
    compressor: str | None
    has_fill: bool

    def chunk_files(self) -> Iterator[Path]:
        """Yield every chunk's file. Lazy: metadata may claim more chunks than the memory holds names."""
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]
        for number in range(math.prod(counts)):
            place = []
            for count in reversed(counts):
                number, at = divmod(number, count)
                place.append(str(at))
            yield self.path / self.separator.join(reversed(place))

    def files(self) -> list[Path]:
        """Return the metadata file and that of every chunk that is stored."""
        return [self.path / ".zarray", *(path for path in self.chunk_files() if path.is_file())]

    def require_whole(self, *, fill: bool = False, at_once: bool = False, fix: str = SKIP) -> None:
        """Raise `SourceError` naming the first chunk whose file is missing, too small for it or, under Blosc, cut.

        With `fill`, a missing chunk is the array's fill value: zarr does not store chunks that hold nothing else. No
        reader can then tell such a chunk from a lost one. With `at_once`, all chunks together have to be of a size
        that their files account for: many rows are read.
        """
        chunk_bytes, total = math.prod(self.chunks) * np.dtype(self.dtype).itemsize, 0
        for path in self.chunk_files():
            if not path.is_file():
                if fill and self.has_fill:
                    continue
                raise SourceError(f"{path} is missing", expected="every chunk of the array", fix=fix)
            refuse_pointer(path)
            size = path.stat().st_size
            if not is_backed(chunk_bytes, size):
                raise SourceError(f"{path} has {size} bytes for {chunk_bytes}", expected="a chunk of numbers", fix=SKIP)
            if self.compressor == "blosc":
                _require_blosc(path)
            total += size
        claimed = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if at_once and not is_backed(claimed, total):
            found = f"{self.path} declares {claimed} bytes and holds {total}"
            raise SourceError(found, expected="numbers that were written", fix=SKIP)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows `start..stop-1` [n, ...]. Raises `SourceError` where a chunk does not decode."""
        import zarr

        try:
            array = zarr.open_array(self.path, mode="r", zarr_format=2)
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError, TypeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            what = f"{self.path}, rows {start} to {stop - 1}"
            raise SourceError(
                f"{what} do not decode ({type(error).__name__})", expected="whole chunks", fix=SKIP
            ) from None


def open_zarr2(path: Path) -> Zarr2:
    """Read and check `.zarray`. Raises `SourceError` for anything but an array of numbers."""
    meta = path / ".zarray"
    try:
        found = parse_json(meta.read_bytes())
        shape, chunks = tuple(map(int, found["shape"])), tuple(map(int, found["chunks"]))
        code, filters, compressor = str(found["dtype"]), found.get("filters"), found.get("compressor")
        identity = None if compressor is None else compressor["id"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        refuse_pointer(meta)
        raise SourceError(f"{meta} does not read ({type(error).__name__})", expected="a zarr v2 array") from None
    if re.fullmatch(r"[<>|=]?[fiub][1248]", code) is None:
        raise SourceError(f"{meta} declares dtype {code!r}", expected="numbers; objects are pickles and never opened")
    if not _are_plain(filters) or (identity is not None and identity not in COMPRESSORS):
        raise SourceError(f"{meta} declares filters {filters}, compressor {identity!r}", expected="plain compression")
    if len(shape) != len(chunks) or not shape or min(shape) < 0 or min(chunks) < 1:
        raise SourceError(f"{meta} declares shape {shape}, chunks {chunks}", expected="an array of rows")
    return Zarr2(
        path,
        shape,
        chunks,
        np.dtype(code).name,
        str(found.get("dimension_separator") or "."),
        identity,
        found.get("fill_value") is not None,
    )


def _are_plain(filters: Any) -> bool:
    listed = [] if filters is None else filters
    return isinstance(listed, list) and all(isinstance(one, dict) and one.get("id") in FILTERS for one in listed)


def _require_blosc(path: Path) -> None:
    """Compare a Blosc chunk's length with bytes 12 to 15 of its header (little-endian, the header included)."""
    with path.open("rb") as file:
        header = file.read(16)
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != path.stat().st_size:
        raise SourceError(f"{path} has {path.stat().st_size} bytes", expected="as many as its header says", fix=SKIP)
