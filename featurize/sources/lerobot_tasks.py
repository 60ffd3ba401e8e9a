"""What the robot was told at each frame: columns that index the texts of `meta/tasks`, or hold texts themselves.

LeRobot's reader looks the `task_index` of a frame up in `meta/tasks`; the list of an episode in `meta/episodes` may
name more (in GR00T's data sets also the texts of other annotations, such as "valid"). The frames count here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources import parquet
from vla.featurize.sources.episode_checks import SKIP
from vla.featurize.sources.lerobot_info import Info, inside, whole
from vla.featurize.sources.lerobot_layout import read_jsonl
from vla.stores.errors import SourceError, UsageError
from vla.stores.settings import nearest

TASK_INDEX = "task_index"
ANNOTATION = "annotation."


@dataclass(frozen=True)
class Tasks:
    """`texts` {task_index: text} and the file below the root that they are from; empty without such a file."""

    texts: Mapping[int, str]
    file: str


@dataclass(frozen=True)
class Told:
    """An episode's instruction, further texts by name, and whether the instruction changes inside the episode."""

    task: str
    texts: Mapping[str, str]
    changes: bool


def read_tasks(info: Info) -> Tasks:
    """Read `meta/tasks`. Raises `SourceError` on a line without index or text, and on an index declared twice."""
    name = "meta/tasks.parquet" if info.version == "v3.0" else "meta/tasks.jsonl"
    if not inside(info.root, name).is_file():
        return Tasks({}, name)
    if info.version == "v3.0":
        pairs = _pairs_v3(info, name)
    else:
        pairs = [(raw.get(TASK_INDEX), raw.get("task")) for raw in read_jsonl(info, name)]
    texts: dict[int, str] = {}
    for index, text in pairs:
        number = whole(index)
        if number is None or not isinstance(text, str | None):
            raise SourceError(f"{info.root / name} has a line without task_index or task", expected="both, once")
        if text is None:
            continue  # refused where a frame names the task, as one that is not declared
        if number in texts:
            raise SourceError(f"{info.root / name} declares task {number} twice", expected="one text for each index")
        texts[number] = text
    return Tasks(texts, name)


def _pairs_v3(info: Info, name: str) -> list[tuple[Any, Any]]:
    """Return (index, text) of each row; the text is the pandas index, under any name, in any encoding of text."""
    file = inside(info.root, name)
    kinds = parquet.schema(file)
    named = [field.name for field in kinds if parquet.is_text(field.type)]
    text = next((key for key in ("task", "__index_level_0__") if key in named), named[0] if named else "task")
    columns = parquet.read_table(file, [text], [TASK_INDEX]).to_pydict()
    # LeRobot's reader takes the row number for the index; pandas may have dropped a column that repeats it.
    return list(zip(columns.get(TASK_INDEX, range(len(columns[text]))), columns[text], strict=True))


def channels_of(kinds: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, str]:
    """Return {name: column} of the annotations that the data hold: those of modality.json and `annotation.NAME`."""
    named = {name.removeprefix(ANNOTATION): name for name in kinds if name.startswith(ANNOTATION)}
    named |= {name: column for name, column in annotations.items() if column in kinds}
    return {name: column for name, column in named.items() if name != TASK_INDEX}


def instruction_column(
    kinds: Mapping[str, Any], channels: Mapping[str, str], wanted: str | None, where: str
) -> str | None:
    """Return the column of the instruction: `wanted`, else `task_index`, else the only annotation, else None.

    Raises `UsageError` for a `wanted` that is no annotation, `SourceError` where several are there and none chosen.
    """
    if wanted is not None:
        name = wanted.removeprefix(ANNOTATION)
        if name == TASK_INDEX and TASK_INDEX in kinds:
            return TASK_INDEX
        if name not in channels:
            known = ", ".join([*channels, *([TASK_INDEX] if TASK_INDEX in kinds else [])])
            hint = nearest(name, channels)
            raise UsageError(f"{where} has no annotation {wanted!r}{hint}", expected=f"one of {known or 'none'}")
        return channels[name]
    if TASK_INDEX in kinds:
        return TASK_INDEX
    if len(channels) > 1:
        raise SourceError(
            f"{where} has no task_index, and several annotations: {', '.join(channels)}",
            expected="the one that is the instruction",
            fix=f"--set source_options.annotation={next(iter(channels))}",
        )
    return next(iter(channels.values()), None)


