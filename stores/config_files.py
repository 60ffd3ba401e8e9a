"""Configuration files: TOML, JSON or YAML, one extending another.

`extends = "base.toml"` at the top of a file names the file that it is laid over, relative to its own folder; tables are
merged key by key, everything else is replaced. Chains may be of any length and of mixed kinds; cycles are refused. (In
YAML an anchor of one file is unknown in another, so that `<<: *default` cannot do this.)
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla.stores.errors import UsageError

EXTENDS = "extends"


Convert = Callable[[dict[str, Any], Path], dict[str, Any]]
"""Returns the settings in the content of a file."""


def read_config(file: Path, convert: Convert = lambda values, file: values) -> dict[str, Any]:
    """Read a file with everything that it extends into a plain dict. Raises `UsageError` where that cannot be done.

    `convert` is applied to each file alone, so that a file may extend what a run has saved.
    """
    return _read(file, (), convert)


def _read(file: Path, within: tuple[Path, ...], convert: Convert) -> dict[str, Any]:
    chain = (*within, file.resolve())
    if file.resolve() in within:
        found = " extends ".join(path.name for path in chain)
        raise UsageError(f"{file} extends itself: {found}", expected="a chain of files that ends")
    values = convert(_parse(file), file)
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str) or not base:
        raise UsageError(f"{file}: {EXTENDS} = {base!r}", expected='the name of one file, such as "base.toml"')
    return merged(_read(file.parent / base, chain, convert), values)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested table over another: tables are merged, other values replaced."""
    result = dict(base)
    for key, value in over.items():
        there = result.get(key)
        result[key] = merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return result


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UsageError(f"cannot read {file}: {reason}", expected="a TOML, JSON or YAML file") from None
    try:
        values = _values(text, file.suffix)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")
        expected = "TOML (or JSON in a .json file, YAML in a .yaml file)"
        raise UsageError(f"{file} does not parse: {reason}", expected=expected) from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds a {type(values).__name__}", expected="a table of keys")
    return values


def _values(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix not in (".yaml", ".yml"):
        return tomllib.loads(text)
    import yaml  # a tenth of the time that `vla --help` takes, for those who write YAML

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
