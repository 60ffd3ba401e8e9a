"""Numbers of one episode of a LeRobot data set, checked, from the columns that a `ColumnMap` chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla.featurize.sources import parquet
from vla.featurize.sources.episode_checks import fitted, require_finite, require_order
from vla.featurize.sources.lerobot_layout import EpisodeRow
from vla.featurize.sources.lerobot_tasks import TASK_INDEX, numbered
from vla.featurize.sources.mapping import ColumnMap, Part
from vla.stores.errors import SourceError

NEEDED = ("action", "state", "timestamp", "frame_index", TASK_INDEX)


@dataclass(frozen=True)
class ColumnReader:
    """Reads the steps of `columns`. `parts` {column: parts of others}; `asked` are names that the user maps.

    `timed` says whether timestamps have to increase. Rows without a timestamp are 1 / `fps` seconds apart.
    """

    rows: parquet.RowReader
    columns: ColumnMap
    parts: Mapping[str, tuple[Part, ...]]
    asked: frozenset[str]
    fps: float
    timed: bool

    def read(
        self, data: Path, row: EpisodeRow, first: int, unread: dict[str, str] | None = None
    ) -> dict[str, NDArray[np.generic]]:
        """Return {our name: [T, *shape]} of the episode whose rows begin at row `first` of `data`.

        With `unread`, a column that nobody asked for and that cannot be read is left out, and `unread` gains {our name:
        the reason}. Without, or for any other column, raises `SourceError` naming file, episode and column.
        """
        chosen = dict(self.columns.steps)
        if unread is not None:
            held = self.rows.names(data)
            for ours in [ours for ours in chosen if self._is_spare(ours)]:
                if ours not in unread and chosen[ours] not in held:
                    unread[ours] = f"{data} has no column {chosen[ours]}"
                if ours in unread:
                    del chosen[ours]
        table = pa.concat_tables(list(self.rows.read(data, self._theirs(chosen), first, first + row.length)))
        steps: dict[str, NDArray[np.generic]] = {}
        for ours, name in chosen.items():
            try:
                steps[ours] = self._values(table, ours, name, f"{data}, {row.id}, column {name}")
            except SourceError as error:
                if unread is None or not self._is_spare(ours):
                    raise
                unread[ours] = str(error)
        return self._checked(steps, f"{data}, {row.id}", row.length)

    def _is_spare(self, ours: str) -> bool:
        return ours not in NEEDED and ours not in self.asked

    def _theirs(self, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """Return the columns of the file to read."""
        whole = [name for name in chosen.values() if name not in self.parts]
        wanted = {part.column for name in chosen.values() for part in self.parts.get(name, ())}
        return tuple(dict.fromkeys([*whole, *sorted(wanted)]))

    def _values(self, table: pa.Table, ours: str, name: str, where: str) -> NDArray[np.generic]:
        spec = self.columns.specs[ours]
        if ours == TASK_INDEX:
            return fitted(numbered(table.column(name), where), spec, where)
        if name not in self.parts:
            return fitted(parquet.to_array(table.column(name), where), spec, where)
        cut = [
            parquet.to_array(table.column(part.column), where).reshape(len(table), -1)[:, part.start : part.stop]
            for part in self.parts[name]
        ]
        return fitted(np.concatenate(cut, axis=1), spec, where)

    def _checked(
        self, steps: dict[str, NDArray[np.generic]], where: str, length: int
    ) -> dict[str, NDArray[np.generic]]:
        frames = np.arange(length, dtype=np.int64)
        steps.setdefault("frame_index", frames)
        steps.setdefault("timestamp", frames / self.fps)
        for ours in ("action", "state"):
            if ours in steps:
                require_finite(steps[ours], f"{where}, column {self.columns.steps[ours]}")
        require_order(steps["frame_index"], steps["timestamp"], where, timed=self.timed)
        return {**steps, "frame_index": frames}
