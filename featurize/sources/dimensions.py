"""The sizes of a task's action and state: what decides which tasks one head can be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class TaskDims:
    """One task. `names` label the action's components; `state_dim` is 0 where there is no state.

    `episodes` counts those of these sizes: a task whose episodes differ is given once for each size.
    """

    task: str
    episodes: int
    action_dim: int
    state_dim: int
    names: tuple[str, ...] = ()


@runtime_checkable
class MeasuredSource(Protocol):
    """A source that knows the sizes of its tasks without being one data set: they may differ."""

    def dimensions(self) -> tuple[TaskDims, ...]:
        """Return the sizes of every task. Raises `SourceError` as `index` does, but not because sizes differ."""
        ...
