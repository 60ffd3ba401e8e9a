"""Tasks of different action dimensions in one store: every column that any of them has, and which of them are real.

Columns are placed by name, not by position: the gripper of a six-joint arm stays a gripper beside a seven-joint one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

DIMS = "action_dims"
"""The column that says which components of `action` a row's task has: bool [A]."""

PAD = "--set pad_actions=true puts them into one store, padded and masked"


def joint_names(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names of all columns: those of the longest first, then what others have beside, in their order."""
    longest_first = sorted(dict.fromkeys(found), key=len, reverse=True)
    return tuple(dict.fromkeys(name for names in longest_first for name in names))


def real_columns(names: Sequence[str], among: Sequence[str]) -> NDArray[np.bool_]:
    """Return which of the columns `among` are in `names`, bool [A]."""
    return np.isin(np.array(among, dtype=object), np.array(names, dtype=object))


def placed(values: NDArray[np.float32], names: Sequence[str], among: Sequence[str]) -> NDArray[np.float32]:
    """Return values [T, n] with columns `names` as [T, A] with columns `among`, 0 where there is none."""
    if tuple(names) == tuple(among):
        return values
    out = np.zeros((len(values), len(among)), values.dtype)
    out[:, [among.index(name) for name in names]] = values
    return out
