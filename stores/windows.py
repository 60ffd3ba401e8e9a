"""Windows: which rows a head sees around one row, never across episodes, with masks.

For the window at row t of an episode: observations are rows t-n_obs+1 .. t, actions are the labels of rows
t+action_offset .. t+action_offset+horizon-1. Rows outside the episode are replaced by its nearest row and marked
invalid in the mask (edge-repeat keeps convolutions free of made-up values; the mask keeps losses free of repeats).
An observation never reaches past t: no future frame leaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.stores.errors import DataError
from vla.stores.settings import Settings
from vla.stores.tables import EpisodeTable


class WindowSpec(Settings):
    """Shape of a window, in frames.

    `action_offset` places the first action relative to the last observation: 0 for heads that predict from now on,
    -(n_obs - 1) for Diffusion Policy, whose predicted horizon begins with the first observation.
    """

    n_obs: int = Field(1, ge=1)
    horizon: int = Field(16, ge=1)
    action_offset: int = Field(0, le=0)


@dataclass(frozen=True)
class WindowRows:
    """Rows of B windows: `obs` int64 [B, n_obs], `action` int64 [B, H]; masks bool of the same shapes.

    `task` and `label` int64 [B] index the episode table's `tasks` and `labels` (0 where it has no labels).
    """

    obs: NDArray[np.int64]
    obs_valid: NDArray[np.bool_]
    action: NDArray[np.int64]
    action_valid: NDArray[np.bool_]
    task: NDArray[np.int64]
    label: NDArray[np.int64]


class WindowIndex:
    """All windows over some episodes of a store: one for each of their rows.

    `episodes` are positions in the table. Memory is 16 bytes a window; nothing is looped over in Python.
    Raises `DataError` where no episode is given.
    """

    def __init__(self, table: EpisodeTable, episodes: NDArray[np.int64], spec: WindowSpec) -> None:
        if len(episodes) == 0:
            raise DataError("no episode to take windows from", expected="at least one usable episode")
        self.spec = spec
        length = table.length[episodes]
        self._start = table.row_start[episodes]
        self._end = self._start + length
        self._task = table.task[episodes]
        self._label = table.label[episodes] if table.labels else np.zeros(len(episodes), np.int64)
        self._episode = np.repeat(np.arange(len(episodes)), length)
        before = np.cumsum(length) - length
        self._row = np.arange(int(length.sum())) - before[self._episode] + self._start[self._episode]

    def __len__(self) -> int:
        return len(self._row)

    @property
    def row(self) -> NDArray[np.int64]:
        """Row of each window's last observation [N]."""
        return self._row

    def rows(self, windows: NDArray[np.int64]) -> WindowRows:
        """Return the rows of the given windows [B] (positions in 0 .. len(self)-1)."""
        row, episode = self._row[windows][:, None], self._episode[windows]
        start, end = self._start[episode][:, None], self._end[episode][:, None]
        obs = row + np.arange(1 - self.spec.n_obs, 1)
        action = row + np.arange(self.spec.horizon) + self.spec.action_offset
        return WindowRows(
            np.clip(obs, start, end - 1),
            obs >= start,
            np.clip(action, start, end - 1),
            (action >= start) & (action < end),
            self._task[episode],
            self._label[episode],
        )


def split_episodes(
    usable: NDArray[np.bool_], ids: tuple[str, ...], validation: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split usable episodes into training and validation positions, by a seeded shuffle of their sorted ids.

    The result depends on the ids alone, not on their order in the store. `validation` is a share in [0, 1); at least
    one episode goes to each side where it is above 0. Raises `DataError` where there are too few.
    """
    positions = np.flatnonzero(usable)
    wanted = round(len(positions) * validation)
    count = min(max(wanted, 1), len(positions) - 1) if validation > 0 else 0
    if len(positions) < 1 or (validation > 0 and len(positions) < 2):
        raise DataError(
            f"{len(positions)} usable episodes", expected="two or more to split", fix="--set data.validation=0"
        )
    by_id = positions[np.argsort(np.asarray(ids)[positions], kind="stable")]
    shuffled = np.random.default_rng(seed).permutation(by_id)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])
