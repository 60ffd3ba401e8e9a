"""What the pictures of raw demonstrations show, episode by episode: dead, frozen, badly exposed or swapped cameras.

Of an episode above `EVERY` frames a sample is decoded, `PAIRS` pairs of neighbouring frames, evenly spread, the first
and the last frame among them, unless every frame is asked for: a fault on less than a tenth of it may fall between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, Source, SourceIndex, ViewSource
from vla.stores.errors import SourceError

PAIRS = 8
"""Neighbouring frames looked at in each episode: 16 frames, so that a fault on a tenth of them shows."""

EVERY = 128
"""Frames up to which all are decoded: each pair costs a seek, which in a video decodes from the key frame before it."""

BLACK, BRIGHT, DARK = 16, 250, 8
"""Levels of 255. Video black is 16 before its range is expanded; 250 leaves room for a codec's ringing at white."""

NOISE = 2.0
"""Levels by which a codec changes the mean of 8 x 8 pixels of a still picture. What moves changes it by 5 or more."""

MOVES = 0.01
"""Of a column's range over the whole set: a robot that moves less between two frames may leave a picture as it was."""

SIDE = 128
"""Pictures are compared at every n-th pixel, so that at least this many remain along the shorter side."""

LIMITS = {"black": 0.1, "one colour": 0.1, "frozen": 0.25, "overexposed": 0.5, "underexposed": 0.5}
"""Share of the frames looked at (frozen: of the pairs in which the robot moves) from which a fault is a finding."""

MIN_PAIRS = 3
"""Moving pairs below which nothing is concluded of a frozen camera."""


@dataclass
class CameraLook:
    """What was seen of one camera in one episode. `faults` counts frames; `frozen` counts pairs of `moving`."""

    frames: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    moving: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    samples: list[Image] = field(default_factory=list)
    """First, middle and last frame, for the contact sheet."""

    def shares(self) -> dict[str, float]:
        """Return {fault: share}; of frozen pairs, the share of those in which the robot moves."""
        of = {name: self.moving if name == "frozen" else self.frames for name in LIMITS}
        return {name: self.faults[name] / count if (count := of[name]) else 0.0 for name in LIMITS}

    def found(self) -> dict[str, float]:
        """Return the shares that are findings. A black picture is not listed as one colour or underexposed again."""
        shares = self.shares()
        found = {name: share for name, share in shares.items() if share >= LIMITS[name]}
        # One frame alone is a flash or a camera that starts up, unless there is no other.
        found = {name: share for name, share in found.items() if self.faults[name] > 1 or share == 1}
        if self.moving < MIN_PAIRS or {"black", "one colour"} & found.keys():
            found.pop("frozen", None)
        if "black" in found:
            found = {name: share for name, share in found.items() if name not in ("one colour", "underexposed")}
        if "one colour" in found:
            found = {name: share for name, share in found.items() if name not in ("overexposed", "underexposed")}
        return found


@dataclass
class EpisodeLook:
    """One episode: a `CameraLook` a camera, pairs of cameras that show the same, faults that stopped the reading."""

    episode: Episode
    cameras: dict[str, CameraLook]
    same: set[tuple[str, str]] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    thumbnails: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON-able row a camera."""
        return [
            {
                "episode": self.episode.id,
                "camera": camera,
                "frames": look.frames,
                "moving_pairs": look.moving,
                "size": [f"{width} x {height}" for height, width in look.sizes],
                **{name.replace(" ", "_"): round(share, 4) for name, share in look.shares().items()},
            }
            for camera, look in self.cameras.items()
        ]

    def faults(self) -> dict[str, dict[str, float]]:
        """Return {camera: {fault: share}} of the cameras that have one."""
        return {camera: found for camera, look in self.cameras.items() if (found := look.found())}


def look_at(
    source: Source, index: SourceIndex, number: int, moving: NDArray[np.bool_] | None, *, every: bool
) -> EpisodeLook:
    """Decode some frames of an episode, or `every` one, and count their faults.

    `moving` bool [T - 1]: whether the robot moves from a frame to the next; None: not known, and every pair counts.
    """
    episode = index.episodes[number]
    seen = EpisodeLook(episode, {camera: CameraLook() for camera in index.cameras})
    samples = {0, episode.length // 2, episode.length - 1}
    before: tuple[Image, ...] = ()
    last = -2
    different: set[tuple[str, str]] = set()
    for start, stop in spans(episode.length, every=every):
        at = start
        try:
            for frame, views in enumerate(_whole(source.frames(number, start, stop), start, stop), start):
                at = frame + 1
                if not _usable(views, index.cameras, frame, seen):
                    before = ()
                    continue
                _note(views, index.cameras, seen, different, keep=frame in samples)
                if before and last == frame - 1 and (moving is None or moving[last]):
                    _note_motion(before, views, index.cameras, seen)
                before, last = views, frame
        except SourceError as error:
            # The other frames of a damaged file fail for the same reason.
            seen.errors.append(f"{episode.id}, frame {at}: {error}")
            break
    pairs = set(combinations(index.cameras, 2)) - different
    blank = {camera for camera, look in seen.cameras.items() if not look.frames or look.faults["one colour"]}
    seen.same = {pair for pair in pairs if not blank & set(pair)}
    return seen


def spans(length: int, *, every: bool = False) -> list[tuple[int, int]]:
    """Return the (start, stop) of the frames that are looked at, in order; see the module.

    The first, the middle and the last frame are always among them. Spans that touch are joined.
    """
    if every or length <= EVERY:
        return [(0, length)]
    starts = {int(at) for at in np.linspace(0, length - 2, PAIRS).round()} | {length // 2}
    joined: list[tuple[int, int]] = []
    for start in sorted(starts):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], min(start + 2, length))
        else:
            joined.append((start, min(start + 2, length)))
    return joined


def moving_pairs(rows: NDArray[Any], ranges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return between which neighbouring rows of [T, D] any column moves by `MOVES` of its range [D], bool [T - 1]."""
    steps = np.abs(np.diff(rows.astype(np.float64), axis=0))
    moved: NDArray[np.bool_] = np.any(steps > MOVES * np.where(ranges > 0, ranges, np.inf), axis=1)
    return moved


