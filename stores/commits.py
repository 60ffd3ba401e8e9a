"""Commit records: the only thing that makes a unit exist.

`commits/unit-NNNNNN.json` is written atomically after every file of the unit is durable. It names the manifest's
digest (so that a record copied from another store is refused), the size and SHA-256 of each of the unit's files, and
the episodes that were left out, and it carries its own digest. A unit without a valid record is absent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla.stores.errors import CorruptionError
from vla.stores.filesystem import explaining
from vla.stores.fingerprint import canonical, digest
from vla.stores.formats.registry import format_of, unit_files
from vla.stores.layout import COMMITS, commit_file
from vla.stores.manifest import Manifest

_RECORD_NAME = re.compile(r"unit-(\d{6,})\.json")
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

    `parts` holds the SHA-256 (hex) of those small arrays that have no file of their own (the h5 form).
    """

    unit: int
    files: dict[str, FileRecord]
    skipped: dict[str, str]
    parts: dict[str, str] = field(default_factory=dict)

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
        return _signed(body)


def read_commits(root: Path, manifest: Manifest) -> dict[int, Commit]:
    """Return `{unit: Commit}` of every committed unit. Raises `CorruptionError` on a record that lies."""
    folder, expected = root / COMMITS, manifest.sha256()
    commits = {}
    with explaining(folder):
        if not folder.is_dir():
            raise CorruptionError(f"{folder} is missing", expected="a folder of commit records")
        for path in sorted(folder.iterdir()):
            match = _RECORD_NAME.fullmatch(path.name)
            if match is not None:
                commits[int(match[1])] = _read(path, int(match[1]), manifest, expected)
    return commits


def remove_commit(root: Path, unit: int) -> None:
    """Un-commit a unit: from here on it is absent."""
    (root / commit_file(unit)).unlink()


def _signed(body: dict[str, Any]) -> bytes:
    return canonical({**body, "sha256": digest(body)}) + b"\n"


def _read(path: Path, unit: int, manifest: Manifest, expected: str) -> Commit:
    fix = f"vla verify {path.parent.parent}"
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise CorruptionError(f"{path} is larger than any commit record", fix=fix)
    data = path.read_bytes()
    try:
        raw: Any = json.loads(data)
        body = {key: value for key, value in raw.items() if key != "sha256"} if isinstance(raw, dict) else {}
        whole = data == _signed(body)
    except (ValueError, RecursionError):
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
        fits = parts.keys() == format_of(manifest).digested_parts(manifest) and files.keys() == planned.keys()
        fits = fits and all(file.size in planned[name] for name, file in files.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise CorruptionError(f"{path} does not record the files of unit {unit}", expected=f"{len(planned)}", fix=fix)
    return Commit(unit, files, skipped, parts)
