"""Zarr arrays on a local disk, v2 and v3, as the caches use them: numbers only, every chunk there.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla.featurize.caches.checks import SKIP
from vla.featurize.sources.lerobot_info import inside
from vla.stores.documents import parse_json
from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer
from vla.stores.untrusted import is_backed

COMPRESSORS = {"blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma"}
CHECKSUMS = {"crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3"}

FILTERS = (
    {"delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype"} | COMPRESSORS | CHECKSUMS
)
"""Those of numcodecs that turn numbers into numbers; `pickle`, `json2` and the object filters would make objects."""

CODECS = {"bytes", "transpose", "gzip", "zstd", "blosc", "crc32c", *(f"numcodecs.{name}" for name in FILTERS)}
"""Those of zarr v3 that turn numbers into numbers, beside `sharding_indexed`, which holds codecs itself."""

MAX_CHUNKS = 1 << 24
"""A chunk is a file, and a folder of more is none that a file system serves; refuses a claim of a few bytes."""

METADATA = {2: ".zarray", 3: "zarr.json"}
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
_EMPTY = 2**64 - 1
"""Offset and size of a chunk that a shard does not hold (zarr v3, `sharding_indexed`)."""


@dataclass(frozen=True)
class Shard:
    """How a v3 file holds several chunks of `inner` rows and columns: where its index is, and of how many bytes."""

    inner: tuple[int, ...]
    index_at_end: bool
    has_checksum: bool


@dataclass(frozen=True)
class ZarrArray:
    """One array, its metadata checked. `shape` as on disk, `chunks` what one file holds, `dtype` the name of numpy's.

    `prefix` and `separator` name the files. `has_fill` says whether a chunk that is not stored has a value at all.
    """

    path: Path
    version: Literal[2, 3]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    prefix: str
    separator: str
    compressor: str | None
    has_fill: bool
    shard: Shard | None = None

    @property
    def block_rows(self) -> int:
        """The rows that decode together."""
        return self.shard.inner[0] if self.shard else self.chunks[0]

    def chunk_files(self) -> Iterator[tuple[tuple[int, ...], Path]]:
        """Yield every chunk's place in the grid of chunks, and its file."""
        for place in _places([-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]):
            yield place, self.path / (self.prefix + self.separator.join(map(str, place)))

    def files(self) -> list[Path]:
        """Return the metadata file and that of every chunk that is stored."""
        metadata = self.path / METADATA[self.version]
        return [metadata, *(path for _, path in self.chunk_files() if path.is_file())]

    def require_whole(self, *, fill: bool = False, at_once: bool = False, fix: str = SKIP) -> None:
        """Raise `SourceError` naming the first chunk whose file is missing, too small for it or, under Blosc, cut.

        With `fill`, a missing chunk is the array's fill value: zarr does not store chunks that hold nothing else. No
        reader can then tell such a chunk from a lost one. With `at_once`, all chunks together have to be of a size
        that their files account for: many rows are read.
        """
        block = self.shard.inner if self.shard else self.chunks
        block_bytes, total = math.prod(block) * np.dtype(self.dtype).itemsize, 0
        own, seen = self.path.resolve(), set[Path]()
        for place, path in self.chunk_files():
            if not path.is_file():
                if fill and self.has_fill:
                    continue
                raise SourceError(f"{path} is missing", expected="every chunk of the array", fix=fix)
            if path.is_symlink() or path.parent not in seen:  # a chunk's folder may be a link as well
                inside(own, str(path.relative_to(self.path)))
                seen.add(path.parent)
            refuse_pointer(path)
            size = path.stat().st_size
            if not is_backed(block_bytes, size):
                raise SourceError(f"{path} has {size} bytes for {block_bytes}", expected="a chunk of numbers", fix=SKIP)
            total += size
            if self.shard is not None and not fill:
                self._require_shard(self.shard, place, path, fix)
            elif self.shard is None and self.compressor == "blosc":
                _require_blosc(path)
        claimed = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if at_once and not is_backed(claimed, total):
            found = f"{self.path} declares {claimed} bytes and holds {total}"
            raise SourceError(found, expected="numbers that were written", fix=SKIP)

    def _require_shard(self, shard: Shard, place: tuple[int, ...], path: Path, fix: str) -> None:
        """Raise `SourceError` where a shard lacks a chunk. Chunks beyond the array's end are never stored."""
        counts = [outer // inner for outer, inner in zip(self.chunks, shard.inner, strict=True)]
        entries = 16 * math.prod(counts)
        length = entries + 4 * shard.has_checksum
        size = path.stat().st_size
        if size < length:
            raise SourceError(f"{path} has {size} bytes", expected=f"an index of {length}", fix=SKIP)
        with path.open("rb") as file:
            file.seek(size - length if shard.index_at_end else 0)
            offsets = np.frombuffer(file.read(entries), "<u8").reshape(*counts, 2)[..., 0]
        here = np.ones(counts, bool)
        for axis, count in enumerate(counts):
            starts = place[axis] * self.chunks[axis] + np.arange(count) * shard.inner[axis]
            here &= (starts < self.shape[axis]).reshape([-1 if at == axis else 1 for at in range(len(counts))])
        absent = int((here & (offsets == _EMPTY)).sum())
        if absent:
            raise SourceError(f"{path} lacks {absent} chunks", expected="every chunk of the array", fix=fix)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows `start..stop-1` [n, ...]. Raises `SourceError` where a chunk does not decode."""
        import zarr

        try:
            array = zarr.open_array(self.path, mode="r", zarr_format=self.version)
            return np.asarray(array[start:stop]).astype(self.dtype, copy=False)  # in this machine's byte order
        except (ValueError, RuntimeError, TypeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            what = f"{self.path}, rows {start} to {stop - 1}"
            raise SourceError(
                f"{what} do not decode ({type(error).__name__})", expected="whole chunks", fix=SKIP
            ) from None


def is_zarr_array(path: Path) -> bool:
    """Return whether a folder is an array of zarr v2 or v3; a group of v3 has a `zarr.json` as well."""
    if (path / METADATA[2]).is_file():
        return True
    try:
        return bool(parse_json((path / METADATA[3]).read_bytes()).get("node_type") != "group")
    except OSError:
        return False
    except (ValueError, AttributeError):
        return True  # `open_zarr_array` says what is wrong with it


def arrays_in(folder: Path) -> list[Path]:
    """Return the arrays in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_zarr_array(path)) if folder.is_dir() else []


