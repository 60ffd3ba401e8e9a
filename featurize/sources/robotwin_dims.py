"""The sizes of RoboTwin's actions, task by task, in every form: HDF5 of both generations, planner segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from vla.featurize.sources.dimensions import TaskDims
from vla.featurize.sources.robotwin_episode import RoboTwinOptions, load, plan_of
from vla.featurize.sources.robotwin_hdf5 import read_demo
from vla.featurize.sources.robotwin_joints import SIDES, Arm, Arms, join, names_of, read_plan
from vla.featurize.sources.robotwin_layout import Files, TaskFolder, episodes_of, task_folders
from vla.stores.errors import SourceError

Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The names of action and state."""


def dims_of(root: Path, options: RoboTwinOptions) -> tuple[TaskDims, ...]:
    """Return the sizes of every task below `root`. Raises `SourceError` for what cannot be read and is not skipped."""
    return tuple(dims for folder in task_folders(root) for dims in _task(folder, options))


def _task(folder: TaskFolder, options: RoboTwinOptions) -> list[TaskDims]:
    found: list[Names] = []
    paths: list[tuple[Mapping[str, Arm], tuple[str, ...]]] = []
    for files in episodes_of(folder, options.images):
        try:
            plan = plan_of(files, options)
            if plan is not None:
                paths.append(_path(plan, files, options))
            else:
                episode, _ = load(files, options)
                found.append((episode.names, episode.state_names))
        except SourceError:
            if not options.skip_bad:
                raise
    found += _filled(paths, options, folder)
    return [
        TaskDims(folder.name or folder.task, count, len(names), len(state), names)
        for (names, state), count in sorted(Counter(found).items(), key=lambda item: (len(item[0][0]), item))
    ]


def _path(plan: Path, files: Files, options: RoboTwinOptions) -> tuple[Mapping[str, Arm], tuple[str, ...]]:
    """Return the arms that moved, and the names of the state: the frames that a path does not fit do not matter."""
    told = read_plan(plan)
    arms = {side: told[side].arm for side in SIDES[options.arms] if side in told}
    moved = {side: arm for side, arm in arms.items() if arm is not None}
    for side, arm in moved.items():
        join({side: arm}, _one(side), options.include_gripper, str(plan))
    state = read_demo(files.data, SIDES[options.arms]).state if files.data else None
    return moved, names_of(state, options.arms, options.include_gripper) if state else ()


def _filled(
    paths: list[tuple[Mapping[str, Arm], tuple[str, ...]]], options: RoboTwinOptions, folder: TaskFolder
) -> list[Names]:
    """Return the names of each episode; an arm that did not move in one is as in the task's other episodes."""
    known = {side: arm for moved, _ in reversed(paths) for side, arm in moved.items()}
    sides = [side for side in SIDES[options.arms] if side in known]
    if paths and not sides and options.skip_bad:
        return []
    if paths and not sides:
        found = f"{folder.root}: no path of the {options.arms} arm has a successful step"
        raise SourceError(found, expected="a segment of status Success", fix="--set source_options.arms=left or right")
    made = []
    for moved, state in paths:
        names: tuple[str, ...] = ()
        for side in sides:
            names += names_of({side: moved.get(side, known[side])}, _one(side), options.include_gripper)
        made.append((names, state))
    return made


def _one(side: str) -> Arms:
    return "left" if side == "left" else "right"
