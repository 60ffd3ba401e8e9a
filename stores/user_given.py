"""Settings that choose code, a file, a folder or an address: an artefact records them, and the user alone gives them.

A store and a checkpoint may come from anybody. Whatever their recipe says, `resolve` passes only harmless values on: a
setting's own default, or a value such as "random" that names nothing outside. For any other value the user repeats the
setting at the moment of use; the recorded value serves to write the message. Each setting declares its kind with
`Annotated[…, UserGiven()]`, and a test compares the declarations with the types of all registered backbones and heads.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vla.stores.errors import UsageError
from vla.stores.settings import nearest


@dataclass(frozen=True)
class UserGiven:
    """Marks a setting that chooses code, a file, a folder or an address.

    `harmless`: values beside the default that choose none of these. `training_only`: a trained head never reads the
    setting again, so that loading the head needs no value.
    """

    harmless: tuple[str, ...] = ()
    training_only: bool = False


@dataclass(frozen=True)
class PlainText:
    """Marks a setting of type text that reaches neither the file system, an import nor a network."""


WEIGHTS = UserGiven(harmless=("random",))
"""Of weights: a file, a folder, a hub id, or "random" for seeded random weights."""


def resolve(
    settings: type[BaseModel], recorded: Mapping[str, Any], given: Mapping[str, Any], *, artefact: str, prefix: str
) -> dict[str, Any]:
    """Return the `recorded` values of an artefact with each user-given setting replaced by the user's value.

    `given`: nested values of the user, of `UserGiven` settings alone. `prefix`: what precedes their keys after `--set`.
    Raises `UsageError` where `artefact` records a value that the user has to give, with the complete flags, and where
    the user gives a setting that is not of this kind.
    """
    values, chosen, lacking = dict(recorded), dict(given), []
    for name, field in settings.model_fields.items():
        mark, nested = _mark(field), _nested(field)
        if mark is not None and name in chosen:
            values[name] = chosen.pop(name)
        elif mark is not None and not _is_harmless(values, name, field, mark):
            lacking.append((prefix + name, values[name]))
        elif nested is not None and isinstance(values.get(name, {}), Mapping):
            inner = chosen.pop(name, {})
            if not isinstance(inner, Mapping):
                raise UsageError(f"--set {prefix}{name}={inner!r}", expected="a table")
            if name in values or inner:
                key = f"{prefix}{name}."
                values[name] = resolve(nested, values.get(name, {}), inner, artefact=artefact, prefix=key)
    if chosen:
        name, known = min(chosen), list(user_given(settings))
        hint = nearest(name, known)
        raise UsageError(
            f"{prefix}{name} is not for the user to give: {artefact} decides it{hint}",
            expected=f"one of {', '.join(known) or 'none'}",
        )
    if lacking:
        shown = ", ".join(f"{key} = {value!r}" for key, value in lacking)
        raise UsageError(
            f"{artefact} names {shown}, and no artefact chooses code, files or addresses",
            expected="your own value",
            fix=" ".join(set_flag(key, value) for key, value in lacking),
        )
    return values


def user_given(settings: type[BaseModel]) -> Iterator[str]:
    """Yield the dotted names of the settings of a class that the user gives at every use, nested ones included."""
    for name, field in settings.model_fields.items():
        if _mark(field) is not None:
            yield name
        elif (nested := _nested(field)) is not None:
            yield from (f"{name}.{inner}" for inner in user_given(nested))


def require_given(
    settings: type[BaseModel], recorded: Mapping[str, Any], given: Mapping[str, Any], *, artefact: str, prefix: str
) -> None:
    """Raise what `resolve` raises where `recorded`, of a saved run or store, holds what the user has not given again.

    `given` may hold other settings too: of a replayed run, the user may change everything.
    """
    resolve(settings, recorded, _chosen(settings, given), artefact=artefact, prefix=prefix)


def _chosen(settings: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of nested `given` is user-given."""
    chosen: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        nested = _nested(field)
        if name in given and _mark(field) is not None:
            chosen[name] = given[name]
        elif nested is not None and isinstance(given.get(name), Mapping):
            chosen[name] = _chosen(nested, given[name])
    return chosen


def set_flag(key: str, value: object) -> str:
    """Return the `--set` that gives `value`, quoted for a shell: a value of an artefact may hold `; rm -r ~`."""
    plain = isinstance(value, str) and value.isprintable() and not _is_json(value)
    return f"--set {shlex.quote(f'{key}={value if plain else json.dumps(value)}')}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_harmless(values: Mapping[str, Any], name: str, field: FieldInfo, mark: UserGiven) -> bool:
    if name not in values:
        return True
    default = field.get_default(call_default_factory=False)
    return any(type(values[name]) is type(allowed) and values[name] == allowed for allowed in (default, *mark.harmless))


def _mark(field: FieldInfo) -> UserGiven | None:
    """Return the mark of a setting that the user gives at every use."""
    return next((mark for mark in field.metadata if isinstance(mark, UserGiven) and not mark.training_only), None)


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a table, also of an optional one."""
    parts = (field.annotation, *get_args(field.annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
