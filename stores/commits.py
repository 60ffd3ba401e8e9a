"""Commit records: the only thing that makes a unit exist.

`commits/unit-NNNNNN.json` is written atomically after every file of the unit is durable. It names the manifest's
digest (so that a record copied from another store is refused), the size and SHA-256 of each of the unit's files, and
the episodes that were left out, and it carries its own digest. A unit without a valid record is absent.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla.stores.below import read_below
from vla.stores.documents import parse_json
from vla.stores.dtypes import Rounding
from vla.stores.errors import CorruptionError
from vla.stores.filesystem import explaining, fsync_dir
from vla.stores.fingerprint import canonical, digest
from vla.stores.formats.registry import format_of, unit_files
from vla.stores.layout import COMMITS, RECORD_NAME, commit_file
from vla.stores.manifest import Manifest

MAX_RECORD_BYTES = 16 << 20
"""A record above 16 MiB is no record of ours: ten features and a thousand left-out episodes make 100 KB."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one committed file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """One committed unit. `files` maps paths in the store; `skipped` episode ids left out to the reason.

    `parts` holds the SHA-256 (hex) of those small arrays that have no file of their own (the h5 form). `rounding`: what
    int8 cost each feature; {} of units committed before that was recorded.
    """

    unit: int
    files: dict[str, FileRecord]
    skipped: dict[str, str]
    parts: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def to_bytes(self, manifest: Manifest) -> bytes:
        """Encode the record of this unit of the store that `manifest` describes."""
        rows = manifest.unit_range(self.unit)
        body = {
            "unit": self.unit,
            "rows": [rows.start, rows.stop],
            "manifest_sha256": manifest.sha256(),
            "files": {path: {"size": file.size, "sha256": file.sha256} for path, file in self.files.items()},
            "skipped": self.skipped,
        }
        if self.parts:
            body["parts"] = self.parts
        if self.rounding:
            body["rounding"] = {name: asdict(cost) for name, cost in self.rounding.items()}
        return _signed(body)


def read_commits(root: Path, manifest: Manifest, lying: dict[Path, CorruptionError] | None = None) -> dict[int, Commit]:
    """Return `{unit: Commit}` of every committed unit. Raises `CorruptionError` on a record that lies.

    Where `lying` is given, such records are put there with their error instead, and their units count as absent.
    """
    expected = manifest.sha256()
    commits = {}
    with explaining(root / COMMITS):
        for unit, path in _records(root):
            try:
                commits[unit] = _read(path, unit, manifest, expected)
            except CorruptionError as error:
                if lying is None:
                    raise
                lying[path] = error
    return commits


def read_commit(root: Path, manifest: Manifest, unit: int, expected: str) -> Commit | None:
    """Return the commit of one unit, None where it is absent; `expected` is the manifest's digest.

    Raises `CorruptionError` on a record that lies.
    """
    path = root / commit_file(unit)
    return _read(path, unit, manifest, expected) if os.path.lexists(path) else None


def committed_units(root: Path) -> set[int]:
    """Return the units that have a record, which is not read; none where there is no store."""
    return {unit for unit, _ in _records(root)} if (root / COMMITS).is_dir() else set()


def remove_commits(root: Path, units: set[int]) -> None:
    """Un-commit units, durably: from here on they are absent. Records that lie are removed like any other."""
    with explaining(root / COMMITS):
        for unit, path in _records(root):
            if unit in units:
                path.unlink()
        fsync_dir(root / COMMITS)


def record_unit(path: Path) -> int:
    """Return the unit that a record's name says."""
    return int(path.stem.removeprefix("unit-"))


def _records(root: Path) -> list[tuple[int, Path]]:
    """Return unit and path of each file that bears a record's name."""
    folder = root / COMMITS
    if folder.is_symlink() or not folder.is_dir():
        what = "is a symbolic link" if folder.is_symlink() else "is missing"
        raise CorruptionError(f"{folder} {what}", expected="a folder of commit records")
    paths = [path for path in sorted(folder.iterdir()) if RECORD_NAME.fullmatch(path.name)]
    return [(record_unit(path), path) for path in paths]


def _share(found: Any) -> float | None:
    return None if found is None else float(found)


def _signed(body: dict[str, Any]) -> bytes:
    return canonical({**body, "sha256": digest(body)}) + b"\n"


def _read(path: Path, unit: int, manifest: Manifest, expected: str) -> Commit:
    fix = f"vla verify {path.parent.parent}"
    data = read_below(path.parent.parent, f"{COMMITS}/{path.name}", MAX_RECORD_BYTES)
    try:
        raw: Any = parse_json(data)
        body = {key: value for key, value in raw.items() if key != "sha256"} if isinstance(raw, dict) else {}
        whole = data == _signed(body)
    except ValueError:
        raise CorruptionError(f"{path} is not JSON", expected="a commit record", fix=fix) from None
    if not whole:
        raise CorruptionError(f"{path} does not match its digest", expected="a whole commit record", fix=fix)
    if body.get("manifest_sha256") != expected:
        raise CorruptionError(f"{path} belongs to another store", fix=fix)
    if body.get("unit") != unit or unit >= manifest.units:
        raise CorruptionError(f"{path} is the record of unit {body.get('unit')} of {manifest.units}", fix=fix)
    planned = unit_files(manifest, unit)
    try:
        files = {name: FileRecord(int(file["size"]), str(file["sha256"])) for name, file in body["files"].items()}
        skipped = {str(name): str(reason) for name, reason in body["skipped"].items()}
        parts = {str(name): str(sha256) for name, sha256 in body.get("parts", {}).items()}
        rounding = {
            str(name): Rounding(float(cost["error"]), float(cost["saturated"]), _share(cost.get("erased")))
            for name, cost in body.get("rounding", {}).items()
        }
        fits = parts.keys() == format_of(manifest).digested_parts(manifest) and files.keys() == planned.keys()
        fits = fits and all(file.size in planned[name] for name, file in files.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise CorruptionError(f"{path} does not record the files of unit {unit}", expected=f"{len(planned)}", fix=fix)
    return Commit(unit, files, skipped, parts, rounding)
