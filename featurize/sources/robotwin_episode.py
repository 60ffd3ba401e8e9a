"""One RoboTwin episode put together: actions from joints or planner paths, frames from HDF5 or folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.featurize.sources.episode_checks import OTHER_CAMERA, SKIP
from vla.featurize.sources.padding import PAD
from vla.featurize.sources.robotwin_cameras import Camera, Channels
from vla.featurize.sources.robotwin_hdf5 import Demo, read_demo
from vla.featurize.sources.robotwin_joints import (
    RESAMPLE,
    SIDES,
    Arm,
    ArmPath,
    Arms,
    join,
    names_of,
    read_plan,
    require_arms,
    resampled,
)
from vla.featurize.sources.robotwin_layout import Files, choose_text, read_texts, require_unbroken
from vla.stores.errors import SourceError
from vla.stores.settings import Settings

FPS = 15.0
"""RoboTwin writes 15 as the frequency of its files where the task's configuration does not say otherwise."""


class RoboTwinOptions(Settings):
    """What a RoboTwin source can be told; see `RoboTwinSource`."""

    arms: Arms = "fused"
    include_gripper: bool | None = None
    cameras: tuple[str, ...] | None = None
    actions: Literal["joint", "planner"] | None = None
    alignment: Literal["next", "same"] = "next"
    resample: Literal["linear"] | None = None
    images: str | None = None
    channels: Channels = "bgr"
    depth_unit: Literal["mm", "m"] = "mm"
    extrinsics: Literal["cam2world_gl", "world2cam_cv"] = "cam2world_gl"
    instruction: Literal["seen", "unseen"] = "seen"
    instruction_index: int = Field(0, ge=-1)
    task: str | None = Field(None, min_length=1)
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    pad_actions: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class Steps:
    """The numbers of an episode: `action` [T, A], `state` [T, S] or None, float32, and the names of their columns."""

    action: NDArray[np.float32]
    state: NDArray[np.float32] | None
    names: tuple[str, ...]
    state_names: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """An episode whose numbers hold, without them: `length` T frames with an action, `cameras` that have pictures.

    `places` says where an HDF5 file keeps a camera, `newer` of which generation it is, `texts` what it says is done,
    `states_fps` whether `fps` is the file's own or an option, not RoboTwin's default.
    """

    files: Files
    length: int
    names: tuple[str, ...]
    state_names: tuple[str, ...]
    cameras: tuple[str, ...]
    fps: float
    newer: bool
    places: Mapping[str, Camera]
    texts: tuple[str, ...]
    states_fps: bool = True


def plan_of(files: Files, options: RoboTwinOptions) -> Path | None:
    """Return the planner's path that the actions of an episode come from, or None: they come from its HDF5 file.

    Raises `SourceError` where the one that was asked for is missing.
    """
    planned = files.data is None if options.actions is None else options.actions == "planner"
    wanted = files.plan if planned else files.data
    if wanted is None:
        missing = f"_traj_data/episode{files.number}.pkl" if planned else f"data/episode{files.number}.hdf5"
        other = "--set source_options.actions=joint" if planned else "--set source_options.actions=planner"
        raise SourceError(
            f"{files.folder.root} has no {missing}", expected=f"it for {files.id}", fix=f"{other}; {SKIP}"
        )
    return files.plan if planned else None


def load(files: Files, options: RoboTwinOptions) -> tuple[Checked, Steps]:
    """Read and check the numbers of an episode. Raises `SourceError` naming file, field and fix."""
    sides = SIDES[options.arms]
    plan = plan_of(files, options)
    demo = read_demo(files.data, sides) if files.data else None
    frames = _frames(files, demo)
    if plan is None and demo is not None:
        steps = _joints(demo, options)
    else:
        path = cast(Path, plan)  # `plan_of` found one of the two
        steps = _planned(read_plan(path), demo, frames, options, str(path))
    cameras = tuple(files.images) or (tuple(demo.cameras) if demo else ())
    stated = options.fps if options.fps is not None else demo.fps if demo else None
    fps = FPS if stated is None else stated
    places, texts = (demo.cameras, demo.texts) if demo else ({}, ())
    newer = demo is not None and demo.newer
    length, names = len(steps.action), (steps.names, steps.state_names)
    return Checked(files, length, *names, cameras, fps, newer, places, texts, stated is not None), steps


def _frames(files: Files, demo: Demo | None) -> int | None:
    """Return how many frames there are of the pictures, before the last one may lose its action; None without any."""
    lengths = {camera: len(paths) for camera, paths in files.images.items()}
    for camera, paths in files.images.items():
        require_unbroken(paths, f"camera {camera}, {files.id}")
    if demo is not None:
        lengths[str(demo.path)] = demo.length
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise SourceError(f"{files.folder.root}, {files.id} has frames: {found}", expected="one number", fix=SKIP)
    return next(iter(lengths.values()), None)


