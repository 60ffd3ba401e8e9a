"""Prints `NAME==VERSION` for each minimum that pyproject.toml declares: what `make floors` installs and runs."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("bench", "dist", "lora", "remote", "sim")
"""All but `dev`, which is what runs the tests."""


def floors(pyproject: Path) -> list[str]:
    """Return the requirements of the project and of `EXTRAS`, each pinned to its minimum; extras of packages stay.

    Raises `ValueError` for a requirement that declares none.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = []
    for requirement in (*project["dependencies"], *(one for extra in EXTRAS for one in extras[extra])):
        match = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+)(?:,<[\w.]+)?", requirement.replace(" ", ""))
        if match is None:
            raise ValueError(f"{requirement!r} in {pyproject} declares no minimum")
        pins.append(f"{match[1]}=={match[2]}")
    return sorted(set(pins))


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors(Path(sys.argv[1]))) + "\n")