def told(
    table: Any, column: str | None, channels: Mapping[str, str], tasks: Tasks, listed: Sequence[str | int], where: str
) -> Told:
    """Return what the frames of an episode were told. `table` holds `column` and the columns of `channels`.

    `listed` is the episode's own list, which decides only where no frame names a task. Raises `SourceError` where a
    frame names a task that is not declared.
    """
    texts: dict[str, str] = {}
    for name, other in channels.items():
        found = _spoken(table.column(other), tasks)
        # A number that indexes no text is a number (a validity flag, a stage); the step column keeps it.
        if other != column and found is not None:
            texts[f"annotation.{name}"] = "; ".join(dict.fromkeys(found.values()))
    if column is None or (column == TASK_INDEX and not tasks.texts):
        return Told(_sole(listed, tasks, where), texts, changes=False)
    spoken = _spoken(table.column(column), tasks)
    if spoken is None:
        index = next((i for i in _distinct(table.column(column)) if i not in tasks.texts), None)
        raise SourceError(f"{where}, column {column} has task {index}", expected=f"one of {tasks.file}", fix=SKIP)
    if parquet.texts(table.column(column)) is not None and None in _distinct(table.column(column)):
        raise SourceError(f"{where}, column {column} has rows without text", expected="the instruction", fix=SKIP)
    distinct = list(dict.fromkeys(spoken.values()))
    if len(distinct) > 1:
        texts |= {f"task_{key}": text for key, text in spoken.items()}
    return Told("; ".join(distinct), texts, changes=len(distinct) > 1)


def _distinct(column: Any) -> list[Any]:
    """Return the distinct values of a column in the order of their first rows, None for rows without one."""
    texts = parquet.texts(column)
    if texts is not None:
        return list(dict.fromkeys(texts))
    if column.null_count:
        return [None]  # numbers with gaps index no text
    values = parquet.to_array(column, "a column of tasks").reshape(len(column), -1)[:, 0]
    return [whole(value) if whole(value) is not None else value for value in dict.fromkeys(values.tolist())]


def _spoken(column: Any, tasks: Tasks) -> dict[Any, str] | None:
    """Return {index, or number of a text in the episode: text} in the order of the rows.

    None where an index is not declared, or no row has a text.
    """
    values = _distinct(column)
    if parquet.texts(column) is not None:
        return dict(enumerate(text for text in values if text is not None)) or None
    return {value: tasks.texts[value] for value in values} if all(v in tasks.texts for v in values) else None


def numbered(column: Any, where: str) -> NDArray[np.generic]:
    """Return which instruction each row of an episode has, int64 [T]: the index, or the text's number by first row."""
    texts = parquet.texts(column)
    if texts is None:
        return parquet.to_array(column, where)
    places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.asarray([places[text] for text in texts], np.int64)


def _sole(listed: Sequence[str | int], tasks: Tasks, where: str) -> str:
    """Return the only task that an episode lists."""
    texts = list(dict.fromkeys(resolved(listed, tasks)))
    if len(texts) != 1:
        found = f"{where} lists {len(texts)} tasks" if texts else f"{tasks.file} is missing, and {where} lists no task"
        raise SourceError(found, expected=f"one, or {tasks.file} and the task_index of each frame")
    return texts[0]


def resolved(listed: Sequence[str | int], tasks: Tasks) -> list[str]:
    """Return the texts of an episode's list, which may hold indices in their place."""
    return [tasks.texts.get(item, str(item)) if isinstance(item, int) else item for item in listed]
