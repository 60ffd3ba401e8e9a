"""How many episodes `skip_bad` may leave out before a run counts as failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vla.featurize.plan import Plan
from vla.stores.errors import SourceError
from vla.stores.remote.options import is_url
from vla.stores.store import open_store

MAX_SKIPPED = 2 / 3
"""Share of the episodes. Above it the data set or an option is wrong, not some episodes."""


def bad_episodes(plan: Plan, later: Mapping[str, str]) -> dict[str, str]:
    """Return {episode: reason} of those left out as bad; `later`: found while frames were read.

    Episodes that an option leaves out on purpose are not among them.
    """
    return {name: reason for name, reason in plan.skipped.items() if name not in plan.filtered} | dict(later)


def require_few_skipped(plan: Plan, later: Mapping[str, str], most: float) -> None:
    """Raise `SourceError` where more than the share `most` of the episodes is left out as bad."""
    bad = bad_episodes(plan, later)
    total = len(plan.episodes) + sum(name not in plan.filtered for name in plan.skipped)
    if bad and len(bad) > most * total:
        name, reason = next(iter(bad.items()))
        raise SourceError(
            f"{len(bad)} of {total} episodes are left out; the first, {name}: {reason}",
            expected=f"at most {most:.0%}",
            fix=f"vla inspect --source lists all; --set max_skipped={len(bad) / total:.2g} accepts them",
        )


def skipped_in(root: Path | str, later: Mapping[str, str]) -> dict[str, str]:
    """Return `later`, what this run left out, and what earlier runs of a store in a folder left out before it."""
    return {**({} if is_url(root) else open_store(root, allow_partial=True).skipped), **later}
