"""The sources by name, and which one a folder is. A new source is one file and one line in `SOURCES`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from vla.featurize.sources.base import Source
from vla.stores.errors import SourceError, UsageError

SOURCES: dict[str, tuple[str, str]] = {
    "lerobot": ("meta/info.json", "vla.featurize.sources.lerobot:LeRobotSource"),
}
"""Kind -> (file whose presence tells it, "module:Class"); the class takes the folder and keyword options."""


def open_source(
    spec: str | Path, *, map: Mapping[str, str] | None = None, skip_bad: bool = False, **options: Any
) -> Source:
    """Open a folder of demonstrations, or `synthetic`, or `synthetic:episodes=8,seed=1`.

    `map` {our name: their column}, `skip_bad` and `options` go to the source. Raises `SourceError` for a folder that
    is missing, empty or of no known layout, saying what it holds; `UsageError` for options that the source has not.
    """
    text = str(spec)
    if text == "synthetic" or text.startswith("synthetic:"):
        return _synthetic(text.partition(":")[2], map, skip_bad, options)
    root = Path(spec)
    if not root.is_dir():
        raise SourceError(f"{root} is no folder", expected="a folder of demonstrations", fix="--source DIR")
    for marker, target in SOURCES.values():
        if (root / marker).exists():
            module, _, attribute = target.partition(":")
            cls = cast(Callable[..., Source], getattr(importlib.import_module(module), attribute))
            try:
                return cls(root, map=map, skip_bad=skip_bad, **options)
            except TypeError as error:
                raise UsageError(f"source options {sorted(options)}: {error}") from None
    inside = sorted(path.name for path in root.iterdir())
    listing = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "") if inside else "nothing"
    markers = ", ".join(f"{marker} ({kind})" for kind, (marker, _) in SOURCES.items())
    raise SourceError(f"{root} is no data set that vla knows (it holds {listing})", expected=markers)


def _synthetic(text: str, map: Mapping[str, str] | None, skip_bad: bool, options: dict[str, Any]) -> Source:
    from vla.featurize.sources.synthetic import SyntheticSettings, SyntheticSource

    for pair in filter(None, text.split(",")):
        key, equals, raw = pair.partition("=")
        if not equals:
            raise UsageError(f"synthetic source option {pair!r}", expected="KEY=VALUE")
        try:
            options[key] = json.loads(raw)
        except json.JSONDecodeError:
            options[key] = raw
    return SyntheticSource(SyntheticSettings.build(options, where="the synthetic source"), map=map, skip_bad=skip_bad)
