"""The sources by name, and which one a folder is. A new source is one file and one line in `SOURCES`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

from vla.featurize.sources.base import Source
from vla.stores.errors import SourceError, UsageError
from vla.stores.settings import nearest


class Entry(NamedTuple):
    """`target` is "module:Class", imported when used; `marker` the file that tells a folder of this kind, if any."""

    target: str
    marker: str
    layout: str


SOURCES: dict[str, Entry] = {
    "lerobot": Entry("vla.featurize.sources.lerobot:LeRobotSource", "meta/info.json", "LeRobot v3.0 or v2.1"),
    "synthetic": Entry("vla.featurize.sources.synthetic:SyntheticSource", "", "made up in memory"),
}
"""A class with a marker takes the folder first; all take their options as keywords, each with a default."""


def open_source(spec: str | Path, **options: Any) -> Source:
    """Open a folder of demonstrations, or `synthetic`, or `synthetic:episodes=8,seed=1`; nothing is read yet.

    `options` go to the source: `map` {our name: their column}, `cameras`, `skip_bad` for LeRobot. Those that are None,
    False or empty count as not given. Raises `SourceError` for a folder that is missing or of no known layout, saying
    what it holds; `UsageError` for options that the source has not.
    """
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    given = {key: value for key, value in given.items() if value != {} and value != () and value != []}
    kind, colon, text = str(spec).partition(":")
    if isinstance(spec, str) and kind in SOURCES and not SOURCES[kind].marker:
        return _make(kind, (), _written(kind, text) | given if colon else given)
    root = Path(spec)
    return _make(_kind_of(root), (root,), given)


def _kind_of(root: Path) -> str:
    layouts = ", ".join(f"{entry.marker} ({entry.layout})" for entry in SOURCES.values() if entry.marker)
    if not root.is_dir():
        found = f"{root} is no folder" if root.exists() else f"{root} does not exist"
        hint = nearest(str(root), [name for name, entry in SOURCES.items() if not entry.marker])
        raise SourceError(f"{found}{hint}", expected=f"a folder with {layouts}", fix="--source DIR")
    for kind, entry in SOURCES.items():
        if entry.marker and (root / entry.marker).is_file():
            return kind
    inside = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    listing = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    raise SourceError(
        f"{root} is of no known layout: it holds {listing or 'nothing'}",
        expected=layouts,
        fix=_nested(root) or "--source DIR",
    )


def _nested(root: Path) -> str:
    """Return `--source` with a folder one level down that is a data set, or nothing."""
    markers = [entry.marker for entry in SOURCES.values() if entry.marker]
    folders = [root.parent, *sorted(path for path in root.iterdir() if path.is_dir())]
    found = next((folder for folder in folders if any((folder / marker).is_file() for marker in markers)), None)
    return f"--source {found}" if found else ""


def _written(kind: str, text: str) -> dict[str, Any]:
    """Parse `a=1,b=[2,3]`; commas inside brackets do not separate. Values are JSON, or strings where they are not."""
    options: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", text)):
        key, equals, raw = pair.partition("=")
        if not equals:
            raise UsageError(f"{kind} source option {pair!r}", expected=f"KEY=VALUE, such as {kind}:episodes=8,seed=1")
        try:
            options[key.strip()] = json.loads(raw)
        except (json.JSONDecodeError, RecursionError):
            options[key.strip()] = raw
    return options


def _make(kind: str, place: tuple[Path, ...], options: dict[str, Any]) -> Source:
    module, _, name = SOURCES[kind].target.partition(":")
    source = getattr(importlib.import_module(module), name)
    known = [key for key, p in inspect.signature(source).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            hint = nearest(key, known)
            raise UsageError(f"a {kind} source has no option {key!r}{hint}", expected=f"one of {', '.join(known)}")
    return cast(Source, source(*place, **options))
