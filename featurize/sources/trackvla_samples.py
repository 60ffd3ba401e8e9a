"""The jsonl files of OpenTrackVLA's make_tracking_data.py: one sample a line, each with the velocities that follow.

    current      path of the frame, frames/EPISODE/frame_00001.jpg
    instruction  str
    actions      [K][3] base velocities (vx, vy, wz) of this frame and those after it
    waypoints    [H][3], may be missing: the target as it was prepared
    valid_mask   [H] booleans, or valid_idx: positions that are valid; may be missing
    dt           seconds a step, may be missing

A frame at the end of an episode whose horizon is incomplete has no sample of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.files import size_of
from vla.featurize.sources.lerobot_info import parse_object
from vla.stores.errors import SourceError

MAX_BYTES = 1 << 30
"""Samples list their 31 past frames: some 4 KB a line, so 250,000 frames."""


@dataclass(frozen=True)
class Samples:
    """What the samples of an episode say together.

    `velocities` [N, 3] float32, of frames 0 to N - 1 (N may exceed the frames); `waypoints` [T, H, 3] float32 where
    they are given, else None; `valid` [T, H] says what samples allow (True where they say nothing).
    """

    instruction: str
    velocities: NDArray[np.float32]
    waypoints: NDArray[np.float32] | None
    valid: NDArray[np.bool_]


def read_samples(file: Path, episode: str, stems: Sequence[str], horizon: int, dt: float) -> Samples:
    """Read the samples of an episode whose frames are `stems`, in order.

    Raises `SourceError` naming file and line where a sample lacks a field, is of another episode, instruction or time
    step, contradicts one before, and where a frame between the first and the last has no velocity.
    """
    places = {stem: frame for frame, stem in enumerate(stems)}
    raws = [raw for _, raw in iterate_samples(file)]
    velocities: dict[int, NDArray[np.float32]] = {}
    given = "waypoints" in raws[0]
    waypoints = np.zeros((len(stems), horizon, 3), np.float32)
    valid = np.full((len(stems), horizon), not given)
    instruction = str(raws[0].get("instruction", "")).strip()
    for number, raw in enumerate(raws, 1):
        where = f"{file}, line {number}"
        _require_same(raw, instruction, given, dt, where)
        frame = _frame(raw, episode, places, where)
        for at, velocity in enumerate(_array(raw, "actions", None, where), frame):
            if not np.array_equal(velocities.setdefault(at, velocity), velocity):
                raise SourceError(f"{where}: another velocity of frame {at} than the lines before", fix=SKIP)
        if given:
            waypoints[frame] = _array(raw, "waypoints", horizon, where)
        valid[frame] = _valid(raw, horizon, where)
    last = max(velocities)
    for frame in range(last):
        if frame not in velocities:
            raise SourceError(f"{file} has no velocity of frame {frame}", expected=f"frames 0 to {last}", fix=SKIP)
    known = np.stack([velocities[frame] for frame in range(last + 1)])
    return Samples(instruction, known, waypoints if given else None, valid)


def iterate_samples(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the line, its JSON object), at least one. Raises `SourceError` naming file and line."""
    size_of(file, MAX_BYTES, "samples")
    number, empty = 0, True
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_object(line, f"{file}, line {number}")
                    empty = False
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", expected="samples", fix=SKIP) from None
    if empty:
        raise SourceError(f"{file} has no samples", expected="one JSON object a line", fix=SKIP)


def _require_same(raw: dict[str, Any], instruction: str, given: bool, dt: float, where: str) -> None:
    """Refuse a sample that differs from the first in what holds for the whole episode."""
    said = raw.get("instruction")
    if not isinstance(said, str) or not said.strip():
        raise SourceError(f"{where} has no instruction", expected="the text that the robot was told", fix=SKIP)
    if said.strip() != instruction:
        raise SourceError(f"{where}: instruction {said[:80]!r}", expected=f"{instruction[:80]!r} as line 1", fix=SKIP)
    if ("waypoints" in raw) != given:
        found = "no waypoints" if given else "waypoints"
        raise SourceError(f"{where} has {found}", expected="them in each sample or in none", fix=SKIP)
    if raw.get("dt", dt) != dt:
        raise SourceError(
            f"{where}: dt = {raw['dt']!r}", expected=f"{dt}", fix=f"--set source_options.dt={raw['dt']}, or {SKIP}"
        )


def _frame(raw: dict[str, Any], episode: str, places: dict[str, int], where: str) -> int:
    """Return the number of the frame that a sample is of."""
    current = raw.get("current")
    if not isinstance(current, str):
        raise SourceError(f"{where} has no current", expected=f"frames/{episode}/frame_00001.jpg", fix=SKIP)
    path = PurePosixPath(current)
    if len(path.parts) > 1 and not f"/{path.parent}".endswith(f"/{episode}"):
        raise SourceError(f"{where}: current is {current!r}", expected=f"a frame of {episode}", fix=SKIP)
    if path.stem not in places:
        raise SourceError(f"{where}: there is no frame {path.stem!r}", expected=f"one of {len(places)}", fix=SKIP)
    return places[path.stem]


def _array(raw: dict[str, Any], key: str, rows: int | None, where: str) -> NDArray[np.float32]:
    """Return finite numbers [rows, 3] of a field; any number of rows where `rows` is None."""
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(raw[key], np.float64).astype(np.float32)
    except (KeyError, TypeError, ValueError):
        raise SourceError(f"{where} has no {key}", expected=f"{rows or 'K'} x 3 numbers", fix=SKIP) from None
    if values.ndim != 2 or values.shape[1] != 3 or not len(values) or rows not in (None, len(values)):
        raise SourceError(f"{where}: {key} of shape {values.shape}", expected=f"({rows or 'K'}, 3)", fix=SKIP)
    if not np.isfinite(values).all():
        raise SourceError(f"{where}: {key} is NaN or infinite", expected="finite numbers", fix=SKIP)
    return values


def _valid(raw: dict[str, Any], horizon: int, where: str) -> NDArray[np.bool_]:
    mask, positions = raw.get("valid_mask"), raw.get("valid_idx")
    if mask is not None:
        if not isinstance(mask, list) or len(mask) != horizon or not all(value in (0, 1) for value in mask):
            raise SourceError(f"{where}: valid_mask is {str(mask)[:60]}", expected=f"{horizon} booleans", fix=SKIP)
        return np.asarray(mask, bool)
    if positions is None:
        return np.ones(horizon, bool)
    whole = isinstance(positions, list) and all(type(at) is int and 0 <= at < horizon for at in positions)
    if not whole:
        raise SourceError(
            f"{where}: valid_idx is {str(positions)[:60]}", expected=f"positions below {horizon}", fix=SKIP
        )
    return np.isin(np.arange(horizon), positions)
