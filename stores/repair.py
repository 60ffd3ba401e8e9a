"""Giving up what is damaged, so that `--resume` computes it again: the store forgets, it never guesses.

A damaged unit loses its commit record first, durably, and then its files: death at any moment leaves the unit damaged
as it was, or absent. Sound units, the manifest, the tables and files that are not the store's are not touched. No
symbolic link is followed: one in the place of something of the store's is removed, and its target stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.stores.below import HeldFolder
from vla.stores.commits import remove_commits
from vla.stores.errors import CorruptionError, MachineError
from vla.stores.filesystem import explaining, writer_lock
from vla.stores.formats.registry import unit_files
from vla.stores.remote.options import RemoteOptions, is_url, require_folder
from vla.stores.store import Store, open_damaged
from vla.stores.verify import VerifyReport, verify_opened


@dataclass(frozen=True)
class RepairReport:
    """What `repair_store` did: `dropped` units, the `removed` files in the store, the `pending` units afterwards.

    `found` says why: the report of the verification before.
    """

    root: str
    dropped: list[int]
    removed: list[str]
    pending: list[int]
    found: VerifyReport

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**self.__dict__, "found": self.found.to_json()}


def repair_store(root: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> RepairReport:
    """Verify a store (`root` may be a URL) and drop every damaged unit and all debris. A sound one is left as it is.

    Afterwards `featurize` with `resume` computes the `pending` units, and the store equals one that never was damaged.

    Raises `CorruptionError` where the manifest, the metadata of an array or the tables are damaged (no unit's data:
    nothing is dropped), `MachineError` where a unit could not be read for want of a permission and the like (it may
    be sound), `StoreError` where there is no store or another process writes to it.
    """
    if is_url(root):
        from vla.stores.remote.repair import repair_remote

        return repair_remote(str(root), RemoteOptions(), progress)
    root = require_folder(root).resolve()
    _require_whole_metadata(root)  # before the lock: what is no store gets no lock file
    with writer_lock(root), explaining(root):
        store, lying = open_damaged(root)
        report = verify_opened(store, lying, progress)
        if report.unreadable:
            raise unreadable(report)
        removed = _drop(store, report)
    pending = sorted({*report.missing, *(unit for unit in report.damaged if unit < report.units)})
    return RepairReport(str(root), sorted(report.damaged), removed, pending, report)


def _require_whole_metadata(root: Path) -> None:
    try:
        open_damaged(root)
    except CorruptionError as error:
        raise nothing_dropped(error) from None


def nothing_dropped(error: CorruptionError) -> CorruptionError:
    """Return what to raise where metadata are damaged."""
    return CorruptionError(
        f"{error.found}; nothing was dropped: only units can be computed again",
        expected=error.expected,
        fix="a copy of that file, or the same `vla featurize` with --overwrite",
    )


def unreadable(report: VerifyReport) -> MachineError:
    """Return what to raise where the machine kept a unit from being read."""
    fix = f"make it readable, then vla verify --repair {report.root}"
    return MachineError(f"{report.unreadable[0]}; nothing was dropped", fix=fix)


def _drop(store: Store, report: VerifyReport) -> list[str]:
    """Remove records, then files, then debris and links; return the paths that were removed."""
    root, manifest, held = store.root, store.manifest, store.held or HeldFolder(store.root)
    held.require_in_place()
    if report.damaged:
        remove_commits(root, set(report.damaged))
    removed = []
    for unit in report.damaged:
        planned = unit_files(manifest, unit) if unit < manifest.units else ()
        removed += [path for path in planned if held.remove(path)]
    # What a partial folder holds comes before the folder.
    removed += [path for path in sorted(report.debris, reverse=True) if held.remove(path)]
    removed += [path for path in report.links if held.remove(path)]
    return sorted(removed)
