"""Checks raw demonstrations before any backbone runs: what they hold, and everything that is wrong with them.

`Source.index` stops at the first thing that is wrong, or leaves episodes out; here every one becomes a finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.featurize.image import Image
from vla.featurize.sources.base import Source, SourceIndex
from vla.featurize.sources.registry import open_source, option_names
from vla.stores.errors import SourceError
from vla.stores.norm_stats import NAMES, NormStats
from vla.stores.notes import column_notes
from vla.stores.settings import Settings

Progress = Callable[[int, int], None]


class CheckConfig(Settings):
    """What is checked: `source`, `map` and `source_options` as for `vla featurize`.

    `pictures`: episodes, evenly spread, whose first, middle and last frame are decoded (0: none).
    """

    source: str
    map: dict[str, str] = {}
    source_options: dict[str, Any] = {}
    pictures: int = Field(10, ge=0)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `check` is one of layout, records, episode, length, steps, instruction, picture."""

    check: str
    found: str


@dataclass
class SourceReport:
    """`facts` are JSON-able and filled as far as the source could be read; `stats` by openpi's names."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stats: dict[str, NormStats] = field(default_factory=dict)

    def add(self, check: str, found: object) -> None:
        """Append a finding."""
        self.findings.append(Finding(check, str(found)))

    def to_json(self) -> dict[str, Any]:
        """Return facts and findings as plain data."""
        return {**self.facts, "findings": [vars(finding) for finding in self.findings]}


def check_source(config: CheckConfig, progress: Progress = lambda done, total: None) -> SourceReport:
    """Read everything but most pictures. Wrong data are findings; a wrong flag or path raises `VlaError` as usual."""
    options = {"map": config.map, **config.source_options}
    # With `skip_bad` every bad episode is named, without it only the first.
    options |= {"skip_bad": True} if "skip_bad" in option_names(config.source) else {}
    source = open_source(config.source, **options)
    report = SourceReport({"source": config.source})
    try:
        index = source.index()
    except SourceError as error:
        report.add("layout", error)
        return report
    _describe(index, report)
    report.findings += [Finding("records", line) for line in index.warnings]
    for name, reason in index.skipped.items():
        report.add("episode", f"{name}: {reason}")
    values = _check_steps(source, index, report, progress)
    _note_statistics(index, values, report)
    if index.pictures and config.pictures:
        _check_pictures(source, index, config.pictures, report)
    return report


def _describe(index: SourceIndex, report: SourceReport) -> None:
    """Note what the index says, and what is wrong with it."""
    lengths = [episode.length for episode in index.episodes]
    tasks = Counter(episode.task for episode in index.episodes)
    report.facts |= {
        "kind": index.kind,
        "root": index.root,
        "licence": index.licence,
        "fps": index.fps,
        "episodes": len(lengths),
        "bad_episodes": len(index.skipped),
        "frames": sum(lengths),
        "length": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "cameras": list(index.cameras),
        "extras": list(index.extras),
        "tasks": dict(tasks),
        "steps": {
            name: {"shape": list(spec.shape), "dtype": spec.dtype, "role": spec.role, "names": list(spec.names)}
            for name, spec in index.steps.items()
        },
        "mapping": dict(index.mapping),
    }
    if not (np.isfinite(index.fps) and index.fps > 0):
        report.add("layout", f"{index.fps} frames a second; expected more than 0")
    for what, names in (("camera", index.cameras), ("episode", [episode.id for episode in index.episodes])):
        report.findings += [Finding("layout", f"{what} {name!r} is there {n} times") for name, n in _doubled(names)]
    if "action" not in index.steps:
        report.add("layout", f"no column action, only {', '.join(index.steps) or 'nothing'}")
    if index.pictures and not index.cameras:
        report.add("layout", "no camera")
    silent = sum(count for task, count in tasks.items() if not task.strip())
    if silent:
        report.add("instruction", f"{silent} of {len(lengths)} episodes have no instruction")
    for episode in index.episodes:
        if episode.length < 2:
            report.add("length", f"{episode.id} has {episode.length} frames; expected 2 or more")


def _doubled(names: Any) -> list[tuple[str, int]]:
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def _check_steps(
    source: Source, index: SourceIndex, report: SourceReport, progress: Progress
) -> dict[str, list[tuple[str, NDArray[Any]]]]:
    """Read the numbers of every episode; return those of the vectors that hold, {column: (episode, [T, D]) each}."""
    kept: dict[str, list[tuple[str, NDArray[Any]]]] = {}
    for number, episode in enumerate(index.episodes):
        progress(number, len(index.episodes))
        try:
            steps = source.steps(number)
        except SourceError as error:
            report.add("steps", f"{episode.id}: {error}")
            continue
        if steps.keys() != index.steps.keys():
            report.add("steps", f"{episode.id} has columns {sorted(steps)}; expected {sorted(index.steps)}")
        for name, values in steps.items():
            spec = index.steps.get(name)
            wanted = (episode.length, *spec.shape) if spec else values.shape
            if values.shape != wanted:
                report.add("steps", f"{episode.id}: {name} has shape {values.shape}; expected {wanted}")
            elif values.dtype.kind == "f" and not np.isfinite(values).all():
                bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
                rows = f"row {int(bad.argmax())}" + (f" and {int(bad.sum()) - 1} more" if bad.sum() > 1 else "")
                report.add("steps", f"{episode.id}: {name} is NaN or infinite in {rows}")
            elif spec and len(spec.shape) == 1 and spec.role != "other":
                kept.setdefault(name, []).append((episode.id, values))
    progress(len(index.episodes), len(index.episodes))
    return kept


def _note_statistics(
    index: SourceIndex, values: dict[str, list[tuple[str, NDArray[Any]]]], report: SourceReport
) -> None:
    """Note the statistics of every component; an action that never changes is a finding, one component is a fact.

    So are numbers that a normalisation takes far beyond 1: they are the demonstrations', and may be right.
    """
    notes: list[str] = []
    table: dict[str, list[dict[str, Any]]] = {}
    for name, parts in values.items():
        rows = np.concatenate([part for _, part in parts])
        stats = NormStats.of(rows)
        labels = index.steps[name].names or tuple(f"{name}_{i}" for i in range(rows.shape[1]))
        columns = {"min": rows.min(axis=0), "max": rows.max(axis=0), **vars(stats)}
        table[name] = [
            {"name": label, **{key: float(column[i]) for key, column in columns.items()}}
            for i, label in enumerate(labels)
        ]
        if name in NAMES:
            report.stats[NAMES[name]] = stats
        if name == "action" and len(rows) > 1 and (columns["min"] == columns["max"]).all():
            report.add("steps", "the action is the same in every frame")
        places = [f"episode {episode!r}, row {row}" for episode, part in parts for row in range(len(part))]
        notes += column_notes(name, rows, labels, places.__getitem__)
    report.facts["statistics"] = table
    report.facts["notes"] = notes or None


def _check_pictures(source: Source, index: SourceIndex, count: int, report: SourceReport) -> None:
    """Decode the first, middle and last frame of some episodes: sizes, channels, damage, pictures of one colour."""
    sizes: dict[str, Counter[tuple[int, int]]] = {camera: Counter() for camera in index.cameras}
    blank: Counter[str] = Counter()
    looked = 0
    for number in np.unique(np.linspace(0, len(index.episodes) - 1, count).round().astype(int)):
        episode = index.episodes[number]
        for frame in sorted({0, episode.length // 2, episode.length - 1}):
            try:
                views = _one(source.frames(int(number), frame, frame + 1))
            except SourceError as error:
                report.add("picture", f"{episode.id}, frame {frame}: {error}")
                continue
            looked += 1
            if len(views) != len(index.cameras):
                report.add("picture", f"{episode.id}, frame {frame}: {len(views)} of {len(index.cameras)} cameras")
                continue
            for camera, image in zip(index.cameras, views, strict=True):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    report.add("picture", f"{episode.id}, frame {frame}, {camera}: {image.dtype} {image.shape}")
                    continue
                sizes[camera][image.shape[:2]] += 1
                blank[camera] += int(image.min() == image.max())
    report.facts["pictures"] = {
        camera: [f"{width} x {height}" for height, width in found] for camera, found in sizes.items()
    }
    for camera, found in sizes.items():
        if len(found) > 1:
            what = ", ".join(f"{width} x {height} ({n})" for (height, width), n in found.items())
            report.add("picture", f"{camera} has pictures of several sizes: {what}; expected one")
        if looked and blank[camera] == looked:
            report.add("picture", f"{camera} shows one colour in all of {looked} frames")


def _one(frames: Iterator[tuple[Image, ...]]) -> tuple[Image, ...]:
    """Return the only frame; none at all is a missing one."""
    views = next(frames, None)
    if views is None:
        raise SourceError("no picture", expected="one a camera")
    return views
