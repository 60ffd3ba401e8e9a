"""The episode and task tables: which rows are which demonstration, and what it was told to do.

Arrays of one chunk each: `episodes/row_start`, `episodes/length`, `episodes/task` int64 [E]; `episodes/id` and
`tasks/text` as UTF-8 bytes, uint8 [E, L] and [K, L], zero-padded (zarr v3 has no settled string type yet).
Only where a source says more of an episode than its task: `episodes/label` int64 [E], an index into `labels/json`
uint8 [N, L], each an object of named texts in JSON. A reader that knows no labels opens such a store all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vla.stores.errors import SourceError


@dataclass(frozen=True)
class EpisodeTable:
    """All episodes of a store: `ids` are stable keys, `row_start` and `length` int64 [E], `task` indexes `tasks`.

    `label` int64 [E] indexes `labels`, the named texts of an episode; without labels it is empty.
    """

    ids: tuple[str, ...]
    row_start: NDArray[np.int64]
    length: NDArray[np.int64]
    task: NDArray[np.int64]
    tasks: tuple[str, ...]
    label: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: tuple[Mapping[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def plan(
        cls,
        ids: Sequence[str],
        lengths: Sequence[int],
        tasks: Sequence[str],
        texts: Sequence[Mapping[str, str]] | None = None,
    ) -> EpisodeTable:
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
        task, distinct = _number(tasks)
        label, labels = _number([_encode_label(named) for named in texts] if texts and any(texts) else [])
        starts = np.cumsum(length) - length
        return cls(tuple(ids), starts, length, task, distinct, label, tuple(_decode_label(text) for text in labels))

    @property
    def rows(self) -> int:
        """Rows that the episodes span."""
        return int((self.row_start + self.length).max())

    @cached_property
    def position(self) -> Mapping[str, int]:
        """The position of each episode by its id."""
        return {name: at for at, name in enumerate(self.ids)}

    def rows_in(self, episode: int, rows: range) -> range:
        """Return those of an episode's rows that lie in `rows`."""
        start = int(self.row_start[episode])
        first = min(max(start, rows.start), rows.stop)
        return range(first, max(first, min(start + int(self.length[episode]), rows.stop)))

    def rows_of(self, names: Iterable[str], rows: range) -> NDArray[np.bool_]:
        """Return which of `rows` belong to the episodes called `names`, bool [len(rows)]."""
        theirs = np.zeros(len(rows), bool)
        for name in names:
            if name in self.position:
                inside = self.rows_in(self.position[name], rows)
                theirs[inside.start - rows.start : inside.stop - rows.start] = True
        return theirs

    def texts(self, episode: int) -> Mapping[str, str]:
        """Return the named texts of an episode, by position; empty where its source gave none."""
        return self.labels[int(self.label[episode])] if self.labels else {}

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return `{path in the store: array}`."""
        arrays: dict[str, NDArray[np.generic]] = {
            "episodes/id": encode_text(self.ids),
            "episodes/row_start": self.row_start,
            "episodes/length": self.length,
            "episodes/task": self.task,
            "tasks/text": encode_text(self.tasks),
        }
        if self.labels:
            arrays["episodes/label"] = self.label
            arrays["labels/json"] = encode_text([_encode_label(named) for named in self.labels])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> EpisodeTable:
        """Invert `to_arrays`. Raises `ValueError` for text that is no UTF-8 and labels that are no texts by name."""
        labels = arrays.get("labels/json")
        return cls(
            decode_text(arrays["episodes/id"]),
            arrays["episodes/row_start"].astype(np.int64),
            arrays["episodes/length"].astype(np.int64),
            arrays["episodes/task"].astype(np.int64),
            decode_text(arrays["tasks/text"]),
            arrays.get("episodes/label", np.zeros(0)).astype(np.int64),
            tuple(_decode_label(text) for text in decode_text(labels)) if labels is not None else (),
        )


TABLES = ("episodes/id", "episodes/row_start", "episodes/length", "episodes/task", "tasks/text")
LABELS = ("episodes/label", "labels/json")
"""Both or neither; the manifest lists those that are there."""

TEXTS = ("episodes/id", "tasks/text", "labels/json")
"""The tables of encoded text, uint8 with two axes; the others are int64 with one."""


def _number(texts: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return (index of each among the distinct ones [N], the distinct ones in order)."""
    number: dict[str, int] = {}
    return np.asarray([number.setdefault(text, len(number)) for text in texts], np.int64), tuple(number)


def _encode_label(texts: Mapping[str, str]) -> str:
    return json.dumps(dict(texts), sort_keys=True, ensure_ascii=False)


def _decode_label(text: str) -> Mapping[str, str]:
    named = json.loads(text)
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
        raise ValueError(f"{text[:80]!r} is no object of texts")
    return named


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
