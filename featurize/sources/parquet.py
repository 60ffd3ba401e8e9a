"""Rows of parquet files by number, a row group at a time, and their columns as arrays.

A file may hold one episode or a thousand, in one row group or in one for each. Decoded row groups are therefore kept
for the next episode, up to a budget in bytes; groups above it are streamed and never held whole.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer

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
    ranges: Mapping[str, range]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, file: Path) -> _Footer:
        metadata = pq.read_metadata(file)
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        kinds = metadata.schema.to_arrow_schema()
        ranges = _index_ranges(kinds)
        return cls(metadata, (*kinds.names, *ranges), ranges, np.cumsum([0, *counts], dtype=np.int64))


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
            stored = tuple(name for name in columns if name not in footer.ranges)
            with pq.ParquetFile(file, metadata=footer.metadata) as reader:
                group = int(np.searchsorted(footer.starts, start, side="right")) - 1
                at = start
                while group < len(footer.starts) - 1 and footer.starts[group] < stop:
                    low = max(start - int(footer.starts[group]), 0)
                    high = int(min(stop, footer.starts[group + 1]) - footer.starts[group])
                    if low < high:
                        for table in self._group(reader, file, group, stored, low, high):
                            yield _with_ranges(table, footer.ranges, columns, at)
                            at += len(table)
                    group += 1

    def names(self, file: Path) -> tuple[str, ...]:
        """Return the names of a file's columns. Raises `SourceError` where it cannot be read."""
        with _naming(file):
            return self._footer(file).names

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
    """Return the pyarrow schema of a parquet file, with the indices that pandas keeps as metadata alone.

    Raises `SourceError` where the file cannot be read.
    """
    with _naming(file):
        kinds = pq.read_schema(file)
    for name in _index_ranges(kinds):
        kinds = kinds.append(pa.field(name, pa.int64()))
    return kinds


def rows(file: Path) -> int:
    """Return the number of rows. Raises `SourceError` where the file cannot be read."""
    with _naming(file):
        return int(pq.read_metadata(file).num_rows)


