"""The `data.txt` of older hierarchical recordings: a line a frame, with action and state in brackets.

Frame_0: … action:[0.1, -0.2, 1.0] … lrstate:[0.3 0.4 0.5] …
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.episode_checks import SKIP, require_finite
from vla.featurize.sources.files import size_of
from vla.stores.errors import SourceError

MAX_BYTES = 256 << 20
"""An hour of 100 frames a second with 700 characters a line."""

_LINE = re.compile(r"\s*Frame_(\d{1,9})\s*:")
_ACTION = re.compile(r"(?<![A-Za-z_])action\s*:\s*\[([^\[\]]*)\]")
_STATE = re.compile(r"(?<![A-Za-z_])lrstate\s*:\s*\[([^\[\]]*)\]")


def read_data_txt(file: Path) -> dict[str, NDArray[np.float32]]:
    """Return {"action": [T, A], "state": [T, S]} float32; without any `lrstate`, no state.

    Raises `SourceError` naming file and line where a frame is missing, doubled, without action, or of another width.
    """
    size_of(file, MAX_BYTES, "lines Frame_n: …")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {file}: {error}", expected="lines Frame_n: …", fix=SKIP) from None
    rows: dict[str, list[list[float]]] = {"action": [], "state": []}
    first = 0
    for number, line in enumerate(lines, 1):
        frame = _LINE.match(line)
        if frame is None:
            if line.strip():
                raise SourceError(f"{file}, line {number}: {line.strip()[:40]!r}", expected="Frame_n: …", fix=SKIP)
            continue
        seen = len(rows["action"])
        first = int(frame[1]) if not seen else first
        if int(frame[1]) != first + seen:
            raise SourceError(f"{file}, line {number}: Frame_{frame[1]}", expected=f"Frame_{first + seen}", fix=SKIP)
        for name, pattern in {"action": _ACTION, "state": _STATE}.items():
            match = pattern.search(line)
            if match is not None:
                rows[name].append(_numbers(match[1], f"{file}, line {number}, {name}"))
            if len(rows[name]) != seen + 1 and (name == "action" or rows["state"]):
                raise SourceError(f"{file}, line {number}: no {name}:[…] (lrstate is the state)", fix=SKIP)
    if not rows["action"]:
        raise SourceError(f"{file} has no frames", expected="lines Frame_n: … action:[…]", fix=SKIP)
    return {name: _matrix(values, f"{file}, {name}") for name, values in rows.items() if values}


def _numbers(text: str, where: str) -> list[float]:
    """Parse numbers between commas or spaces, as Python lists and numpy arrays print them."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise SourceError(f"{where}: [{text[:40]}]", expected="numbers", fix=SKIP) from None


def _matrix(rows: list[list[float]], where: str) -> NDArray[np.float32]:
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        found = " and ".join(map(str, sorted(widths)))
        raise SourceError(f"{where}: lists of {found} numbers", expected="one length, at least 1", fix=SKIP)
    with np.errstate(over="ignore"):
        values = np.asarray(rows, np.float64).astype(np.float32)
    require_finite(values, where)
    return values
