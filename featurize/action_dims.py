"""Which tasks go together: those whose actions and states are of one size. One head serves one size."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field

from vla.featurize.sources.base import Source
from vla.featurize.sources.dimensions import MeasuredSource, TaskDims
from vla.featurize.sources.registry import SOURCES, common_options, open_source, recognise, shipped
from vla.stores.settings import Settings


class DimsConfig(Settings):
    """What `vla action-dims` can be told: the same words as `vla featurize` has for its source."""

    source: str = Field(default_factory=lambda: str(shipped()))
    map: dict[str, str] = {}
    source_options: dict[str, Any] = {}
    skip_bad: bool = False


def measure(config: DimsConfig) -> list[TaskDims]:
    """Return the sizes of every task of a source, or of every data set in a folder or in folders of it.

    A source that is a `MeasuredSource` says them itself; of any other, every instruction is a task. Raises
    `SourceError` and `UsageError` as `open_source` and the source's `index` do.
    """
    return [dims for name, spec in _specs(config.source) for dims in _measured(name, spec, config)]


def group(tasks: list[TaskDims]) -> dict[tuple[int, int], list[TaskDims]]:
    """Return {(action dim, state dim): tasks}, the largest group first."""
    groups: dict[tuple[int, int], list[TaskDims]] = {}
    for dims in tasks:
        groups.setdefault((dims.action_dim, dims.state_dim), []).append(dims)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def to_json(tasks: list[TaskDims]) -> dict[str, Any]:
    """Return what `--json` prints: groups of one size, each with its tasks."""
    groups = [
        {
            "action_dim": action,
            "state_dim": state,
            "tasks": [
                {"task": dims.task, "episodes": dims.episodes, "action_names": list(dims.names)} for dims in members
            ],
        }
        for (action, state), members in group(tasks).items()
    ]
    return {"tasks": len({dims.task for dims in tasks}), "groups": groups}


def _specs(spec: str) -> list[tuple[str, str]]:
    """Return (name before its tasks, what to open): a folder of data sets of any kind counts as each of them."""
    path = Path(spec)
    if spec.partition(":")[0] in SOURCES or not path.is_dir() or recognise(path):
        return [("", spec)]
    folders = sorted(inner for inner in path.iterdir() if inner.is_dir() and recognise(inner))
    folders = folders or sorted(inner for inner in path.glob("*/*") if inner.is_dir() and recognise(inner))
    return [(f"{folder.relative_to(path).as_posix()}: ", str(folder)) for folder in folders] or [("", spec)]


def _measured(name: str, spec: str, config: DimsConfig) -> list[TaskDims]:
    common = common_options(map=config.map, skip_bad=config.skip_bad)
    source: Source = open_source(spec, **{**common, **config.source_options})
    if isinstance(source, MeasuredSource):
        measured = source.dimensions()
    else:
        index = source.index()
        action, state = index.steps["action"], index.steps.get("state")
        sizes = (math.prod(action.shape), math.prod(state.shape) if state else 0, action.names)
        counts = Counter(episode.task for episode in index.episodes)
        measured = tuple(TaskDims(task, count, *sizes) for task, count in sorted(counts.items()))
    return [TaskDims(name + d.task, d.episodes, d.action_dim, d.state_dim, d.names) for d in measured]