def picture_faults(image: Image) -> set[str]:
    """Return what is wrong with one picture uint8 [H, W, 3], of the names of `LIMITS`."""
    channels = np.moveaxis(_thinned(image), 2, 0)
    # Channel by channel: a reduction over the last axis of three is ten times slower.
    least, most = (reduce(extreme, channels) for extreme in (np.minimum, np.maximum))
    faults = set()
    # Not the maximum: one hot pixel of a dead sensor does not make a picture.
    if np.count_nonzero(most > BLACK) <= most.size // 1000:
        faults.add("black")
    if all(channel.std() < 1.0 for channel in channels):
        faults.add("one colour")
    # A white table with an arm on it, or a lamp at night, has contrast: what is clipped there is no fault.
    if np.count_nonzero(least >= BRIGHT) > most.size / 2 and np.count_nonzero(most < 128) < most.size / 10:
        faults.add("overexposed")
    if np.count_nonzero(most <= DARK) > 0.9 * most.size and np.count_nonzero(most > 64) < most.size / 50:
        faults.add("underexposed")
    return faults


def difference(one: Image, other: Image) -> float:
    """Return the largest difference of two pictures of one size, in levels, as the mean over 8 x 8 pixels.

    The mean over blocks separates a small object that moves from a codec's noise over the whole picture.
    """
    old, new = _thinned(one), _thinned(other)
    change = reduce(np.add, np.moveaxis(np.maximum(old, new) - np.minimum(old, new), 2, 0).astype(np.float32)) / 3
    height, width = (max(size // 8 * 8, 1) for size in change.shape)
    rows, columns = max(height // 8, 1), max(width // 8, 1)
    blocks = change[:height, :width].reshape(rows, height // rows, columns, width // columns)
    return float(blocks.mean(axis=(1, 3)).max())


def swapped(looks: Sequence[EpisodeLook], cameras: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (episode, camera, camera) where two cameras show what the other one shows in most episodes."""
    whole = [look for look in looks if look.thumbnails.keys() == set(cameras)]
    if len(whole) < 4:  # a median of three is one episode's picture
        return []
    usual = {camera: np.median([look.thumbnails[camera] for look in whole], axis=0) for camera in cameras}
    found = []
    for look in whole:
        for one, other in combinations(cameras, 2):
            here = [_apart(look.thumbnails[camera], usual[camera]) for camera in (one, other)]
            there = [_apart(look.thumbnails[one], usual[other]), _apart(look.thumbnails[other], usual[one])]
            # Half as far from the other camera's picture as from its own, on both sides.
            if there[0] < 0.5 * here[0] and there[1] < 0.5 * here[1]:
                found.append((look.episode.id, one, other))
    return found


def dead_depth(source: Source, index: SourceIndex, number: int) -> list[str]:
    """Return what is wrong with the depth of the first, middle and last frame of an episode, a line a camera."""
    if "depth" not in index.extras or not isinstance(source, ViewSource):
        return []
    length = index.episodes[number].length
    found: dict[str, list[str]] = {camera: [] for camera in index.cameras}
    frames = sorted({0, length // 2, length - 1})
    for frame in frames:
        for camera, view in zip(index.cameras, next(source.views(number, frame, frame + 1, ("depth",))), strict=True):
            found[camera].append(_depth_fault(view["depth"]))
    return [
        f"{camera}: depth is {whats[0]} in all {len(frames)} frames looked at"
        for camera, whats in found.items()
        if whats[0] and len(set(whats)) == 1
    ]


def _depth_fault(depth: NDArray[Any]) -> str:
    if not np.isfinite(depth).any():
        return "NaN or infinite everywhere"
    low, high = np.nanmin(depth), np.nanmax(depth)
    return "" if low < high else "0 everywhere" if low == 0 else f"{low:g} everywhere"


def _apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.abs(one - other).mean())


def _whole(frames: Iterator[tuple[Image, ...]], start: int, stop: int) -> Iterator[tuple[Image, ...]]:
    """Yield the frames of a span. Raises `SourceError` where one is missing."""
    for frame in range(start, stop):
        views = next(frames, None)
        if views is None:
            raise SourceError(f"no picture of frame {frame}", expected="one a camera")
        yield views


def _usable(views: tuple[Image, ...], cameras: tuple[str, ...], frame: int, seen: EpisodeLook) -> bool:
    where = f"{seen.episode.id}, frame {frame}"
    if len(views) != len(cameras):
        seen.errors.append(f"{where}: {len(views)} of {len(cameras)} cameras")
        return False
    wrong = [
        f"{where}, {camera}: {image.dtype} {image.shape}"
        for camera, image in zip(cameras, views, strict=True)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3
    ]
    seen.errors += wrong
    return not wrong


def _note(
    views: tuple[Image, ...],
    cameras: tuple[str, ...],
    seen: EpisodeLook,
    different: set[tuple[str, str]],
    *,
    keep: bool,
) -> None:
    for camera, image in zip(cameras, views, strict=True):
        look = seen.cameras[camera]
        look.frames += 1
        look.sizes[image.shape[0], image.shape[1]] += 1
        look.faults.update(picture_faults(image))
        if keep:
            look.samples.append(image)
        if camera not in seen.thumbnails:
            rows, columns = (np.linspace(0, size - 1, 8).round().astype(int) for size in image.shape[:2])
            seen.thumbnails[camera] = image[rows][:, columns].astype(np.float32)
    for (one, first), (other, second) in combinations(zip(cameras, views, strict=True), 2):
        if (one, other) not in different and (first.shape != second.shape or difference(first, second) > NOISE):
            different.add((one, other))


def _note_motion(
    before: tuple[Image, ...], views: tuple[Image, ...], cameras: tuple[str, ...], seen: EpisodeLook
) -> None:
    for camera, old, new in zip(cameras, before, views, strict=True):
        look = seen.cameras[camera]
        look.moving += 1
        look.faults["frozen"] += int(old.shape == new.shape and difference(old, new) < NOISE)


def _thinned(image: Image) -> Image:
    step = max(min(image.shape[:2]) // SIDE, 1)
    return image[::step, ::step]


def picture_findings(looks: Sequence[EpisodeLook], cameras: Sequence[str]) -> list[str]:
    """Return one line for each fault of a camera in an episode; one for all where every episode has it."""
    lines: list[str] = []
    by_fault: dict[tuple[str, str], dict[str, float]] = {}
    for look in looks:
        for camera, faults in look.faults().items():
            for fault, share in faults.items():
                by_fault.setdefault((camera, fault), {})[look.episode.id] = share
    for (camera, fault), episodes in by_fault.items():
        lines += _lines(camera, fault, episodes, len(looks))
    same: dict[tuple[str, str], list[str]] = {}
    for look in looks:
        for pair in look.same:
            same.setdefault(pair, []).append(look.episode.id)
    lines += [
        f"{one} and {other} show the same pictures in {_count(ids, len(looks))}" for (one, other), ids in same.items()
    ]
    lines += [f"{episode}: {one} and {other} seem swapped" for episode, one, other in swapped(looks, cameras)]
    return lines


def _lines(camera: str, fault: str, episodes: Mapping[str, float], total: int) -> list[str]:
    what = "pairs in which the robot moves" if fault == "frozen" else "frames looked at"
    least = min(episodes.values())
    if len(episodes) == total and total > 1:
        return [f"{camera} is {fault} in every episode, in {least:.0%} or more of the {what}"]
    return [f"{episode}: {camera} is {fault} in {share:.0%} of the {what}" for episode, share in episodes.items()]


def _count(ids: Sequence[str], total: int) -> str:
    return "every episode" if len(ids) == total and total > 1 else ", ".join(ids)