def read_table(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """Read whole columns of a (small) file as a pyarrow table; `optional` ones only where they are there."""
    there = schema(file).names
    require_columns(there, columns, file)
    wanted = [*columns, *(name for name in optional if name in there)]
    with _naming(file):
        ranges = _index_ranges(pq.read_schema(file))
        stored = [name for name in wanted if name not in ranges]
        return _with_ranges(pq.read_table(file, columns=stored, partitioning=None), ranges, wanted, 0)


def require_columns(there: Sequence[str], wanted: Sequence[str], file: Path) -> None:
    """Raise `SourceError` naming the columns of `wanted` that a file has not."""
    absent = [name for name in wanted if name not in there]
    if absent:
        raise SourceError(
            f"{file} has no column {', '.join(absent)}; it has {', '.join(there)}", expected="all of them"
        )


def to_array(column: Any, where: str) -> NDArray[np.generic]:
    """Turn a pyarrow column of numbers [N], or of equally long lists of numbers [N, D, ...], into an array.

    Every encoding of one logical type gives the same values: dictionary, run-end and extension types are decoded,
    lists may be of any kind and nested, times and durations become float64 seconds, and a null among floats is NaN, as
    pandas writes it. Raises `SourceError` naming `where` on other nulls, on lists of several lengths and on values that
    are no numbers.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_values(chunk, where) for chunk in chunks if len(chunk)]
    if not parts:
        return np.zeros(0)  # no rows: the length of their lists is unknown
    if len({part.shape[1:] for part in parts}) > 1:
        raise SourceError(f"{where} has lists of several lengths", expected="one length", fix="--skip-bad")
    return np.concatenate(parts)


def _values(array: Any, where: str) -> NDArray[np.generic]:
    """Return one pyarrow array as numbers [N, ...]."""
    array = _decoded(array)
    kind = array.type
    if pa.types.is_null(kind) or (array.null_count and not pa.types.is_floating(kind)):
        what = "rows" if _is_list(kind) else "values"
        raise SourceError(f"{where} has {array.null_count} empty {what}", expected="numbers", fix="--skip-bad")
    if _is_list(kind):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise SourceError(f"{where} has lists of {len(lengths)} lengths", expected="one length", fix="--skip-bad")
        inner = _values(array.flatten(), where)
        return inner.reshape(len(array), len(inner) // max(len(array), 1), *inner.shape[1:])
    if (ticks := _ticks(kind)) is not None:
        stored = pa.int32() if pa.types.is_time32(kind) else pa.int64()
        return np.asarray(array.cast(stored).to_numpy(zero_copy_only=False)) / ticks
    if pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise SourceError(f"{where} holds {kind}", expected="numbers, or lists of numbers")
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _decoded(array: Any) -> Any:
    """Undo encodings that leave the logical type as it is."""
    while True:
        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            return array


def _decoded_type(kind: Any) -> Any:
    """Return the type that `_decoded` leaves."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind


def is_text(kind: Any) -> bool:
    """Return whether a column of pyarrow type `kind` holds text, in any of Arrow's encodings."""
    kind = _decoded_type(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def texts(column: Any) -> list[str | None] | None:
    """Return the text of each row, None for a row without one; None for a column that holds no text.

    A list of texts is read as these, joined by `; `, since writers keep a single text as a list of one.
    """
    kind = _decoded_type(column.type)
    if is_text(kind):
        return list(column.to_pylist())
    if _is_list(kind) and is_text(kind.value_type):
        rows = [[text for text in row or () if text is not None] for row in column.to_pylist()]
        return ["; ".join(row) if row else None for row in rows]
    return None


def _is_list(kind: Any) -> bool:
    types = pa.types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))


def _ticks(kind: Any) -> int | None:
    """Return the ticks in a second of a type of times or durations, or None."""
    types = pa.types
    timed = types.is_timestamp(kind) or types.is_duration(kind) or types.is_time(kind)
    return {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[kind.unit] if timed else None


def described(kind: Any, first: Any) -> tuple[str, tuple[int, ...]]:
    """Return (dtype, shape of a row) of a column of pyarrow type `kind`.

    `first` is its first cell, which gives the length of lists that may have any.
    """
    kind = _decoded_type(kind)
    if _is_list(kind):
        cells = first if isinstance(first, list) else []
        length = int(kind.list_size) if pa.types.is_fixed_size_list(kind) else len(cells)
        dtype, inner = described(kind.value_type, cells[0] if cells else None)
        return dtype, (length, *inner)
    return _dtype(kind), ()


def _dtype(kind: Any) -> str:
    if _ticks(kind) is not None or pa.types.is_decimal(kind):
        return "float64"
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _index_ranges(kinds: Any) -> dict[str, range]:
    """Return the named indices that pandas keeps as metadata alone, without a column, {name: values}."""
    try:
        stated = json.loads((kinds.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
        ranges = [entry for entry in stated if isinstance(entry, dict) and entry.get("kind") == "range"]
        found = {str(e["name"]): range(e["start"], e["stop"], e["step"]) for e in ranges if e.get("name") is not None}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}  # other software's note: the columns say everything else
    return {name: values for name, values in found.items() if name not in kinds.names}


def _with_ranges(table: Any, ranges: Mapping[str, range], columns: Sequence[str], start: int) -> Any:
    """Add those of `columns` that are indices kept as metadata; the table's rows begin at row `start` of the file."""
    for name in columns:
        if name in ranges:
            values = ranges[name][start : start + len(table)]
            table = table.append_column(name, pa.array(list(values), pa.int64()))
    return table.select(list(columns))


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
        refuse_pointer(file)
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{file} cannot be read: {reason}", expected="a parquet file") from None
