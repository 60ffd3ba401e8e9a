"""Reading everything back: does each committed byte say what was committed?"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.below import link_below, open_below
from vla.stores.commits import Commit, FileRecord, record_unit
from vla.stores.dtypes import decode
from vla.stores.errors import CorruptionError, MachineError, StoreError, VlaError
from vla.stores.filesystem import digest_open, explaining
from vla.stores.formats.registry import format_of, unit_files
from vla.stores.manifest import FeatureInfo
from vla.stores.owned import STORE, debris, links
from vla.stores.reader import FeatureReader
from vla.stores.remote.options import RemoteOptions, is_url, require_folder
from vla.stores.store import Store, open_damaged


@dataclass
class VerifyReport:
    """What `verify_store` found. `findings` are one line each and name array, unit and file; none means sound.

    The same for programs: `missing` units are not committed, `damaged` ones have a record or bytes that differ from
    what was committed, `debris` are files of no committed unit, `links` symbolic links that bear a
    name of the store's. `unreadable` are those findings that are the machine's
    (a permission, say): the unit may be sound.
    """

    root: str
    units: int = 0
    committed: int = 0
    files: int = 0
    bytes: int = 0
    findings: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    debris: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**self.__dict__, "ok": not self.findings}

    def add(self, unit: int, finding: str, error: BaseException | None = None) -> None:
        """Note damage of a unit; `error` says whether it is the machine's. What the disk cannot read back is damage."""
        self.findings.append(finding)
        if isinstance(error, MachineError) and getattr(error.__cause__, "errno", None) != errno.EIO:
            self.unreadable.append(finding)
        elif unit not in self.damaged:
            self.damaged.append(unit)


def verify_store(root: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Compare every committed file with its record, and every row with its checksum. `root` may be a URL.

    Damage is reported, not raised; only a `root` that is no store at all raises (`StoreError`). `progress` is called
    with units done and units in all.
    """
    if is_url(root):
        from vla.stores.remote.verify import verify_remote

        return verify_remote(str(root), RemoteOptions(), progress)
    root = require_folder(root)
    try:
        store, lying = open_damaged(root)
    except VlaError as error:
        if not (root / "zarr.json").is_file():
            raise
        return VerifyReport(str(root), findings=[str(error)])
    return verify_opened(store, lying, progress)


def verify_opened(
    store: Store, lying: Mapping[Path, CorruptionError], progress: Callable[[int, int], None]
) -> VerifyReport:
    """Like `verify_store`, of what `open_damaged` returned."""
    report = VerifyReport(str(store.root), store.manifest.units, len(store.commits))
    for path, error in lying.items():
        report.add(record_unit(path), str(error))
    there = {*store.commits, *report.damaged}
    report.missing = [unit for unit in range(report.units) if unit not in there]
    if report.missing:
        line = f"units {ranges(report.missing)} of {store.root} are not committed (vla featurize … --resume)"
        report.findings.append(line)
    try:
        # A reader allocates by the number of rows, for which without a commit nothing speaks but the manifest.
        readers = {name: store.reader(name, "always") for name in store.manifest.features if store.commits}
    except StoreError as error:
        report.findings.append(str(error))
        return report
    try:
        for done, (unit, commit) in enumerate(sorted(store.commits.items())):
            sound = _check_files(store, commit, report)
            if not sound:
                _check_parts(store, commit, report)
            if sound or format_of(store.manifest).shared_files:
                _check_rows(readers, store.present_rows(unit), unit, report)
            progress(done + 1, len(store.commits))
    finally:
        for reader in readers.values():
            reader.close()
    _check_links(store, report)
    _check_debris(store, report)
    if store.held is not None:
        store.held.require_in_place()
    return report


def _check_files(store: Store, commit: Commit, report: VerifyReport) -> bool:
    sound = True
    for path, record in sorted(commit.files.items()):
        file = store.root / path
        where = f"array {'/'.join(path.split('/')[:2])}, unit {commit.unit}: {file}"
        try:
            problem = _compare(store.root, path, record)
        except MachineError as error:
            report.add(commit.unit, f"{where} cannot be read ({error.found})", error)
            sound = False
            continue
        if problem:
            report.add(commit.unit, f"{where} {problem}")
            sound = False
        else:
            report.files += 1
            report.bytes += record.size
    return sound


def _check_parts(store: Store, commit: Commit, report: VerifyReport) -> None:
    """Say which small arrays of a damaged unit are affected, where one file holds several."""
    form = format_of(store.manifest)
    for part in sorted(form.digested_parts(store.manifest)):
        try:
            form.read_part(store.root, store.manifest, commit, part)
        except VlaError as error:
            report.add(commit.unit, f"array {part}, {error}", error)


def _compare(root: Path, name: str, record: FileRecord) -> str:
    """Return what is wrong with a file; nothing where it is as committed. Raises `MachineError`."""
    with explaining(root / name):
        link = link_below(root, name)
        if link is not None:
            return f"is not read: {link} is a symbolic link"
        try:
            descriptor = open_below(root, name)
        except CorruptionError:
            return "is no file" if os.path.lexists(root / name) else "is missing"
        try:
            size = os.fstat(descriptor).st_size
            if size != record.size:
                return f"has {size} bytes, not {record.size}"
            return "" if digest_open(descriptor) == record.sha256 else "differs from its commit"
        finally:
            os.close(descriptor)


def _check_rows(readers: dict[str, FeatureReader], rows: NDArray[np.int64], unit: int, report: VerifyReport) -> None:
    """Read every row of a unit through the reader, and compare its values with what the manifest promises."""
    for name, reader in readers.items():
        values = np.empty((len(rows), *reader.info.shape), reader.info.stored)
        try:
            reader.read(rows, values)
        except VlaError as error:
            report.add(unit, str(error), error)
            continue
        if not _finite(reader.info, values):
            report.add(unit, f"array frames/{name}, unit {unit}: values are not finite")


def _finite(info: FeatureInfo, values: NDArray[Any]) -> bool:
    if info.dtype == "int8":
        return True
    return bool(np.isfinite(decode(info.dtype, values)).all())


def _check_links(store: Store, report: VerifyReport) -> None:
    """Report the links that have a name of the layout: nothing is read through them."""
    reported = {path for unit in report.damaged if unit < report.units for path in unit_files(store.manifest, unit)}
    for path in sorted(set(links(store.root, STORE)) - reported):
        report.links.append(path)
        line = f"{store.root / path} is a symbolic link (vla verify --repair removes it, never its target)"
        report.findings.append(line)


def _check_debris(store: Store, report: VerifyReport) -> None:
    owners = {*store.commits, *(unit for unit in report.damaged if unit < report.units)}
    known = {path for unit in owners for path in unit_files(store.manifest, unit)}
    found = set(debris(store.root, STORE))
    for folder in {path.rpartition("/")[0] for path in unit_files(store.manifest, 0)}:
        if (store.root / folder).is_dir() and link_below(store.root, folder) is None:
            paths = {f"{folder}/{name.name}" for name in (store.root / folder).iterdir()}
            found |= {path for path in paths - known if _UNIT_FILE.fullmatch(path) and STORE.has_file(path)}
    for path in sorted(found - set(report.links)):
        report.debris.append(path)
        line = f"{store.root / path} belongs to no committed unit (harmless; vla verify --repair removes it)"
        report.findings.append(line)


_UNIT_FILE = re.compile(r".*/(c\.[^/]*|unit-[^/]*\.h5)")


def ranges(numbers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
