"""What every field of a configuration means, read from the docstrings of its classes: there is no second text.

A docstring names fields in backticks. "`width`, `layers`: its size." documents both; so does any sentence that names a
field ("`sample_steps` of it."). A field with a string below it (an attribute docstring) is documented by that.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from vla.stores.settings import Settings

_NAMES = r"`\w+`(?:(?:,| and|, and| or) `\w+`)*"
_GROUP = re.compile(rf"(?:(?<=^)|(?<=[.;:] )|(?<=\n)|(?<=\)\. ))({_NAMES})(?: \([^)]*\))?:\s")


@dataclass(frozen=True)
class FieldDoc:
    """One field: its dotted `name`, its type, default and meaning as text. `text` is empty where no docstring has it.

    `owner` is the class that documents it.
    """

    name: str
    type: str
    default: str
    text: str
    owner: str

    def to_json(self) -> dict[str, str]:
        """Return the field as JSON-able values."""
        return {"name": self.name, "type": self.type, "default": self.default, "text": self.text}


def describe_fields(
    cls: type[BaseModel], prefix: str = "", defaults: Mapping[str, Any] | None = None
) -> Iterator[FieldDoc]:
    """Yield every field of a configuration, those of nested ones in their place, as `prefix.field`.

    `defaults`: values that stand for the class's own defaults, by field.
    """
    for name, field in cls.model_fields.items():
        default = (defaults or {}).get(name, field.get_default(call_default_factory=True))
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            given = default.model_dump() if isinstance(default, Settings) else default
            yield from describe_fields(inner, f"{prefix}{name}.", given if isinstance(given, Mapping) else None)
            continue
        owner, text = _documented(cls, name)
        required = field.is_required() and name not in (defaults or {})
        shown = "(has to be given)" if required else _as_written(default)
        yield FieldDoc(f"{prefix}{name}", _type_text(field.annotation), shown, text, owner)


def _documented(cls: type[BaseModel], name: str) -> tuple[str, str]:
    """Return the class, from `cls` upwards, whose docstring says what a field is, and what it says."""
    owners = [owner for owner in cls.__mro__ if issubclass(owner, Settings) and owner is not Settings]
    docs = {owner: re.sub(r"\s+", " ", owner.__dict__.get("__doc__") or "").strip() for owner in owners}
    for owner, doc in docs.items():
        text = _attribute_texts(owner).get(name) or _entry(doc, name)
        if text:
            return owner.__name__, text
    for owner, doc in docs.items():
        text = next((part.strip() for part in re.split(r"(?<=[.;])\s+", doc) if f"`{name}`" in part), "")
        if text:
            return owner.__name__, text
    return cls.__name__, ""


def _entry(flat: str, name: str) -> str:
    """Return a docstring's own entry of a field, or nothing."""
    groups = list(_GROUP.finditer(flat))
    for at, group in enumerate(groups):
        if f"`{name}`" in group[1]:
            end = groups[at + 1].start() if at + 1 < len(groups) else len(flat)
            # With the names where there are several: "`lo` and `hi`: its range" says which is which.
            start = group.start(1) if group[1].count("`") > 2 else group.end()
            return flat[start:end].strip()
    return ""


def _attribute_texts(owner: type) -> dict[str, str]:
    """Return the strings that stand below fields in a class's source."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError):  # no source: made at run time
        return {}
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if said and isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[statement.target.id] = re.sub(r"\s+", " ", str(below.value.value)).strip()
    return texts


def _type_text(annotation: Any) -> str:
    """Write a type as a person would, without the bounds that pydantic checks."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin is typing.Literal:
        return " | ".join(_as_written(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is not None:
        return f"{_type_text(origin)}[{', '.join(_type_text(argument) for argument in arguments)}]"
    if annotation in (type(None), Ellipsis):
        return "null" if annotation is type(None) else "..."
    return getattr(annotation, "__name__", str(annotation))


def _as_written(value: Any) -> str:
    """Return a default as `--set` takes it."""
    if isinstance(value, str):
        return value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_as_written(item) for item in value) + "]"
    return str(value)
