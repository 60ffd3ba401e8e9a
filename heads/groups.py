"""One model for each set of action dimensions: episodes of a padded store grouped by what their tasks have.

A store of tasks whose actions differ (`pad_actions` of `vla featurize`) trains either one masked model, or a model a
group, each on its own episodes with its own columns alone: `vla train-head HEAD --group-by action-dim`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.heads.columns import episode_dims
from vla.heads.data import open_data
from vla.heads.model import HeadModel
from vla.heads.train import GROUP, HeadTrainConfig, train_head
from vla.stores.errors import UsageError
from vla.stores.settings import nearest
from vla.training.loop import FitReport, Progress


@dataclass(frozen=True)
class ActionGroup:
    """The episodes that have exactly the action dimensions `dims`: `name` is dim-N, `tasks` their instructions."""

    name: str
    dims: tuple[int, ...]
    episodes: int
    tasks: tuple[str, ...]


def action_groups(config: HeadTrainConfig) -> tuple[ActionGroup, ...]:
    """Return the groups of a configuration's stores, most dimensions first; one group where all episodes have all.

    Groups of equal size but different columns are named dim-N, dim-N-2, ... in the order of their columns. Raises what
    `open_data` raises.
    """
    stores = open_data(config.data.model_copy(update={"dims": None})).stores
    first, usable = stores.first, stores.usable
    table, target = first.episodes, first.manifest.steps[config.data.target]
    found = episode_dims(config.data.target, first, usable)
    rows = np.ones((len(table), target.shape[-1]), bool) if found is None else found
    sets = sorted({tuple(np.flatnonzero(row).tolist()) for row in rows[usable]}, key=lambda dims: (-len(dims), dims))
    groups, seen = [], Counter[int]()
    for dims in sets:
        seen[len(dims)] += 1
        number = seen[len(dims)]
        inside = usable & (rows == np.isin(np.arange(rows.shape[1]), dims)).all(axis=1)
        tasks = tuple(table.tasks[task] for task in np.unique(table.task[inside]))
        name = f"{GROUP}{len(dims)}" + (f"-{number}" if number > 1 else "")
        groups.append(ActionGroup(name, dims, int(inside.sum()), tasks))
    return tuple(groups)


def train_groups(
    config: HeadTrainConfig,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    begun: Callable[[HeadModel], None] = lambda model: None,
    progress: Callable[[ActionGroup], Progress] = lambda group: lambda step, total, metrics: None,
) -> dict[str, FitReport]:
    """Train one model a group, each into OUT/dim-N, and return their reports by group. Raises what `train_head` does.

    Every group has settings, split and run folder of its own, so that each is evaluated and resumed by itself. `begun`
    is called with each group's head before its first step.
    """
    out = Path(out)
    reports = {}
    for group in action_groups(config):
        data = config.data.model_copy(update={"dims": group.dims})
        own = config.model_copy(update={"data": data})
        reports[group.name] = train_head(
            own, out / group.name, resume=resume, overwrite=overwrite, begun=begun, progress=progress(group)
        )
    return reports


def train_groups_by(
    by: str, config: HeadTrainConfig, out: Path | str, *, online: bool, **how: Any
) -> dict[str, FitReport]:
    """Train one model a group, as `--group-by` names the groups. Raises `UsageError` for what groups cannot be."""
    out = Path(out)
    if by != "action-dim" or online:
        found = "--group-by with --online" if online else f"--group-by {by!r}{nearest(by, ['action-dim'])}"
        raise UsageError(found, expected="action-dim, from stores")
    return train_groups(config, out, **how)
