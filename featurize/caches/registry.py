"""The kinds of feature caches by name. A new kind is one file and one line in `CACHES`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from vla.featurize.caches.base import Cache
from vla.featurize.options import checked_options
from vla.stores.errors import SourceError, UsageError
from vla.stores.settings import nearest

CACHES: dict[str, str] = {
    "opentrackvla": "vla.featurize.caches.opentrackvla:OpenTrackVLACache",
    "rgb2pc-windows": "vla.featurize.caches.rgb2pc_windows:WindowsCache",
    "replay-buffer": "vla.featurize.caches.replay_buffer:ReplayBufferCache",
    "robomimic": "vla.featurize.caches.robomimic:RobomimicCache",
    "arrays": "vla.featurize.caches.arrays:ArraysCache",
}


def open_cache(kind: str, path: Path | str, /, **options: Any) -> Cache:
    """Open a cache; nothing is read yet. `options` are the keywords of the kind's class.

    Raises `UsageError` for an unknown kind or option or a value of another type, `SourceError` where `path` does not
    exist.
    """
    path = Path(path)
    if kind not in CACHES:
        raise UsageError(f"unknown kind {kind!r}{nearest(kind, CACHES)}", expected=f"one of {', '.join(CACHES)}")
    if not path.exists():
        raise SourceError(f"{path} does not exist", expected=f"a cache of kind {kind}")
    module, _, name = CACHES[kind].partition(":")
    cache = getattr(importlib.import_module(module), name)
    return cast(Cache, cache(path, **checked_options(cache, options, f"{kind} cache")))
