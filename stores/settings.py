"""Frozen configuration values: a file and `--set a.b=c` on top of defaults, unknown keys refused by name.

Precedence, lowest first: the class's defaults, what the `--config` file extends, the file itself (config_files.py),
flags of the command, `--set` in the order given.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vla.stores.config_files import MAX_TEXT_BYTES, merged, read_config, require_sane
from vla.stores.documents import MAX_DEPTH
from vla.stores.errors import UsageError

SAVED = ("run.json", "zarr.json")
"""In which file a run, or a store, keeps the settings that it was made with."""


class Settings(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error with the nearest match."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @model_validator(mode="before")
    @classmethod
    def _lay_tables_over_defaults(cls, values: Any) -> Any:
        """A table that names one key keeps the field's own default for the others, not those of the table's class; a
        bare value of a list is its one element."""
        if not isinstance(values, Mapping):
            return values
        laid = dict(values)
        for name, field in cls.model_fields.items():
            given = laid.get(name)
            if isinstance(given, (str, int, float)) and not isinstance(given, bool) and _is_list(field.annotation):
                laid[name] = [given]  # `train.trackers=tensorboard`: one element alone
            # A default is written null: an empty text would be read as absent in one place and as a name in another.
            if laid.get(name) == "" and field.default is None:
                raise ValueError(f'{name} = "": an empty text; expected a value, or null for the default')
            if isinstance(field.default, Settings) and isinstance(laid.get(name), Mapping):
                laid[name] = merged(field.default.model_dump(exclude_defaults=True), laid[name])
        return laid

    @classmethod
    def build(cls, values: Mapping[str, Any], *, where: str = "the configuration", under: str = "") -> Self:
        """Validate `values`. Raises `UsageError` naming the first wrong key and what it should have been.

        `under`: what stands before these keys where a user types them, such as "model.".
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explained(cls, error, where, under) from None

    @classmethod
    def from_saved(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """Return the settings in what a run or a store has saved of itself in `file`; other values as they are."""
        return values

    @classmethod
    def require_given(cls, saved: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
        """Raise `UsageError` where `saved`, from the `file` of a run or store, chooses code, a path or an address.

        The folder of a run may come from anybody. `given`: the nested settings that the user typed, which count.
        """

    @classmethod
    def from_sources(cls, file: Path | str | None = None, overrides: Iterable[str] = (), **explicit: Any) -> Self:
        """Merge defaults, a configuration `file`, explicit keyword values that are not None, and `a.b=c` strings.

        `file` may also be what a run or a store has saved of itself, or their folder.
        """
        saved: list[tuple[dict[str, Any], Path]] = []

        def convert(content: dict[str, Any], part: Path) -> dict[str, Any]:
            settings = cls.from_saved(content, part)
            if settings is not content:
                saved.append((copy.deepcopy(settings), part))
            return settings

        written = {} if file is None else read_config(_saved_file(file), convert)
        typed = {key: value for key, value in explicit.items() if value is not None}
        values, given = copy.deepcopy(written) | typed, copy.deepcopy(typed)
        for text in overrides:
            set_dotted(values, text)
            set_dotted(given, text)
        for settings, part in saved:
            cls.require_given(settings, given, part)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            if file is None or not _holds(written, _first(error)):
                raise _explained(cls, error, "settings") from None
            file = _saved_file(file)
            if file.name in SAVED and _first(error)["type"] == "extra_forbidden":
                found = f"{file} was saved by another command, or another version: {_first(error)['loc'][-1]!r}"
                raise UsageError(found, expected=f"settings such as {', '.join(sorted(cls.model_fields))}") from None
            raise _explained(cls, error, str(file)) from None

    @classmethod
    def read_file(cls, file: Path | str) -> dict[str, Any]:
        """Return the settings of a configuration file, or of a saved run or store. Raises `UsageError`."""
        return read_config(_saved_file(file), cls.from_saved)


def _saved_file(place: Path | str) -> Path:
    """Return the file of the settings in the folder of a run or of a store; another path as it is."""
    place = Path(place)
    files = [place / name for name in SAVED] if place.is_dir() else []
    return next((file for file in files if file.is_file()), place)


def begun_in(folder: Path | None, name: str, *, required: bool) -> Path | None:
    """Return the file `name` (one of `SAVED`) of the run or store that --resume goes on with in `folder`.

    Returns None where there is none, or with `required` raises `UsageError` naming one in a folder below or above.
    """
    file = None if folder is None else folder / name
    if file is not None and file.is_file():
        return file
    if not required:
        return None
    if folder is None:
        raise UsageError("--resume without --out", expected="what to go on with", fix="--resume --out DIR")
    near = [found.parent for found in sorted(folder.glob(f"*/{name}"))[:1]]
    near += [folder.parent] if folder.name == name else []
    fix = f"--resume --out {near[0]}" if near else ""
    raise UsageError(f"{folder} has nothing to go on with", expected=f"a folder with {name}", fix=fix)


def set_dotted(values: dict[str, Any], text: str) -> None:
    """Apply one `a.b=c` to nested `values` in place; `c` is read as JSON where it parses, as a string where not."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text[:60]!r} has no '='", expected="key=value, such as --set train.lr=3e-4")
    if len(text) > MAX_TEXT_BYTES or key.count(".") >= MAX_DEPTH:
        raise UsageError(f"--set {text[:60]!r}…", expected=f"up to {MAX_TEXT_BYTES} characters, {MAX_DEPTH} keys deep")
    value = parse_value(raw)
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {text!r}: {parent!r} is a value", expected="a table")
    values[leaf] = value


def parse_value(raw: str) -> Any:
    """Return what a user typed as JSON where it parses, as a string where not.

    Raises `UsageError` for JSON beyond the limits of `require_sane`.
    """
    try:
        value = json.loads(raw)
        require_sane(value)
    except json.JSONDecodeError:
        return raw
    except (ValueError, RecursionError) as error:  # thousands of digits or levels
        raise UsageError(f"the value {raw[:40]}…: {error}", expected="a value within limits") from None
    return value


def read_pairs(texts: Iterable[str] | None) -> dict[str, str] | None:
    """Return what `--map` was given as {ours: theirs}; None for nothing. Raises `UsageError` for another form."""
    pairs = {}
    for text in texts or ():
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise UsageError(f"--map {text!r}", expected="OURS=THEIRS, such as --map action=actions")
        pairs[ours] = theirs
    return pairs or None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest known word or another name of the same, or an empty string."""
    by_name = {name.casefold(): name for name in known}
    said = word.casefold()
    same = [by_name[name] for names in SAME for name in names if said in names and name in by_name]
    match = same or [by_name[name] for name in difflib.get_close_matches(said, list(by_name), n=1)]
    return f", did you mean {match[0]!r}?" if match else ""


SAME = (
    ("float16", "fp16", "f16", "half"),
    ("bfloat16", "bf16"),
    ("float32", "fp32", "f32", "float", "single", "full", "no"),
    ("int8", "i8"),
    ("h5", "hdf5"),
    ("zstd", "zstandard"),
    ("none", "off", "false"),
)
"""Names of one thing, in other people's software and in ours; `train.precision=no` is float32."""


def _is_list(annotation: Any) -> bool:
    """Return whether a field takes lists of any length, and no other value (but None)."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) in (Union, UnionType):
        return all(_is_list(kind) for kind in kinds)
    return get_origin(annotation) is list or (get_origin(annotation) is tuple and kinds[-1:] == [...])


def _holds(values: Any, wrong: Mapping[str, Any]) -> bool:
    """Return whether what pydantic found wrong stands in nested `values`, so that their file is where to mend it."""
    for part in wrong["loc"]:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return bool(values == wrong["input"])


def _explained(cls: type[BaseModel], error: ValidationError, where: str, under: str = "") -> UsageError:
    """Return the first thing that pydantic found wrong as one line."""
    first = _first(error)
    loc = [str(part) for part in first["loc"]]
    key = ".".join(loc)
    if first["type"] == "missing":
        table = _model_at(cls, loc[:-1])
        if loc[-1] not in table.model_fields:  # inside a list or a table of tables, which no flag gives
            return UsageError(f"{where}: {key} is not given")
        name, flag = _required(table, loc[-1])
        name = under + ".".join([*loc[:-1], name])
        return UsageError(f"{name} is not given", fix=flag or f"--set {name}=VALUE")
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" and isinstance(first["input"], (Mapping, BaseModel)):
            # What a whole table contradicts itself in: the message names the keys, and the table would hide it.
            return UsageError(": ".join(part for part in (where, key, message) if part))
        hint = nearest(str(first["input"]), _choices(first)) if first["type"] == "literal_error" else ""
        return UsageError(f"{where}: {key} = {first['input']!r}: {message}{hint}")
    known = sorted(_model_at(cls, loc[:-1]).model_fields)
    hint = nearest(loc[-1], known) or f" (known: {', '.join(known)})"
    return UsageError(f"{where}: unknown key {key!r}{hint}")


def _first(error: ValidationError) -> Any:
    """Return what to mend first: an unknown key, for a file that belongs to something else lacks keys as well."""
    return min(error.errors(), key=lambda wrong: (wrong["type"] != "extra_forbidden", len(wrong["loc"])))


def _choices(wrong: Mapping[str, Any]) -> list[str]:
    """Return the values that pydantic would have taken: it names them as "'a', 'b' or 'c'"."""
    return re.findall(r"'([^']*)'", wrong["ctx"]["expected"])


def _model_at(cls: type[BaseModel], loc: Sequence[str]) -> type[BaseModel]:
    """Return the configuration that the keys of `loc` lead to from `cls`."""
    for part in loc:
        field = cls.model_fields.get(part)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            cls = field.annotation
    return cls


def _required(cls: type[BaseModel], name: str) -> tuple[str, str]:
    """Return the first value that is needed in the field `name`, dotted, and the flag that the field says gives it."""
    field = cls.model_fields[name]
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        for inner, one in field.annotation.model_fields.items():
            if one.is_required():
                rest, flag = _required(field.annotation, inner)
                return f"{name}.{rest}", flag
    extra = field.json_schema_extra
    return name, str(extra.get("flag", "")) if isinstance(extra, dict) else ""
