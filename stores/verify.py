"""Reading everything back: does each committed byte say what was committed?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.commits import Commit, FileRecord
from vla.stores.errors import MachineError, VlaError
from vla.stores.filesystem import PARTIAL, digest_file, explaining
from vla.stores.layout import unit_files
from vla.stores.reader import FeatureReader
from vla.stores.remote.options import RemoteOptions, is_url
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


def verify_store(root: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Compare every committed file with its record, and every row with its checksum. `root` may be a URL.

    Damage is reported, not raised; only a `root` that is no store at all raises (`StoreError`). `progress` is called
    with units done and units in all.
    """
    if is_url(root):
        from vla.stores.remote.verify import verify_remote

        return verify_remote(str(root), RemoteOptions(), progress)
    root = Path(root)
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
        report.findings.append(f"units {name_ranges(missing)} of {root} are not committed (vla featurize … --resume)")
    left_out = _rows_left_out(store)
    readers = {name: store.reader(name, "always") for name in store.manifest.features}
    try:
        for done, (unit, commit) in enumerate(sorted(store.commits.items())):
            if _check_files(store, commit, report):
                rows = np.asarray(store.manifest.unit_range(unit))
                _check_rows(readers, rows[~left_out[rows]], unit, report)
            progress(done + 1, len(store.commits))
    finally:
        for reader in readers.values():
            reader.close()
    _check_debris(store, report)
    return report


def _check_files(store: Store, commit: Commit, report: VerifyReport) -> bool:
    sound = True
    for path, record in sorted(commit.files.items()):
        file = store.root / path
        problem = _compare(file, record)
        if problem:
            array = "/".join(path.split("/")[:2])
            report.findings.append(f"array {array}, unit {commit.unit}: {file} {problem}")
            sound = False
        else:
            report.files += 1
            report.bytes += record.size
    return sound


def _compare(file: Path, record: FileRecord) -> str:
    """Say what is wrong with a file; nothing where it is as committed."""
    try:
        with explaining(file):
            if not file.is_file():
                return "is missing"
            if file.stat().st_size != record.size:
                return f"has {file.stat().st_size} bytes, not {record.size}"
            return "" if digest_file(file) == record.sha256 else "differs from its commit"
    except MachineError as error:
        return f"cannot be read ({error.found})"


def _rows_left_out(store: Store) -> NDArray[np.bool_]:
    left_out = np.zeros(store.manifest.rows, bool)
    for position, name in enumerate(store.episodes.ids):
        if name in store.skipped:
            start = int(store.episodes.row_start[position])
            left_out[start : start + int(store.episodes.length[position])] = True
    return left_out


def _check_rows(readers: dict[str, FeatureReader], rows: NDArray[np.int64], unit: int, report: VerifyReport) -> None:
    """Read every row of a unit through the reader, and compare its values with what the manifest promises."""
    for name, reader in readers.items():
        values = np.empty((len(rows), *reader.info.shape), reader.info.dtype)
        try:
            reader.read(rows, values)
        except VlaError as error:
            report.findings.append(str(error))
            continue
        if not np.isfinite(values).all():
            report.findings.append(f"array frames/{name}, unit {unit}: values are not finite")


def _check_debris(store: Store, report: VerifyReport) -> None:
    known = {path for unit in store.commits for path in unit_files(store.manifest, unit)}
    debris = set(store.root.rglob("*" + PARTIAL))
    for folder in ("frames", "steps", "checksums", "stats"):
        files = (store.root / folder).rglob("c.*")
        debris |= {file for file in files if file.relative_to(store.root).as_posix() not in known}
    for file in sorted(debris):
        report.findings.append(f"{file} belongs to no committed unit (harmless; --resume removes it)")


def name_ranges(numbers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
