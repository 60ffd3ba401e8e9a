"""`meta/modality.json` of GR00T's LeRobot data sets: names for parts of state and action, cameras and annotations.

    {"state": {"left_arm": {"start": 0, "end": 7}, …}, "action": {…}, "video": {"ego_view": {"original_key": …}},
     "annotation": {"human.action.task_description": {}}}

A part without `original_key` lies in `observation.state` or `action`. Parts name the components of these columns and
can be chosen (`--map state=state.left_arm+state.left_hand`); a data set without the column itself gets all parts of
modality.json, joined. Format: Isaac-GR00T's `getting_started/data_preparation.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vla.featurize.sources.lerobot_info import inside, number, read_json
from vla.featurize.sources.mapping import Column, Part
from vla.stores.errors import SourceError

MODALITY = "meta/modality.json"
DEFAULTS = {"state": "observation.state", "action": "action"}
CAMERA_PREFIX = "observation.images."


@dataclass(frozen=True)
class Modality:
    """`parts` {"state" or "action": {name: part}}, `cameras` {their column: names}, `annotations` {name: column}."""

    parts: Mapping[str, Mapping[str, Part]]
    cameras: Mapping[str, Sequence[str]]
    annotations: Mapping[str, str]


def read_modality(root: Path) -> Modality | None:
    """Read modality.json, None where there is none. Raises `SourceError` naming the part that does not conform."""
    file = inside(root, MODALITY)
    if not file.is_file():
        return None
    raw = read_json(file)
    tables = {key: _table(raw, key, file) for key in (*DEFAULTS, "video", "annotation")}
    cameras: dict[str, list[str]] = {}
    for name, spec in tables["video"].items():
        cameras.setdefault(str(spec.get("original_key", CAMERA_PREFIX + name)), []).append(name)
    return Modality(
        {
            kind: {name: _part(spec, DEFAULTS[kind], f"{file}, {kind}.{name}") for name, spec in tables[kind].items()}
            for kind in DEFAULTS
        },
        cameras,
        {name: str(spec.get("original_key", f"annotation.{name}")) for name, spec in tables["annotation"].items()},
    )


def _table(raw: Mapping[str, Any], key: str, file: Path) -> dict[str, Mapping[str, Any]]:
    table = raw.get(key) or {}
    if not isinstance(table, dict) or not all(spec is None or isinstance(spec, dict) for spec in table.values()):
        raise SourceError(f"{file} has no table {key!r}", expected="an object for each name")
    return {str(name): spec or {} for name, spec in table.items()}


def _part(spec: Mapping[str, Any], column: str, where: str) -> Part:
    start, stop = number(spec.get("start")), number(spec.get("end"))
    if start is None or stop is None or not (start.is_integer() and stop.is_integer() and 0 <= start < stop):
        found = f"{where} has start {spec.get('start')!r}, end {spec.get('end')!r}"
        raise SourceError(found, expected="0 <= start < end")
    return Part(str(spec.get("original_key", column)), int(start), int(stop))


def with_parts(columns: Mapping[str, Column], modality: Modality, where: str) -> dict[str, Column]:
    """Return the columns with the names of modality.json, and a column for each of its parts of a column that exists.

    Raises `SourceError` for a part that reaches past its column.
    """
    named = dict(columns)
    for kind, parts in modality.parts.items():
        present = {name: part for name, part in parts.items() if part.column in columns}
        for name, part in present.items():
            width = (columns[part.column].shape or (1,))[0]
            if part.stop > width:
                found = f"{where}: {kind}.{name} ends at {part.stop}, {part.column} has {width} numbers"
                raise SourceError(found, expected="a part of the column")
            named.setdefault(f"{kind}.{name}", _virtual([part], _labels(name, part), columns))
        default = DEFAULTS[kind]
        if default in columns:
            own = [(name, part) for name, part in present.items() if part.column == default]
            named[default] = _renamed(columns[default], own)
        elif present and len(present) == len(parts):
            labels = [label for name, part in present.items() for label in _labels(name, part)]
            named[default] = _virtual(present.values(), labels, columns)
    return named


def joined(columns: Mapping[str, Column], wanted: Iterable[str]) -> dict[str, Column]:
    """Return the columns with those that `wanted` joins, such as `state.left_arm+state.left_hand`."""
    found = dict(columns)
    for text in wanted:
        names = text.split("+")
        if text not in columns and len(names) > 1 and all(_is_vector(columns.get(name)) for name in names):
            parts = [part for name in names for part in _parts(name, columns[name])]
            labels = [label for name in names for label in columns[name].names]
            found[text] = _virtual(parts, labels, columns)
    return found


def _is_vector(column: Column | None) -> bool:
    return column is not None and column.kind == "number" and len(column.shape) < 2


def _parts(name: str, column: Column) -> tuple[Part, ...]:
    return column.parts or (Part(name, 0, (column.shape or (1,))[0]),)


def _virtual(parts: Iterable[Part], labels: Iterable[str], columns: Mapping[str, Column]) -> Column:
    """Describe parts of columns, end to end. What is privileged in any of them is privileged as a whole."""
    parts = tuple(parts)
    width, names = sum(part.stop - part.start for part in parts), tuple(labels)
    secret = any(columns[part.column].privileged for part in parts)
    return Column("number", "float32", (width,), names if len(names) == width else (), secret, parts=parts)


def _labels(name: str, part: Part) -> list[str]:
    width = part.stop - part.start
    return [name] if width == 1 else [f"{name}_{at}" for at in range(width)]


def _renamed(column: Column, parts: Iterable[tuple[str, Part]]) -> Column:
    """Return a column whose components have the names of the parts, where each component lies in exactly one part."""
    labels = {part.start + at: label for name, part in parts for at, label in enumerate(_labels(name, part))}
    width = (column.shape or (1,))[0]
    covered = sum(part.stop - part.start for _, part in parts)
    if covered != width or len(labels) != width:
        return column
    return replace(column, names=tuple(labels[at] for at in range(width)))
