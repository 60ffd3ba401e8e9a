"""Configuration files: TOML, JSON or YAML, one extending another.

`extends = "base.toml"` at the top of a file names the file that it is laid over, relative to its own folder and inside
the folder of the file that the user named: a configuration from elsewhere reads nothing else of the disk. Tables are
merged key by key, everything else is replaced. Chains may be of mixed kinds; cycles are refused. (In YAML an anchor of
one file is unknown in another, so that `<<: *default` cannot do this.) Every file is a regular one within limits
(documents.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vla.stores.documents import parse_json, read_bytes, require_limits
from vla.stores.errors import UsageError

EXTENDS = "extends"
MAX_CHAIN = 16
"""Files of one chain."""
MAX_JSON_BYTES = 16 << 20
"""A run's own run.json lists every instruction of its stores."""
MAX_TEXT_BYTES = 256 << 10
"""Of TOML and YAML, which people write: their parsers take seconds for a megabyte."""
MAX_DOTS = 1000
"""In one line of TOML: a key of n parts costs the parser n squared."""
INTEGERS = range(-(2**63), 2**64)
"""Whole numbers of a setting: what a seed or a size may be. Others overflow wherever they are used."""


Convert = Callable[[dict[str, Any], Path], dict[str, Any]]
"""Returns the settings in the content of a file."""


def read_config(file: Path | str, convert: Convert = lambda values, file: values) -> dict[str, Any]:
    """Read a file with everything that it extends into a plain dict. Raises `UsageError` where that cannot be done.

    `convert` is applied to each file alone, so that a file may extend what a run has saved.
    """
    return _read(Path(file), (), Path(file).parent.resolve(), convert)


def require_sane(value: Any) -> None:
    """Raise `ValueError` for a value beyond the limits of documents.py, or with a whole number beyond 64 bits."""
    require_limits(value)
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, int) and item not in INTEGERS:
            raise ValueError("a whole number beyond 64 bits")


def _read(file: Path, within: tuple[Path, ...], folder: Path, convert: Convert) -> dict[str, Any]:
    chain = (*within, file.resolve())
    if file.resolve() in within:
        found = " extends ".join(path.name for path in chain)
        raise UsageError(f"{file} extends itself: {found}", expected="a chain of files that ends")
    if len(chain) > MAX_CHAIN:
        raise UsageError(f"{chain[0]} extends more than {MAX_CHAIN} files", expected="a shorter chain")
    values = convert(_parse(file), file)
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str) or not base or "\0" in base:
        raise UsageError(f"{file}: {EXTENDS} = {base!r}", expected='the name of one file, such as "base.toml"')
    if not (file.parent / base).resolve().is_relative_to(folder):
        raise UsageError(f"{file}: {EXTENDS} = {base!r}", expected=f"a file in {folder}, without links out of it")
    return merged(_read(file.parent / base, chain, folder, convert), values)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested table over another: tables are merged, other values replaced."""
    result = dict(base)
    for key, value in over.items():
        there = result.get(key)
        result[key] = merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return result


def _parse(file: Path) -> dict[str, Any]:
    try:
        data = read_bytes(file, MAX_JSON_BYTES if file.suffix == ".json" else MAX_TEXT_BYTES)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UsageError(f"cannot read {file}: {reason}", expected="a TOML, JSON or YAML file") from None
    try:
        values = _values(text, file.suffix)
        require_sane(values)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")
        expected = "TOML (or JSON in a .json file, YAML in a .yaml file)"
        raise UsageError(f"{file} does not parse: {reason}", expected=expected) from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds a {type(values).__name__}", expected="a table of keys")
    return values


def _values(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return parse_json(text)
    if suffix not in (".yaml", ".yml"):
        if max(line.count(".") for line in text.split("\n")) > MAX_DOTS:
            raise ValueError(f"a line of more than {MAX_DOTS} dots")
        return tomllib.loads(text)
    import yaml  # a tenth of the time that `vla --help` takes, for those who write YAML

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        require_limits(node, _parts)  # before it is built: `<<: [*a, *a]` multiplies while it is merged
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    finally:
        loader.dispose()


def _parts(node: Any) -> Iterable[Any]:
    """Return what a node of YAML holds: items of a list, keys and values of a table."""
    held = node.value if node is not None and not isinstance(node.value, str) else ()
    return [part for item in held for part in (item if isinstance(item, tuple) else (item,))]
