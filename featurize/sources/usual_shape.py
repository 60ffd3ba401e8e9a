"""All episodes of a store have one shape. Which one, most of them say: not whichever happened to be read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

from vla.stores.errors import SourceError

T = TypeVar("T")


def keep_usual(
    found: dict[str, T],
    shape_of: Callable[[T], Hashable],
    differs: Callable[[str, str], SourceError],
    skipped: dict[str, str],
    *,
    skip_bad: bool,
) -> str:
    """Return the id of the first episode of the most common shape (the earlier one's where two are as common).

    `found` {id: what was found of it}, not empty, loses the episodes of another shape; `skipped` {id: reason} gains
    them. Raises `differs(id, id returned)` for the first of them unless `skip_bad`.
    """
    usual = Counter(map(shape_of, found.values())).most_common(1)[0][0]
    model = next(name for name, one in found.items() if shape_of(one) == usual)
    for name in [name for name, one in found.items() if shape_of(one) != usual]:
        if not skip_bad:
            raise differs(name, model)
        skipped[name] = str(differs(name, model))
        del found[name]
    return model