def _joints(demo: Demo, options: RoboTwinOptions) -> Steps:
    """Actions are the file's own; else the joints one frame later, the last frame having none; or `same`."""
    if demo.action is not None:
        return _steps(demo.action, demo.state, options, str(demo.path))
    if options.alignment == "same":
        return _steps(demo.state, None, options, str(demo.path))
    if demo.length < 2:
        expected = "at least 2, an action being the next frame's joints"
        raise SourceError(f"{demo.path} has {demo.length} frame", expected=expected, fix=SKIP)
    later = {side: _part(arm, slice(1, None)) for side, arm in demo.state.items()}
    return _steps(
        later, {side: _part(arm, slice(None, -1)) for side, arm in demo.state.items()}, options, str(demo.path)
    )


def _planned(
    paths: Mapping[str, ArmPath], demo: Demo | None, frames: int | None, options: RoboTwinOptions, where: str
) -> Steps:
    """A path is no frame's: one length, or the rule `resample`, makes it so."""
    arms = require_arms(paths, options.arms, where)
    if options.resample:
        arms = {side: resampled(arm, frames or max(map(len, arms.values()))) for side, arm in arms.items()}
    for side, arm in arms.items():
        if frames is not None and len(arm) != frames:
            raise SourceError(
                f"{where}: the path of the {side} arm has {len(arm)} steps",
                expected=f"{frames} as there are frames",
                fix=f"{RESAMPLE}; {SKIP}",
            )
    return _steps(arms, demo.state if demo else None, options, where)


def _steps(action: Mapping[str, Arm], state: Mapping[str, Arm] | None, options: RoboTwinOptions, where: str) -> Steps:
    which, gripper = options.arms, options.include_gripper
    made = Steps(
        join(action, which, gripper, where),
        join(state, which, gripper, where) if state is not None else None,
        names_of(action, which, gripper),
        names_of(state, which, gripper) if state is not None else (),
    )
    for name, values in (("action", made.action), ("state", made.state)):
        if values is not None and not np.isfinite(values).all():
            raise SourceError(f"{where}: {name} has numbers above float32", expected="joint angles", fix=SKIP)
    return made


def _part(arm: Arm, rows: slice) -> Arm:
    return Arm(arm.joints[rows], None if arm.gripper is None else arm.gripper[rows])


def task_of(episode: Checked, options: RoboTwinOptions, others_have_texts: bool) -> str:
    """Return an episode's instruction: `task`; else its JSON file's; else its HDF5 file's; else the task's name.

    Where `others_have_texts` but this episode has none, that is an error.
    """
    files = episode.files
    if options.task is not None:
        return options.task
    if files.text is not None:
        return choose_text(read_texts(files.text, options.instruction), files.number, options.instruction_index)
    if episode.texts and options.instruction == "seen":
        return choose_text(episode.texts, files.number, options.instruction_index)
    if others_have_texts or options.instruction == "unseen":
        raise SourceError(
            f"{files.folder.root} has no instructions/episode{files.number}.json",
            expected=f"the {options.instruction} instructions of {files.id}",
            fix=f'--set source_options.task="WHAT IS DONE"; {SKIP}',
        )
    return files.folder.task.replace("_", " ")


def require_like(episode: Checked, first: Checked, cameras: tuple[str, ...], *, pad: bool) -> None:
    """Raise `SourceError` where an episode has other columns than the first sound one, or lacks a camera.

    With `pad` columns may differ, but either all episodes have a state or none.
    """
    for name, found, wanted in (
        ("action", episode.names, first.names),
        ("state", episode.state_names, first.state_names),
    ):
        if found != wanted and not (pad and bool(found) == bool(wanted)):
            raise SourceError(
                f"{_where(episode)}: {name} has {len(found)} numbers ({_ends(found)})",
                expected=f"{len(wanted)} ({_ends(wanted)}) as in {first.files.id}",
                fix=f"{PAD}; `vla action-dims` tells which tasks go together; {SKIP}",
            )
    missing = [camera for camera in cameras if camera not in episode.cameras]
    if missing:
        there = ", ".join(episode.cameras) or "no camera"
        raise SourceError(
            f"{_where(episode)} has no camera {', '.join(missing)}: it has {there}",
            expected=", ".join(cameras),
            fix=OTHER_CAMERA,
        )
    if episode.fps != first.fps:
        raise SourceError(
            f"{_where(episode)} has {episode.fps:g} frames a second",
            expected=f"{first.fps:g} as {first.files.id}",
            fix="--set source_options.fps=RATE",
        )


def _where(episode: Checked) -> str:
    return str(episode.files.data or episode.files.plan)


def _ends(names: tuple[str, ...]) -> str:
    return f"{names[0]} to {names[-1]}" if names else "none"
