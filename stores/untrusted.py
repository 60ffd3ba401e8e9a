"""What a file from a stranger may claim: sizes that its bytes account for, JSON of a bounded depth.

A header, a footer or a manifest declares a size in a few bytes. Readers compare the size with the bytes on the disk
before they allocate memory or loop.
"""

from __future__ import annotations

import json
from typing import Any

FREE_BYTES = 64 << 20
"""Claims up to 64 MiB need no bytes: fill values and well-packed constants are legal, and this much memory is there."""
RATIO = 100
"""Above `FREE_BYTES`, bytes claimed for each byte on the disk. Actions and states shrink by 2 to 10."""
MAX_DEPTH = 100
"""Containers inside containers of a JSON document; a manifest with its configurations is about ten deep."""


def is_backed(claimed: int, present: int) -> bool:
    """Whether `present` bytes on the disk account for `claimed` bytes in memory."""
    return claimed <= FREE_BYTES + RATIO * present


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON document. Raises `ValueError` where it is none, or nested deeper than `MAX_DEPTH`.

    Python parses some 900 levels, and what walks the value afterwards (copies, digests, pydantic) does not.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
