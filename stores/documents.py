"""Text documents that anybody may have written, read within limits: configuration files and the JSON of artefacts.

Size, depth and number of values are limited before anything walks them: a pipe never blocks, a device never fills the
memory, and no later copy, merge or validation meets a document that recursion or an alias blew up.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20
"""Of an artefact, a tokenizer's settings or a model's config.json: more than any that was published."""
MAX_DEPTH = 64
"""Of lists and tables within each other. A deep artefact of ours has 12; Python's own limit is near 900."""
MAX_VALUES = 1_000_000
"""Of a configuration, aliases counted each time they are used: 5,000 instructions with their dimensions are 100,000."""
MAX_JSON_VALUES = 16_000_000
"""Of a JSON document, which has no aliases: its bytes bound the values, so that the limit only bounds the memory."""


def read_bytes(file: Path, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Raises `OSError`, and `ValueError` for a pipe, a device or a folder, and for more than `limit` bytes.
    """
    _require_regular(file.stat(), limit)  # before opening, which already acts on some devices
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe put there since then never blocks
    with os.fdopen(descriptor, "rb") as opened:
        _require_regular(os.fstat(descriptor), limit)
        data = opened.read(limit + 1)  # a growing file, or one of /proc that claims no size
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def read_json_file(file: Path, limit: int = MAX_JSON_BYTES, *, finite: bool = False) -> Any:
    """Return the value of a JSON file. Raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(file, limit), finite=finite)


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text.

    Raises `ValueError` for no JSON, with `finite` for NaN and Infinity, and what `require_limits` raises.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant if finite else None)
    except RecursionError:
        raise ValueError(f"lists and tables within each other exceed {MAX_DEPTH}") from None
    require_limits(value, limit=MAX_JSON_VALUES)
    return value


def require_limits(
    value: Any, children: Callable[[Any], Iterable[Any]] | None = None, *, limit: int = MAX_VALUES
) -> None:
    """Raise `ValueError` for a value of more than `MAX_DEPTH` levels or `limit` values.

    `children` returns the values within a value; the default knows tables and lists. A list used twice counts twice.
    """
    inside, seen = children or _children, 1
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        found = list(inside(item))
        seen += len(found)
        if found and depth >= MAX_DEPTH:
            raise ValueError(f"lists and tables within each other exceed {MAX_DEPTH}")
        if seen > limit:  # counted before they wait: 1,000 aliases of 1,000 aliases would fill the memory
            raise ValueError(f"more than {limit} values")
        waiting += [(part, depth + 1) for part in found]


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple | set) else ()


def _require_regular(status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size} bytes, more than {limit}")
