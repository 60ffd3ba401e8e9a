"""Checks raw demonstrations before any backbone runs: what they hold, and everything that is wrong with them.

`Source.index` stops at the first thing that is wrong, or leaves episodes out; here every one becomes a finding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.featurize.check_numbers import Rows, ranges, stuck_columns
from vla.featurize.check_pictures import EpisodeLook, dead_depth, look_at, moving_pairs, picture_findings
from vla.featurize.contact_sheet import ContactSheet
from vla.featurize.sources.base import NoEpisodeError, Source, SourceIndex
from vla.featurize.sources.registry import common_options, open_source, option_names
from vla.stores.errors import SourceError
from vla.stores.instructions import same_instructions
from vla.stores.norm_stats import NAMES, NormStats
from vla.stores.notes import column_notes
from vla.stores.settings import Settings

_FLAG = "--skip-bad( leaves the episode out)?"
_SKIP = re.compile(rf"\. Try: {_FLAG}$|(, or |; )?{_FLAG}(, or |; )?")
"""The advice of sources that holds for the commands that go on without an episode."""

Progress = Callable[[int, int], None]


class CheckConfig(Settings):
    """What is checked: `source`, `map` and `source_options` as for `vla featurize`.

    `pictures`: episodes, evenly spread, of which frames are decoded (None: all, 0: none). `all_frames`: every frame of
    them instead of a sample (see check_pictures.py). `sheets`: folder that gets contact sheets as PNG.
    """

    source: str
    map: dict[str, str] = {}
    source_options: dict[str, Any] = {}
    pictures: int | None = Field(None, ge=0)
    all_frames: bool = False
    sheets: Path | None = None


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
        """Append a finding, without advice to pass --skip-bad: `vla inspect` has no such flag."""
        self.findings.append(Finding(check, _SKIP.sub("", str(found))))

    def to_json(self) -> dict[str, Any]:
        """Return facts and findings as plain data."""
        return {**self.facts, "findings": [vars(finding) for finding in self.findings]}


def check_source(config: CheckConfig, progress: Progress = lambda done, total: None) -> SourceReport:
    """Read everything but most pictures. Wrong data are findings; a wrong flag or path raises `VlaError` as usual."""
    # With `skip_bad` every bad episode is named, without it only the first.
    skips = "skip_bad" in option_names(config.source)
    options = {**config.source_options, **common_options(map=config.map, skip_bad=skips)}
    source = open_source(config.source, **options)
    report = SourceReport({"source": config.source})
    try:
        index = source.index()
    except NoEpisodeError as error:
        for name, reason in error.skipped.items():
            report.add("episode", f"{name}: {reason}")
        if not error.skipped:
            report.add("layout", error)
        numbers = _numbers_alone(config, options)
        if numbers is None:
            return report
        source, index = numbers
    except SourceError as error:
        report.add("layout", error)
        return report
    _describe(index, report)
    for line in index.warnings:
        report.add("records", line)
    listed = {finding.found.partition(":")[0] for finding in report.findings}
    for name, reason in index.skipped.items():
        if name not in listed and name not in index.filtered:
            report.add("episode", f"{name}: {reason}")
    values = _check_steps(source, index, report, progress)
    _note_statistics(index, values, report)
    for line in stuck_columns(index, values):
        report.add("steps", line)
    if index.pictures and config.pictures != 0:
        _check_pictures(source, index, config, values, report, progress)
    return report


def _numbers_alone(config: CheckConfig, options: dict[str, Any]) -> tuple[Source, SourceIndex] | None:
    """Return the source without cameras, where its numbers hold though its pictures do not; else None."""
    if "cameras" not in option_names(config.source) or options.get("cameras") == []:
        return None
    source = open_source(config.source, **{**options, "cameras": []})
    try:
        return source, source.index()
    except SourceError:
        return None  # the reasons are listed already


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
    for group in same_instructions(tasks):
        spelt = ", ".join(f"{task!r} ({tasks[task]})" for task in group)
        report.add("instruction", f"{len(group)} spellings of one instruction count as {len(group)} tasks: {spelt}")
    for episode in index.episodes:
        if episode.length < 2:
            report.add("length", f"{episode.id} has {episode.length} frames; expected 2 or more")


def _doubled(names: Any) -> list[tuple[str, int]]:
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def _check_steps(source: Source, index: SourceIndex, report: SourceReport, progress: Progress) -> Rows:
    """Read the numbers of every episode; return those of the vectors that hold, {column: {episode: [T, D]}}."""
    kept: dict[str, dict[int, NDArray[Any]]] = {}
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
                kept.setdefault(name, {})[number] = values
    progress(len(index.episodes), len(index.episodes))
    return kept


def _note_statistics(index: SourceIndex, values: Rows, report: SourceReport) -> None:
    """Note the statistics of every component; an action that never changes is a finding, one component is a fact.

    So are numbers that a normalisation takes far beyond 1: they are the demonstrations', and may be right.
    """
    notes: list[str] = []
    table: dict[str, list[dict[str, Any]]] = {}
    for name, parts in values.items():
        rows: NDArray[Any] = np.concatenate(list(parts.values()))
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
        ids = {number: index.episodes[number].id for number in parts}
        places = [f"episode {ids[n]!r}, row {row}" for n, part in parts.items() for row in range(len(part))]
        notes += column_notes(name, rows, labels, places.__getitem__)
    report.facts["statistics"] = table
    report.facts["notes"] = notes or None


def _check_pictures(
    source: Source,
    index: SourceIndex,
    config: CheckConfig,
    values: Rows,
    report: SourceReport,
    progress: Progress,
) -> None:
    """Decode frames of episodes, evenly spread; note shares a camera and episode, and what is wrong with them."""
    count = len(index.episodes) if config.pictures is None else min(config.pictures, len(index.episodes))
    chosen = np.unique(np.linspace(0, len(index.episodes) - 1, count).round().astype(int)).tolist()
    sheet = ContactSheet(config.sheets) if config.sheets is not None else None
    column = "state" if "state" in values else "action"  # an action may move no robot
    spread = ranges(values[column]) if column in values else np.zeros(0)
    looks = []
    for done, number in enumerate(chosen):
        progress(done, len(chosen))
        rows = values.get(column, {}).get(number)
        moving = None if rows is None else moving_pairs(rows, spread)
        look = look_at(source, index, number, moving, every=config.all_frames)
        look.errors += dead_depth(source, index, number)
        looks.append(look)
        if sheet is not None:
            sheet.add(look)
        for camera in look.cameras.values():  # pictures of one episode at a time are in memory
            camera.samples.clear()
    progress(len(chosen), len(chosen))
    if sheet is not None:
        sheet.flush()
        report.facts["sheets"] = [str(path) for path in sheet.files]
    _note_pictures(index, looks, report)


def _note_pictures(index: SourceIndex, looks: list[EpisodeLook], report: SourceReport) -> None:
    """Note rows and sizes of what was seen, and the findings."""
    for look in looks:
        report.findings += [Finding("picture", error) for error in look.errors]
    sizes: dict[str, Counter[tuple[int, int]]] = {camera: Counter() for camera in index.cameras}
    for look in looks:
        for camera, seen in look.cameras.items():
            sizes[camera].update(seen.sizes)
    report.facts["pictures"] = {
        camera: [f"{width} x {height}" for height, width in found] for camera, found in sizes.items()
    }
    report.facts["by_episode"] = [row for look in looks for row in look.rows()]
    for camera, found in sizes.items():
        if len(found) > 1:
            what = ", ".join(f"{width} x {height} ({n})" for (height, width), n in found.items())
            report.add("picture", f"{camera} has pictures of several sizes: {what}; expected one")
    for line in picture_findings(looks, index.cameras):
        report.add("picture", line)
