"""One `vla import`: from a cache that others made to a committed store.

Units are filled one after the other from nothing but their own rows, so a resumed import writes the same bytes as an
uninterrupted one, and the memory is that of one unit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.caches.base import Cache, CacheIndex
from vla.featurize.caches.registry import open_cache
from vla.featurize.decode import Segment, segments
from vla.featurize.job import refuse_shadowing
from vla.featurize.plan import Plan, StoreOptions, make_plan
from vla.featurize.room import require_room
from vla.featurize.run import Progress
from vla.featurize.skipped import MAX_SKIPPED, require_few_skipped
from vla.featurize.sources.base import Episode, Source, SourceIndex
from vla.featurize.sources.registry import common_options, open_source, refuse_overwriting_source
from vla.stores.errors import SourceError, UsageError
from vla.stores.manifest import Rate
from vla.stores.owned import refuse_overlap
from vla.stores.settings import Settings
from vla.stores.unit_buffer import UnitBuffer
from vla.stores.writer import StoreWriter, open_writer


class ImportConfig(Settings):
    """Everything that `vla import` can be told.

    `source`: demonstrations that give the steps where the cache has none; `match`: how their episodes belong together,
    by `id`, or by `order` (as many of them, in the same order). `options` go to the kind of cache, `source_options` to
    the source. `fps` [1/s] is needed where neither states it. `max_skipped`: largest share of the episodes that
    `skip_bad` may leave out.
    """

    kind: str
    path: Path
    source: str | None = None
    match: Literal["id", "order"] = "id"
    map: dict[str, str] = {}
    source_options: dict[str, Any] = {}
    options: dict[str, Any] = {}
    fps: Rate | None = None
    skip_bad: bool = False
    max_skipped: float = Field(MAX_SKIPPED, ge=0, le=1)
    store: StoreOptions = StoreOptions()


@dataclass(frozen=True)
class ImportJob:
    """A planned import: nothing is written yet. `partner[e]` is the source's episode of the cache's episode e."""

    config: ImportConfig
    cache: Cache
    source: Source | None
    partner: tuple[int, ...]
    plan: Plan


@dataclass
class ImportReport:
    """What an import did: frames and units written by this run, episodes left out and why."""

    frames: int = 0
    units: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


def prepare(config: ImportConfig) -> ImportJob:
    """Index the cache and lay out the store. Raises what the cache and the source raise."""
    options = dict(config.options)
    if config.skip_bad and config.kind != "replay-buffer":  # its episodes share their files
        options["skip_bad"] = True
    cache = open_cache(config.kind, config.path, **options)
    index = cache.index()
    own = "action" in index.steps
    if own == (config.source is not None):
        raise UsageError(
            f"{config.path} has {'its own actions' if own else 'no actions'}",
            expected="actions from one place: the cache, or a source",
            fix="leave --source out" if own else "--source DEMONSTRATIONS of the same episodes",
        )
    digest = cache.digest()
    source = partner = None
    base = SourceIndex(
        kind=f"import:{config.kind}",
        root=str(config.path),
        fps=0.0,
        cameras=index.cameras,
        episodes=index.episodes,
        steps=index.steps,
        skipped=index.skipped,
    )
    source_digest = digest
    if config.source is not None:
        common = common_options(map=config.map, skip_bad=config.skip_bad)
        source = open_source(config.source, **{**common, **config.source_options})
        theirs = source.index()
        partner = _match(config, index, theirs)
        episodes = tuple(theirs.episodes[at] for at in partner)
        base = replace(theirs, cameras=index.cameras, episodes=episodes, skipped={**theirs.skipped, **index.skipped})
        source_digest = source.digest()
    identity = {"cache": digest, "settings": cache.settings(), "match": config.match if source else None}
    spec = BackboneSpec(f"import:{config.kind}", index.features, identity, "unknown", "unknown")
    recipe = {"name": f"import:{config.kind}", "imported": True, "root": str(config.path)}
    base = replace(base, fps=_fps(config, index.fps, base.fps))
    plan = make_plan(base, source_digest, spec, recipe, config.store)
    if config.skip_bad:
        require_few_skipped(plan, {}, config.max_skipped)
    return ImportJob(config, cache, source, tuple(partner or range(len(index.episodes))), plan)


def run(
    job: ImportJob,
    root: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    progress: Progress = lambda done, total: None,
) -> ImportReport:
    """Make the store at `root`. Raises `SourceError` on a damaged cache; what is committed stays committed.

    Raises `UsageError` where `root` overlaps with the cache or the source, and what `require_room` does where the
    disk is too small (not with `accept`).
    """
    root = Path(root)
    refuse_overlap(root, [job.config.path])
    if job.source is not None:
        refuse_overwriting_source(root, str(job.config.source), job.source)
    refuse_shadowing(root)
    require_room(job.plan, root, overwrite=overwrite, accept=accept)
    report, began = ImportReport(), time.perf_counter()
    with open_writer(root, job.plan.manifest, job.plan.episodes, resume=resume, overwrite=overwrite) as writer:
        pending = writer.pending()
        total = sum(len(writer.manifest.unit_range(unit)) for unit in pending)
        for unit in pending:
            buffer = _fill(job, writer, unit)
            writer.commit(buffer)
            report.skipped |= buffer.skipped
            report.units += 1
            report.frames += int(buffer.present.sum())
            progress(report.frames, total)
    report.seconds = time.perf_counter() - began
    return report


def _fill(job: ImportJob, writer: StoreWriter, unit: int) -> UnitBuffer:
    buffer = writer.begin(unit)
    for segment in segments(job.plan.episodes, buffer.rows):
        try:
            _copy(job, buffer, segment)
        except SourceError as error:
            if not job.config.skip_bad:
                raise
            rows = range(segment.row, segment.row + segment.stop - segment.start)
            buffer.leave_out(job.plan.episodes.ids[segment.episode], rows, str(error))
    return buffer


def _copy(job: ImportJob, buffer: UnitBuffer, segment: Segment) -> None:
    length = int(job.plan.episodes.length[segment.episode])
    first = segment.row - buffer.rows.start
    for name, values in _steps(job, segment.episode).items():
        wanted = (length, *buffer.steps[name].shape[1:])
        if values.shape != wanted:
            where = f"episode {job.plan.episodes.ids[segment.episode]!r} of {job.config.path}"
            raise SourceError(f"{where} has {name!r} of shape {values.shape}", expected=f"{wanted}")
        part = values[segment.start : segment.stop]
        buffer.steps[name][first : first + len(part)] = part
    buffer.put(segment.row, job.cache.features(segment.episode, segment.start, segment.stop))


def _steps(job: ImportJob, episode: int) -> Mapping[str, NDArray[np.generic]]:
    return job.source.steps(job.partner[episode]) if job.source is not None else job.cache.steps(episode)


def _match(config: ImportConfig, cache: CacheIndex, source: SourceIndex) -> list[int]:
    """Return the source's episode of each of the cache's. Lengths must be equal: nothing tells which frame is which."""
    if config.match == "order":
        if len(cache.episodes) != len(source.episodes):
            raise SourceError(
                f"{config.path} has {len(cache.episodes)} episodes", expected=f"{len(source.episodes)} as {source.root}"
            )
        partner = list(range(len(cache.episodes)))
    else:
        places = {episode.id: at for at, episode in enumerate(source.episodes)}
        partner = [_place(config, episode, places, source.root) for episode in cache.episodes]
    for ours, at in zip(cache.episodes, partner, strict=True):
        theirs = source.episodes[at]
        if ours.length != theirs.length:
            raise SourceError(
                f"episode {ours.id!r} of {config.path} has {ours.length} frames",
                expected=f"{theirs.length} as {theirs.id!r} of {source.root}",
            )
    return partner


def _place(config: ImportConfig, episode: Episode, places: Mapping[str, int], root: str) -> int:
    if episode.id not in places:
        raise SourceError(
            f"episode {episode.id!r} of {config.path} is not in {root}",
            expected=f"ids such as {next(iter(places), '')!r}",
            fix="--set match=order where both are in the same order",
        )
    return places[episode.id]


def _fps(config: ImportConfig, cache: float | None, source: float) -> float:
    """Return the frames a second: what was typed, or what cache and source state, where they agree."""
    if config.fps is not None:
        return config.fps
    stated = {value for value in (cache, source) if value}
    if len(stated) != 1:
        found = "nothing" if not stated else " and ".join(f"{value:g}" for value in sorted(stated))
        raise UsageError(f"cache and source state {found} frames a second", expected="one rate", fix="--set fps=10")
    return stated.pop()
