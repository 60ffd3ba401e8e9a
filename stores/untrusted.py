"""What a file from a stranger may claim: sizes that its bytes account for.

A header, a footer or a manifest declares a size in a few bytes. Readers compare the size with the bytes on the disk
before they allocate memory or loop.
"""

from __future__ import annotations

FREE_BYTES = 64 << 20
"""Claims up to 64 MiB need no bytes: fill values and well-packed constants are legal, and this much memory is there."""
RATIO = 100
"""Above `FREE_BYTES`, bytes claimed for each byte on the disk. Actions and states shrink by 2 to 10."""


def is_backed(claimed: int, present: int) -> bool:
    """Whether `present` bytes on the disk account for `claimed` bytes in memory."""
    return claimed <= FREE_BYTES + RATIO * present
