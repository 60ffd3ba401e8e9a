"""The episode and task tables: which rows are which demonstration, and what it was told to do.

Arrays of one chunk each: `episodes/row_start`, `episodes/length`, `episodes/task` int64 [E]; `episodes/id` and
`tasks/text` as UTF-8 bytes, uint8 [E, L] and [K, L], zero-padded (zarr v3 has no settled string type yet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla.stores.errors import SourceError


@dataclass(frozen=True)
class EpisodeTable:
    """All episodes of a store: `ids` are stable keys, `row_start` and `length` int64 [E], `task` indexes `tasks`."""

    ids: tuple[str, ...]
    row_start: NDArray[np.int64]
    length: NDArray[np.int64]
    task: NDArray[np.int64]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def plan(cls, ids: Sequence[str], lengths: Sequence[int], tasks: Sequence[str]) -> EpisodeTable:
        """Lay episodes end to end. Raises `SourceError` on duplicate ids and on episodes without frames."""
        if not ids:
            raise SourceError("the source has no episodes", expected="at least one")
        if len(set(ids)) != len(ids):
            twice = next(name for name in ids if list(ids).count(name) > 1)
            raise SourceError(f"episode id {twice!r} occurs twice", expected="unique ids")
        for name, frames in zip(ids, lengths, strict=True):
            if frames < 1:
                raise SourceError(f"episode {name!r} has {frames} frames", expected="at least one", fix="--skip-bad")
        length = np.asarray(lengths, np.int64)
        texts = tuple(dict.fromkeys(tasks))
        number = {text: index for index, text in enumerate(texts)}
        task = np.asarray([number[text] for text in tasks], np.int64)
        return cls(tuple(ids), np.cumsum(length) - length, length, task, texts)

    @property
    def rows(self) -> int:
        """Rows that the episodes span."""
        return int((self.row_start + self.length).max())

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return `{path in the store: array}`."""
        return {
            "episodes/id": encode_text(self.ids),
            "episodes/row_start": self.row_start,
            "episodes/length": self.length,
            "episodes/task": self.task,
            "tasks/text": encode_text(self.tasks),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> EpisodeTable:
        """Invert `to_arrays`."""
        return cls(
            decode_text(arrays["episodes/id"]),
            arrays["episodes/row_start"].astype(np.int64),
            arrays["episodes/length"].astype(np.int64),
            arrays["episodes/task"].astype(np.int64),
            decode_text(arrays["tasks/text"]),
        )


TABLES = ("episodes/id", "episodes/row_start", "episodes/length", "episodes/task", "tasks/text")


def encode_text(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Encode strings as UTF-8 rows [N, L], zero-padded. L is at least 1."""
    raw = [text.encode() for text in texts]
    table = np.zeros((len(raw), max([1, *map(len, raw)])), np.uint8)
    for row, text in zip(table, raw, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return table


def decode_text(table: NDArray[np.generic]) -> tuple[str, ...]:
    """Invert `encode_text`."""
    # As numpy's byte strings, which end before their trailing zeros: five times as fast as row by row.
    rows = np.ascontiguousarray(table, np.uint8).view(f"S{table.shape[1]}").reshape(-1)
    return tuple([row.decode() for row in rows.tolist()])