def open_zarr_array(path: Path) -> ZarrArray:
    """Read and check an array's metadata. Raises `SourceError` for anything but an array of numbers."""
    inside(path.parent.resolve(), path.name)
    v3 = not (path / METADATA[2]).is_file() and (path / METADATA[3]).is_file()
    meta = path / METADATA[3 if v3 else 2]
    inside(path.resolve(), meta.name)
    try:
        found = parse_json(meta.read_bytes())
        array = (_v3 if v3 else _v2)(path, found, meta)
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        refuse_pointer(meta)
        raise SourceError(f"{meta} does not read ({type(error).__name__})", expected="a zarr array") from None
    shape, chunks = array.shape, array.chunks
    if len(shape) != len(chunks) or not shape or min(shape) < 0 or min(chunks) < 1:
        raise SourceError(f"{meta} declares shape {shape}, chunks {chunks}", expected="an array of rows")
    claimed = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    if claimed > MAX_CHUNKS:
        raise SourceError(f"{meta} declares {claimed} chunks", expected=f"at most {MAX_CHUNKS}")
    return array


def _v2(path: Path, found: dict[str, Any], meta: Path) -> ZarrArray:
    code, filters, compressor = str(found["dtype"]), found.get("filters"), found.get("compressor")
    identity = None if compressor is None else compressor["id"]
    if re.fullmatch(r"[<>|=]?[fiub][1248]", code) is None:
        raise SourceError(f"{meta} declares dtype {code!r}", expected="numbers; objects are pickles and never opened")
    if not _are_plain(filters) or (identity is not None and identity not in COMPRESSORS):
        raise SourceError(f"{meta} declares filters {filters}, compressor {identity!r}", expected="plain compression")
    return ZarrArray(
        path,
        2,
        tuple(map(int, found["shape"])),
        tuple(map(int, found["chunks"])),
        np.dtype(code).name,
        "",
        str(found.get("dimension_separator") or "."),
        identity,
        found.get("fill_value") is not None,
    )


def _are_plain(filters: Any) -> bool:
    listed = [] if filters is None else filters
    return isinstance(listed, list) and all(isinstance(one, dict) and one.get("id") in FILTERS for one in listed)


def _v3(path: Path, found: dict[str, Any], meta: Path) -> ZarrArray:
    kind, grid, keys = found["data_type"], found["chunk_grid"], found["chunk_key_encoding"]
    if not isinstance(kind, str) or _NUMBERS.fullmatch(kind) is None:
        raise SourceError(f"{meta} declares data_type {str(kind)[:60]}", expected="numbers")
    if grid["name"] != "regular" or keys["name"] not in ("default", "v2") or found.get("storage_transformers"):
        raise SourceError(f"{meta} declares chunks {grid['name']}, keys {keys['name']}", expected="a regular grid")
    names, shard = _codecs(found["codecs"], meta)
    separator = (keys.get("configuration") or {}).get("separator") or {"default": "/", "v2": "."}[keys["name"]]
    return ZarrArray(
        path,
        3,
        tuple(map(int, found["shape"])),
        tuple(map(int, grid["configuration"]["chunk_shape"])),
        kind,
        f"c{separator}" if keys["name"] == "default" else "",
        str(separator),
        "blosc" if names[-1].endswith("blosc") else None,
        has_fill=True,
        shard=shard,
    )


def _codecs(codecs: list[Any], meta: Path) -> tuple[list[str], Shard | None]:
    """Return the names of v3 codecs, and the shard that they are. Raises `SourceError` for any that makes objects."""
    stated: list[Any] = [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]
    names = [str(codec["name"]) for codec in stated]
    if names == ["sharding_indexed"]:
        how = stated[0]["configuration"]
        _codecs(how["codecs"], meta)
        index, _ = _codecs(how["index_codecs"], meta)
        little = (how["index_codecs"][0].get("configuration") or {}).get("endian", "little") == "little"
        if index not in (["bytes"], ["bytes", "crc32c"]) or not little:
            raise SourceError(f"{meta} declares index codecs {index}", expected="bytes, crc32c")
        inner = tuple(map(int, how["chunk_shape"]))
        return names, Shard(inner, how.get("index_location", "end") == "end", len(index) > 1)
    if not names or not set(names) <= CODECS:
        raise SourceError(f"{meta} declares codecs {names}", expected="plain compression")
    return names, None


def _places(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the places of a grid. `itertools.product` would hold each axis in memory, however long it is said to be."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _places(counts[1:]):
            yield (first, *rest)


def _require_blosc(path: Path) -> None:
    """Compare a Blosc chunk's length with bytes 12 to 15 of its header (little-endian, the header included)."""
    with path.open("rb") as file:
        header = file.read(16)
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != path.stat().st_size:
        raise SourceError(f"{path} has {path.stat().st_size} bytes", expected="as many as its header says", fix=SKIP)
