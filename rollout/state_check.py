"""The live state against the training's: a wrong unit, a wrong order of columns or a broken sensor shows here first."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.heads.checkpoint import TrainedHead
from vla.stores.errors import DataError

FarState = Literal["warn", "refuse"]
DEVIATIONS = 10.0
"""Of the normaliser, where a checkpoint does not keep the ranges: as many as `vla inspect` calls far."""

log = logging.getLogger(__name__)


class StateCheck:
    """Compares states with the training's ranges, column by column.

    A state is far where it leaves the range of the training by more than the range's own width: a robot may go a little
    further than its demonstrations, not a million times as far. A column that was constant has the widest other range
    as its width. `far`: log the column once, or raise.
    """

    def __init__(self, head: TrainedHead, far: FarState) -> None:
        self._io, self._columns, self._far = head.artefact.io, head.model.columns, far
        self._named: set[int] = set()
        self._range = np.array(head.artefact.state_range, np.float64).reshape(-1, 2).T
        widths = self._range[1] - self._range[0]
        margin = np.where(widths > 0, widths, widths.max(initial=0.0) or np.abs(self._range).max(initial=1.0))
        self._allowed = self._range + np.stack([-margin, margin])
        if not head.artefact.state_range:
            self._range = self._allowed = _by_normaliser(head)

    def check(self, states: NDArray[np.float32]) -> None:
        """Check [N, S] in the columns that the head reads.

        Raises `DataError` naming a column that is not finite, or is far and `far` is "refuse".
        """
        for column in self._columns:
            values = states[:, column]
            name = self._io.state_names[column] if self._io.state_names else str(column)
            shown = f"the live state's column {name} is {', '.join(f'{value:g}' for value in values)}"
            if not np.isfinite(values).all():
                raise DataError(shown, expected="finite numbers")
            low, high = self._allowed[:, column] if self._allowed.size else (-np.inf, np.inf)
            if column in self._named or ((low <= values) & (values <= high)).all():
                continue
            low, high = self._range[:, column]
            wanted = f"{low:g} to {high:g}, as in training"
            if self._far == "refuse":
                raise DataError(shown, expected=wanted)
            self._named.add(column)
            log.warning("%s, far outside of %s", shown, wanted)


def _by_normaliser(head: TrainedHead) -> NDArray[np.float64]:
    """Return the values [2, S] that normalise to -10 and 10; empty where no column is normalised by itself."""
    normaliser = head.model.state
    if normaliser is None or len(normaliser.centre) != head.artefact.io.state_dim or head.config.state_norm == "none":
        return np.empty((2, 0))
    centre, scale = (values.double().cpu().numpy() for values in (normaliser.centre, normaliser.scale))
    return np.stack([centre - DEVIATIONS * scale, centre + DEVIATIONS * scale])
