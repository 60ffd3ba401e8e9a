"""What the TAB key offers: names of the registries, runs and stores on disk. No torch is imported for it.

A registry is named by its module and attribute and imported when TAB is pressed: the terminal lies below it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

Complete = Callable[[str], list[str]]

BACKBONES = "vla.featurize.backbones.registry:BACKBONES"
HEADS = "vla.heads.registry:HEADS"
SOURCES = "vla.featurize.sources.registry:SOURCES"
CACHES = "vla.featurize.caches.registry:CACHES"
ENVS = "vla.rollout.envs.registry:ENVS"


def names(*registries: str, suffix: str = "", more: tuple[str, ...] = ()) -> Complete:
    """Return what offers the names of registries ("module:ATTRIBUTE"), each with `suffix`, and `more`."""

    def complete(incomplete: str) -> list[str]:
        found = list(more)
        for place in registries:
            module, _, attribute = place.partition(":")
            found += [f"{name}{suffix}" for name in getattr(importlib.import_module(module), attribute)]
        return sorted(name for name in found if name.startswith(incomplete))

    return complete


def folders(home: str, marker: str) -> Complete:
    """Return what offers the folders that hold a file `marker`, below `home` and in the folder typed so far.

    A folder without it is offered with a slash, to go on from, where a folder was typed.
    """

    def complete(incomplete: str) -> list[str]:
        typed = incomplete.rpartition("/")[0]
        if incomplete.startswith("/") and not typed:
            typed = "/"
        found = []
        for place in [Path(typed)] if typed else [Path(home), Path()]:
            for child in sorted(place.iterdir()) if place.is_dir() else ():
                if child.is_dir() and not child.name.startswith("."):
                    whole = (child / marker).is_file()
                    found += [str(child)] if whole else [f"{child}/"] if typed or child.name == home else []
        return [text for text in found if text.startswith(incomplete)]

    return complete


def either(*all_of: Complete) -> Complete:
    """Return what offers everything that several offer."""
    return lambda incomplete: [text for complete in all_of for text in complete(incomplete)]
