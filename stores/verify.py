"""Reading everything back: does each committed byte say what was committed?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla.stores.commits import Commit
from vla.stores.errors import VlaError
from vla.stores.filesystem import PARTIAL, digest_file
from vla.stores.layout import commit_file, unit_files
from vla.stores.store import Store, open_store


@dataclass
class VerifyReport:
    """What `verify_store` found. `findings` are one line each and name array, unit and file; none means sound."""

    root: str
    units: int = 0
    committed: int = 0
    files: int = 0
    bytes: int = 0
    findings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**self.__dict__, "ok": not self.findings}


def verify_store(root: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Compare every committed file with its record, and every row with its checksum.

    Damage is reported, not raised; only a `root` that is no store at all raises (`StoreError`). `progress` is called
    with units done and units in all.
    """
    report = VerifyReport(str(root))
    try:
        store = open_store(root, allow_partial=True)
    except VlaError as error:
        if not (root / "zarr.json").is_file():
            raise
        report.findings.append(str(error))
        return report
    report.units, report.committed = store.manifest.units, len(store.commits)
    if not store.complete:
        missing = [unit for unit in range(report.units) if unit not in store.commits]
        report.findings.append(f"units {_ranges(missing)} of {root} are not committed (vla featurize … --resume)")
    for done, (unit, commit) in enumerate(sorted(store.commits.items())):
        damaged = _check_files(store, commit, report)
        if not damaged:
            _check_rows(store, unit, report)
        progress(done + 1, len(store.commits))
    _check_debris(store, report)
    return report


def _check_files(store: Store, commit: Commit, report: VerifyReport) -> bool:
    planned = set(unit_files(store.manifest, commit.unit))
    before = len(report.findings)
    where = f"unit {commit.unit}, {commit_file(commit.unit)}"
    for path in sorted(planned ^ set(commit.files)):
        report.findings.append(f"{where}: {path} is {'not recorded' if path in planned else 'no file of this store'}")
    for path in sorted(planned & set(commit.files)):
        record, file = commit.files[path], store.root / path
        array = "/".join(path.split("/")[:2])
        if not file.is_file():
            report.findings.append(f"array {array}, unit {commit.unit}: {file} is missing")
        elif file.stat().st_size != record.size:
            found = file.stat().st_size
            report.findings.append(f"array {array}, unit {commit.unit}: {file} has {found} bytes, not {record.size}")
        elif digest_file(file) != record.sha256:
            report.findings.append(f"array {array}, unit {commit.unit}: {file} differs from its commit")
        else:
            report.files += 1
            report.bytes += record.size
    return len(report.findings) > before


def _check_rows(store: Store, unit: int, report: VerifyReport) -> None:
    """Read every row of a unit through the reader, and compare its values with what the manifest promises."""
    rows = np.asarray(store.manifest.unit_range(unit))
    left_out = np.zeros(store.manifest.rows, bool)
    for position, name in enumerate(store.episodes.ids):
        if name in store.skipped:
            start = int(store.episodes.row_start[position])
            left_out[start : start + int(store.episodes.length[position])] = True
    rows = rows[~left_out[rows]]
    for name in store.manifest.features:
        try:
            finite = bool(np.isfinite(store.read(name, rows)).all())
        except VlaError as error:
            report.findings.append(str(error))
            continue
        if not finite:
            report.findings.append(f"array frames/{name}, unit {unit}: values are not finite")


def _check_debris(store: Store, report: VerifyReport) -> None:
    known = {path for unit in store.commits for path in unit_files(store.manifest, unit)}
    for folder in ("frames", "steps", "checksums", "stats"):
        for file in (store.root / folder).rglob("c.*"):
            path = file.relative_to(store.root).as_posix()
            if path.endswith(PARTIAL) or path not in known:
                report.findings.append(f"{file} belongs to no committed unit (harmless; --resume removes it)")


def _ranges(numbers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
