"""Which frames of a video are an episode's: by its timestamps where they fit the file's frames, or by order.

A span of `meta/episodes` is a claim, and writers differ: `to_timestamp` may be the time of the last frame or its end,
and all spans of a file may be off by one constant. What counts is the file: its frames, the rows of its episodes, and
the spans of the episodes beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.episode_checks import OTHER_CAMERA, SKIP
from vla.featurize.sources.lerobot_info import Info, inside, missing_file
from vla.featurize.sources.lerobot_layout import EpisodeRow, Span
from vla.featurize.sources.mapping import Column
from vla.featurize.sources.video import TOLERANCE, Clip, count_frames, frame_times, require_rate
from vla.stores.errors import SourceError

Align = Literal["timestamp", "index"]


@dataclass(frozen=True)
class Member:
    """An episode in a video: its `span`, and the time of its first row, in seconds."""

    row: EpisodeRow
    span: Span
    first_time: float
    label: str

    def order(self) -> tuple[float, int]:
        """Return what sorts the episodes of a file; a start that is no number comes last."""
        return self.span.start if np.isfinite(self.span.start) else np.inf, self.row.index

    def begin(self, fps: float) -> float:
        """Return where its timestamps say that it begins, in frames of the file."""
        return (self.span.start + self.first_time) * fps


Placed = dict[int, Clip | SourceError]


@dataclass(frozen=True)
class Placement:
    """`clips` {episode index: its clip, or the reason why it has none}; `unclaimed` names frames of no episode."""

    clips: Placed
    unclaimed: list[str]


def place_clips(
    info: Info, column: str, camera: str, rows: Sequence[tuple[EpisodeRow, float]], align: Align | None
) -> Placement:
    """Find the frames of every episode for one camera.

    `rows` are the episodes with the time of the first row of each. With `align` "index", the frames of a file are the
    rows of its episodes one by one.
    """
    files: dict[str, list[Member]] = {}
    for row, first_time in rows:
        member = Member(row, row.videos[column], first_time, f"camera {camera}, {row.id}")
        files.setdefault(member.span.path, []).append(member)
    if not files:
        return Placement({}, [])
    files = {relative: sorted(members, key=Member.order) for relative, members in files.items()}
    shifts = np.concatenate([_shifts(members, info.fps) for members in files.values()])
    # Half of all episodes are off by no more, half by no less: an offset that one episode has alone is an error.
    usual = float(np.median(shifts[np.isfinite(shifts)])) if np.isfinite(shifts).any() else 0.0
    placed: Placed = {}
    unclaimed: list[str] = []
    for relative, members in files.items():
        try:
            found = _place(info, relative, info.columns[column], members, align, usual)
        except SourceError as error:
            found = Placement({member.row.index: error for member in members}, [])
        placed |= found.clips
        unclaimed += found.unclaimed
    return Placement(placed, unclaimed)


def _shifts(members: Sequence[Member], fps: float) -> NDArray[np.float64]:
    """Return by how many frames the span of each episode of a file begins after the rows of those before it."""
    lengths = np.asarray([member.row.length for member in members])
    starts = np.asarray([member.span.start for member in members], np.float64)
    shifts: NDArray[np.float64] = starts * fps - (np.cumsum(lengths) - lengths)
    return shifts


def _place(
    info: Info, relative: str, column: Column, members: list[Member], align: Align | None, usual: float
) -> Placement:
    """Place the episodes of one file, in order; `usual` is the offset in frames that most episodes have.

    Raises `SourceError` where the file itself is unusable.
    """
    path, label = inside(info.root, relative), members[0].label
    if not path.is_file():
        raise missing_file(info.root, relative, f"the video of {label}", OTHER_CAMERA)
    if path.stat().st_size == 0:
        raise SourceError(f"{path} has 0 bytes", expected=f"the video of {label}", fix=SKIP)
    lengths = np.asarray([member.row.length for member in members])
    ends = np.cumsum(lengths)
    if align == "index":
        times = frame_times(path, label)
        if len(times) != ends[-1]:
            found = f"{path} has {len(times)} frames, and its episodes {ends[-1]} rows"
            raise SourceError(found, expected="one frame for each row", fix=SKIP)
        return Placement(_clips(path, column, info.fps, members, ends - lengths, {}, times), [])
    begins = np.asarray([member.begin(info.fps) for member in members], np.float64)
    count = count_frames(path, label)
    firsts, errors = _by_time(path, members, begins, count, info.fps)
    if errors or firsts[-1] + lengths[-1] != count:
        # The header may count frames that are not shown: count them before anything is refused.
        count = len(frame_times(path, label))
        firsts, errors = _by_time(path, members, begins, count, info.fps)
        if count == ends[-1] and np.abs(_shifts(members, info.fps) - usual).max() <= TOLERANCE:
            firsts, errors = ends - lengths, {}  # one constant offset, and frames and rows one to one
        else:
            require_rate(path, label, info.fps)
    errors = _wrong_spans(path, members, info.fps) | errors
    unclaimed = []
    for at, (member, following) in enumerate(zip(members, [*firsts[1:].tolist(), count], strict=True)):
        end = int(firsts[at]) + member.row.length
        if at not in errors and at + 1 not in errors and end < following:
            found = f"{path}, {member.label} has {member.row.length} rows, and {following - firsts[at]} frames"
            if member.span.stop is None:  # nothing says where the episode ends but its file, or the next one
                errors[at] = SourceError(found, expected="one frame for each row", fix=SKIP)
            else:
                unclaimed.append(f"{found} before {'the next episode' if at + 1 < len(members) else 'the end'}")
    return Placement(_clips(path, column, info.fps, members, firsts, errors, None), unclaimed)


def _by_time(
    path: Path, members: Sequence[Member], begins: NDArray[np.float64], count: int, fps: float
) -> tuple[NDArray[np.int64], dict[int, SourceError]]:
    """Return the first frame of each episode by its timestamps, and what contradicts them, {position: error}."""
    errors: dict[int, SourceError] = {}
    firsts = np.rint(np.nan_to_num(begins, posinf=0, neginf=0)).astype(np.int64)
    for at, (member, begin, first) in enumerate(zip(members, begins, firsts.tolist(), strict=True)):
        end = first + member.row.length
        if not (np.isfinite(begin) and begin > -0.5 and abs(begin - first) <= TOLERANCE):
            found, expected = f" begins at {begin:.2f} frames", "a whole frame"
        elif end > count:
            found = f": the video ends before frame {max(count - first, 0)}"  # counted from the episode's first
            expected = f"frames up to {end - first - 1}"
        else:
            continue
        errors[at] = SourceError(f"{path}, {member.label}{found}", expected=expected, fix=SKIP)
    for at, (before, after) in enumerate(pairwise(range(len(members))), 1):
        end = int(firsts[before]) + members[before].row.length
        if at not in errors and firsts[after] < end:
            found = f"{path}, {members[after].label} begins at frame {firsts[after]}"
            expected = f"{end} or later, where {members[before].row.id} ends"
            errors[at] = SourceError(found, expected=expected, fix=SKIP)
    return firsts, errors


def _wrong_spans(path: Path, members: Sequence[Member], fps: float) -> dict[int, SourceError]:
    """Return {position: error} of the spans that hold another number of frames than the episode has rows.

    A span ends with the time of the last frame, or with the frame's end.
    """
    errors: dict[int, SourceError] = {}
    for at, member in enumerate(members):
        if member.span.stop is None:
            continue
        frames, length = (member.span.stop - member.span.start) * fps, member.row.length
        if not length - 1 - TOLERANCE <= frames <= length + 0.5:
            found = f"{path}, {member.label} spans {frames:.1f} frames"
            errors[at] = SourceError(found, expected=f"{length} as its length says", fix=SKIP)
    return errors


def _clips(
    path: Path,
    column: Column,
    fps: float,
    members: Sequence[Member],
    firsts: NDArray[np.int64],
    errors: Mapping[int, SourceError],
    times: NDArray[np.int64] | None,
) -> Placed:
    return {
        member.row.index: errors.get(at) or Clip(path, int(firsts[at]), fps, column.size, member.label, times)
        for at, member in enumerate(members)
    }
