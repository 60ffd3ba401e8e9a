"""Frozen configuration values: a file and `--set a.b=c` on top of defaults, unknown keys refused by name.

Precedence, lowest first: the class's defaults, what the `--config` file extends, the file itself (config_files.py),
flags of the command, `--set` in the order given.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vla.stores.config_files import merged, read_config
from vla.stores.errors import UsageError


class Settings(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error with the nearest match."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @model_validator(mode="before")
    @classmethod
    def _lay_tables_over_defaults(cls, values: Any) -> Any:
        """A table that names one key keeps the field's own default for the others, not those of the table's class."""
        if not isinstance(values, Mapping):
            return values
        laid = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Settings) and isinstance(laid.get(name), Mapping):
                laid[name] = merged(field.default.model_dump(exclude_defaults=True), laid[name])
        return laid

    @classmethod
    def build(cls, values: Mapping[str, Any], *, where: str = "the configuration") -> Self:
        """Validate `values`. Raises `UsageError` naming the first wrong key and what it should have been."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(*_explain(cls, error, where)) from None

    @classmethod
    def from_sources(cls, file: Path | None = None, overrides: Iterable[str] = (), **explicit: Any) -> Self:
        """Merge defaults, a configuration `file`, explicit keyword values that are not None, and `a.b=c` strings."""
        values: dict[str, Any] = read_config(file) if file is not None else {}
        values |= {key: value for key, value in explicit.items() if value is not None}
        for text in overrides:
            set_dotted(values, text)
        return cls.build(values, where=str(file) if file is not None else "--set")


def set_dotted(values: dict[str, Any], text: str) -> None:
    """Apply one `a.b=c` to nested `values` in place; `c` is read as JSON where it parses, as a string where not."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r} has no '='", expected="key=value, such as --set train.lr=3e-4")
    try:
        value = json.loads(raw)
    except (json.JSONDecodeError, RecursionError):
        value = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {text!r}: {parent!r} is a value", expected="a table")
    values[leaf] = value


def read_pairs(texts: Iterable[str] | None) -> dict[str, str] | None:
    """Return what `--map` was given as {ours: theirs}; None for nothing. Raises `UsageError` for another form."""
    pairs = {}
    for text in texts or ():
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise UsageError(f"--map {text!r}", expected="OURS=THEIRS, such as --map action=actions")
        pairs[ours] = theirs
    return pairs or None


def read_model_settings(texts: Iterable[str] | None) -> dict[str, Any]:
    """Return what `--set model.KEY=VALUE` gives a head that is trained already. Raises `UsageError` for other keys."""
    values: dict[str, Any] = {"model": {}}
    for text in texts or ():
        set_dotted(values, text)
    others = values.keys() - {"model"}
    if others:
        raise UsageError(f"--set {min(others)} of a trained head", expected="model.KEY=VALUE")
    return dict(values["model"])


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest known word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def _explain(cls: type[BaseModel], error: ValidationError, where: str) -> tuple[str]:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return (f"{where}: {key} = {first['input']!r}: {first['msg']}",)
    model: type[BaseModel] = cls
    for part in first["loc"][:-1]:
        field = model.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    known = sorted(model.model_fields)
    hint = nearest(str(first["loc"][-1]), known) or f" (known: {', '.join(known)})"
    return (f"{where}: unknown key {key!r}{hint}",)
