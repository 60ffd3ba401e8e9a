"""Rows of parquet files by number, a row group at a time, and their columns as arrays.

A file may hold one episode or a thousand, in one row group or in one for each. Decoded row groups are therefore kept
for the next episode, up to a budget in bytes; groups above it are streamed and never held whole.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.stores.errors import SourceError

BUDGET = 256 << 20
"""Bytes of decoded row groups kept. LeRobot's files are at most 100 MB (data_files_size_in_mb)."""

FOOTERS = 16
"""Files whose footer is kept: one of a thousand row groups takes 10 ms to parse, as long as an episode to read."""

STREAM_ROWS = 16
"""Rows decoded at a time from a row group above the budget."""


@dataclass(frozen=True)
class _Footer:
    """A file's metadata; row group g begins at row `starts[g]`, `starts[-1]` is the number of rows."""

    metadata: Any
    names: tuple[str, ...]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, file: Path) -> _Footer:
        metadata = pq.read_metadata(file)
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        names = tuple(metadata.schema.to_arrow_schema().names)
        return cls(metadata, names, np.cumsum([0, *counts], dtype=np.int64))


class RowReader:
    """Reads row ranges of parquet files that do not change meanwhile. Safe to call from several threads."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int, tuple[str, ...]], Any] = OrderedDict()
        self._bytes = 0
        self._footers: OrderedDict[Path, _Footer] = OrderedDict()

    def read(self, file: Path, columns: Sequence[str], start: int, stop: int) -> Iterator[Any]:
        """Yield pyarrow tables that together are rows start..stop-1. Raises `SourceError` where it cannot be read."""
        with _naming(file):
            footer = self._footer(file)
            require_columns(footer.names, columns, file)
            with pq.ParquetFile(file, metadata=footer.metadata) as reader:
                group = int(np.searchsorted(footer.starts, start, side="right")) - 1
                while group < len(footer.starts) - 1 and footer.starts[group] < stop:
                    low = max(start - int(footer.starts[group]), 0)
                    high = int(min(stop, footer.starts[group + 1]) - footer.starts[group])
                    if low < high:
                        yield from self._group(reader, file, group, tuple(columns), low, high)
                    group += 1

    def _footer(self, file: Path) -> _Footer:
        with self._lock:
            footer = self._footers.get(file)
        if footer is None:
            footer = _Footer.of(file)
            with self._lock:
                self._footers[file] = footer
                while len(self._footers) > FOOTERS:
                    self._footers.popitem(last=False)
        return footer

    def _group(
        self, reader: Any, file: Path, group: int, columns: tuple[str, ...], low: int, high: int
    ) -> Iterator[Any]:
        key = (file, group, columns)
        with self._lock:
            table = self._kept.get(key)
            if table is not None:
                self._kept.move_to_end(key)
        if table is None:
            if _decoded_bytes(reader.metadata.row_group(group), columns) > self._budget:
                yield from _stream(reader, group, columns, low, high)
                return
            table = reader.read_row_group(group, columns=list(columns), use_threads=False)
            with self._lock:
                self._bytes += table.nbytes if key not in self._kept else 0
                self._kept[key] = table
                while len(self._kept) > 1 and self._bytes > self._budget:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        yield table.slice(low, high - low)


def schema(file: Path) -> Any:
    """Return the pyarrow schema of a parquet file. Raises `SourceError` where it cannot be read."""
    with _naming(file):
        return pq.read_schema(file)


def rows(file: Path) -> int:
    """Return the number of rows. Raises `SourceError` where the file cannot be read."""
    with _naming(file):
        return int(pq.read_metadata(file).num_rows)


def read_table(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """Read whole columns of a (small) file as a pyarrow table; `optional` ones only where they are there."""
    there = schema(file).names
    require_columns(there, columns, file)
    with _naming(file):
        return pq.read_table(file, columns=[*columns, *(name for name in optional if name in there)], partitioning=None)


def require_columns(there: Sequence[str], wanted: Sequence[str], file: Path) -> None:
    """Raise `SourceError` naming the columns of `wanted` that a file has not."""
    absent = [name for name in wanted if name not in there]
    if absent:
        raise SourceError(
            f"{file} has no column {', '.join(absent)}; it has {', '.join(there)}", expected="all of them"
        )


def to_array(column: Any, where: str) -> NDArray[np.generic]:
    """Turn a pyarrow column of numbers [N], or of equally long lists of numbers [N, D], into an array.

    Raises `SourceError` naming `where` on nulls, on lists of several lengths and on what is no number.
    """
    array = column.combine_chunks()
    shape: tuple[int, ...] = (len(array),)
    kind = array.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if array.null_count:
            raise SourceError(f"{where} has {array.null_count} empty rows", expected="numbers", fix="--skip-bad")
        fixed = pa.types.is_fixed_size_list(kind)
        lengths = {kind.list_size} if fixed else set(array.value_lengths().to_pylist())
        if len(lengths) > 1:
            raise SourceError(f"{where} has lists of {len(lengths)} lengths", expected="one length", fix="--skip-bad")
        array = array.flatten()
        shape = (*shape, *lengths)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise SourceError(f"{where} holds {kind}", expected="numbers, or lists of numbers")
    if array.null_count:
        raise SourceError(f"{where} has {array.null_count} empty values", expected="numbers", fix="--skip-bad")
    if len(array) != math.prod(shape):  # no rows of lists: their length is unknown
        shape = (0,)
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def described(kind: Any, first: Any) -> tuple[str, int | None]:
    """Return (dtype, width) of a column of pyarrow type `kind`; `first` is its first cell, for lists of any length."""
    if pa.types.is_fixed_size_list(kind):
        return _dtype(kind.value_type), int(kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _dtype(kind.value_type), len(first) if isinstance(first, list) else 0
    return _dtype(kind), None


def _dtype(kind: Any) -> str:
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _decoded_bytes(group: Any, columns: tuple[str, ...]) -> int:
    """Sum the decoded size of the columns; a parquet column's path starts with the name of its top-level column."""
    total = 0
    for number in range(group.num_columns):
        column = group.column(number)
        if any(column.path_in_schema == name or column.path_in_schema.startswith(name + ".") for name in columns):
            total += column.total_uncompressed_size
    return total


def _stream(reader: Any, group: int, columns: tuple[str, ...], low: int, high: int) -> Iterator[Any]:
    at = 0
    for batch in reader.iter_batches(STREAM_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
        start, stop = max(low - at, 0), min(high - at, len(batch))
        if start < stop:
            yield pa.Table.from_batches([batch.slice(start, stop - start)])
        at += len(batch)
        if at >= high:
            return


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a missing or damaged file into a `SourceError` that names it."""
    if not file.is_file():
        raise SourceError(f"{file} is missing", expected="a parquet file", fix="--skip-bad")
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{file} cannot be read: {reason}", expected="a parquet file") from None
