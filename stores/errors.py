"""Every error that `vla` raises on purpose, in one hierarchy.

A message is one line: what was found, what was expected, and what to type. Each class carries the exit code
that the command line returns for it, and is also the builtin exception a library user would catch.
"""

from __future__ import annotations


def missing_extra(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml, such as "remote".

    No project of this name is on the package index, so the command names the checkout or the wheel.
    """
    return f"pip install '.[{extra}]' in the checkout, or pip install 'WHEEL[{extra}]' with the wheel's path"


class VlaError(Exception):
    """Base of all errors raised on purpose.

    `found` says what is wrong and names the file or the field; `expected` what should have been there;
    `fix` the command, flag or value that mends it.
    """

    exit_code = 3

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found.rstrip(".")]
        if expected:
            parts.append(f"expected {expected.rstrip('.')}")
        message = "; ".join(parts)
        super().__init__(f"{message}. Try: {fix}" if fix else message)


class CheckFailedError(VlaError):
    """A check that the user asked for (`vla verify`, `vla inspect`) found something. Exit code 1."""

    exit_code = 1


class UsageError(VlaError, ValueError):
    """A wrong name, flag or configuration value. Exit code 2."""

    exit_code = 2


class DataError(VlaError, ValueError):
    """Input that cannot be used as it is. Exit code 3."""


class SourceError(DataError):
    """Raw demonstrations that are missing, damaged or laid out differently from what was said."""


class PointerError(DataError):
    """A Git-LFS pointer in the place of a file: one cause for a whole checkout, so no episode can be skipped for it."""


class StoreError(DataError):
    """A store that is missing, incomplete, or not a store."""


class FingerprintError(StoreError):
    """Two fingerprints that have to be equal differ; the message names the first field that does."""


class CorruptionError(StoreError):
    """Bytes on disk differ from what was committed. Never returned as data."""


class CheckpointError(DataError):
    """A checkpoint that is missing, incomplete or does not fit."""


class MachineError(VlaError, RuntimeError):
    """The machine lacks something: weights, a package, a library, disk space, a permission. Exit code 4."""

    exit_code = 4
