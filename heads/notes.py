"""What a training says before its first step about its numbers: constants, and normalised numbers far beyond 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vla.heads.model import HeadModel, dimension_names
from vla.heads.normalize import Normalizer
from vla.stores.notes import feature_note, large_notes, place_in
from vla.stores.ranges import is_constant

if TYPE_CHECKING:
    from vla.heads.data import HeadData


def training_notes(model: HeadModel, data: HeadData) -> tuple[str, ...]:
    """Return lines on the training split behind the statistics of a fitted head; () where nothing is to be said."""
    lines = [f"constant in the training split, {name}: {', '.join(dims)}" for name, dims in model.constants().items()]
    rows = data.action_rows(data.training)
    lines += _large(
        "action", model.config.action_norm, model.action, data, data.actions(data.training), rows,
        data.io.action_names, data.action_dims(data.training),
    )  # fmt: skip
    if model.state is not None:
        read = np.zeros(data.io.state_dim, bool)
        read[list(model.columns)] = True
        states, rows = data.states(data.training), data.rows(data.training)
        valid = np.broadcast_to(read, states.shape)
        lines += _large("state", model.config.state_norm, model.state, data, states, rows, data.io.state_names, valid)
        lines += moved_constants("state", model.state, states, data.io.state_names, valid)
    for feature in model.reads:
        lines += feature_note(data.stores.stores[data.stores.owner[feature]], feature)
    return tuple(lines)


def moved_constants(
    what: str, normaliser: Normalizer, values: NDArray[Any], names: tuple[str, ...], valid: NDArray[np.bool_]
) -> list[str]:
    """Return the line on dimensions that a run's or a file's statistics hold constant and that move in values [N, D].

    `valid` bool [N, D] marks the values that count. [] for none.
    """
    constant, held = normaliser.constant.cpu().numpy(), normaliser.centre.cpu().numpy()
    apart = valid & constant & ~is_constant(np.minimum(values, held), np.maximum(values, held))
    moving = ", ".join(dimension_names(names, apart.any(axis=0)))
    return [f"{what}: constant in the statistics, read as 0, but here it moves: {moving}"] if moving else []


def _large(
    what: str,
    norm: str,
    normaliser: Normalizer,
    data: HeadData,
    values: NDArray[np.float32],
    rows: NDArray[np.int64],
    names: tuple[str, ...],
    valid: NDArray[np.bool_] | None,
) -> list[str]:
    if norm == "none":
        return []
    moving = ~normaliser.constant.cpu().numpy()
    use = moving if valid is None else valid & moving
    centre, scale = normaliser.centre.cpu().numpy(), normaliser.scale.cpu().numpy()
    place = place_in(data.stores.first.episodes, rows)
    return large_notes(what, norm, values, centre, scale, names, place, np.broadcast_to(use, values.shape))
