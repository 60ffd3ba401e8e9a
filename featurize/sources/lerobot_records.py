"""Whether the records of a LeRobot data set agree with each other: counts, row ranges, tasks and files.

Nothing here decides what is read, so that `--skip-bad` reads such a data set and reports the disagreement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from vla.featurize.sources.lerobot_info import INFO, Info
from vla.featurize.sources.lerobot_layout import EpisodeRow, Layout
from vla.featurize.sources.lerobot_tasks import Tasks, Told, resolved


def disagreements(
    info: Info, layout: Layout, indices: Mapping[int, tuple[int, int]], unlisted: Iterable[str]
) -> Iterator[str]:
    """Yield what the records contradict each other in.

    `indices` {episode index: (first, last + 1) of its column `index`}; `unlisted` what no record names.
    """
    total = sum(row.length for row in layout.rows)
    listing = info.root / layout.files[1]
    whole = info.total_episodes in (None, len(layout.rows))
    if info.total_frames is not None and whole and info.total_frames != total:
        yield f"{listing} lists {total} frames, {INFO} says total_frames = {info.total_frames}"
    stated = {row.index: row.rows for row in layout.rows if row.rows is not None}
    for row in layout.rows:
        if row.rows is not None and row.rows[1] - row.rows[0] != row.length:
            yield f"{listing}: {row.id} has rows {row.rows[0]} to {row.rows[1]} of the data set; expected {row.length}"
    yield from _ranges(f"{listing}, dataset_from_index", stated, gaps=whole)
    yield from _ranges(f"{info.root}, column index", indices, gaps=whole and len(indices) == len(layout.rows))
    for number in sorted(indices.keys() & stated.keys()):
        if indices[number] != stated[number]:
            first, stop = stated[number]
            yield f"{listing}: {_name(number)} has rows {first} to {stop}; its column index says {indices[number]}"
    yield from unlisted


def _ranges(where: str, ranges: Mapping[int, tuple[int, int]], *, gaps: bool) -> Iterator[str]:
    """Yield the ranges (first, stop) that overlap the one before, or leave a gap."""
    ordered = sorted(ranges.items(), key=lambda item: item[1])
    for (before, (_, end)), (after, (first, _)) in pairwise(ordered):
        if first < end or (gaps and first > end):
            yield f"{where}: {_name(after)} begins at row {first}; expected {end}, where {_name(before)} ends"


def doubtful_tasks(info: Info, row: EpisodeRow, said: Told, tasks: Tasks) -> Iterator[str]:
    """Yield the tasks that an episode lists and no file declares, and those of its frames that it does not list.

    The frames decide what is read, so that such a list is reported and refuses nothing.
    """
    listed = resolved(row.tasks, tasks)
    for text in listed:
        if tasks.texts and text not in tasks.texts.values():
            yield f"{row.id} lists the task {text!r}, which {info.root / tasks.file} does not declare"
    spoken = said.task.split("; ") if said.changes else [said.task]
    if listed and said.task not in listed and not set(spoken) <= set(listed):
        yield f"{row.id} lists the tasks {', '.join(map(repr, listed))}, its frames say {said.task!r}"


def doubled_tasks(info: Info, tasks: Tasks) -> Iterator[str]:
    """Yield the texts that `meta/tasks` declares under several indices: they are read as one task."""
    indices: dict[str, list[int]] = {}
    for number, text in tasks.texts.items():
        indices.setdefault(text, []).append(number)
    for text, numbers in indices.items():
        if len(numbers) > 1:
            yield f"{info.root / tasks.file} declares {text!r} as tasks {', '.join(map(str, numbers))}"


def unlisted_files(info: Info, rows: Sequence[EpisodeRow], cameras: Sequence[str]) -> Iterator[str]:
    """Yield the data files, and the videos of `cameras`, that lie where those of episodes lie and belong to none."""
    yield from _extra(info, {row.data for row in rows}, info.data_path)
    for camera in cameras:
        yield from _extra(info, {row.videos[camera].path for row in rows}, info.video_path, camera)


def _extra(info: Info, listed: set[str], template: str, camera: str | None = None) -> Iterator[str]:
    parts, suffix = PurePosixPath(template).parts, PurePosixPath(template).suffix
    top = next((part for part in parts[:1] if "{" not in part), None)
    if top is None or not suffix or "{" in suffix:
        return  # the template has no folder of its own
    for path in sorted((info.root / top).rglob(f"*{suffix}")):
        name = path.relative_to(info.root).as_posix()
        if name not in listed and (camera is None or camera in path.relative_to(info.root).parts):
            yield f"{path} belongs to no episode of {info.root}"


def _name(number: int) -> str:
    return f"episode_{number:06d}"
