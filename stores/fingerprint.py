"""What a store's features depend on, as one canonical value: equal fingerprints mean equal features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from vla.stores.errors import FingerprintError


def canonical(value: Any) -> bytes:
    """Encode a JSON-able value in one way only: sorted keys, no blanks, ASCII. Raises `ValueError` on NaN.

    ASCII, because file names that are no UTF-8 become lone surrogates, which UTF-8 cannot encode.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical form of a JSON-able value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_array(values: NDArray[Any]) -> str:
    """SHA-256 (hex) of an array's values in C order, little-endian."""
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()


def differences(found: Any, wanted: Any, prefix: str = "") -> list[str]:
    """List the fields in which two JSON-able values differ, as `a.b: <found>, wanted <wanted>`."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in sorted(found.keys() | wanted.keys()):
            path = f"{prefix}.{key}" if prefix else str(key)
            lines += differences(found.get(key, "<absent>"), wanted.get(key, "<absent>"), path)
        return lines
    # As text, because NaN is not equal to itself, and True is equal to 1.
    if json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True):
        return []
    return [f"{prefix}: {_short(found)} here, {_short(wanted)} wanted"]


def require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str, fix: str) -> None:
    """Raise `FingerprintError` naming the fields in which `found` differs from `wanted`."""
    lines = differences(json.loads(canonical(found)), json.loads(canonical(wanted)))
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise FingerprintError(f"{what} has another fingerprint: {'; '.join(lines[:3])}{more}", fix=fix)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
