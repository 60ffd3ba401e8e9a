"""Which column of a data set is the action, the state, a camera: by name, by `--map`, never by guess.

A data set that names its columns differently is refused with the exact `--map` that would fix it: a guess that is
wrong trains on the wrong numbers without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn

from vla.featurize.sources.base import Role, StepSpec
from vla.stores.errors import SourceError, UsageError
from vla.stores.settings import nearest

DEFAULTS = {
    "action": "action",
    "state": "observation.state",
    "timestamp": "timestamp",
    "frame_index": "frame_index",
}
"""Our name -> LeRobot's. `state` may be missing, and `frame_index`, as rows come in order; the others may not."""

OPTIONAL = ("state", "frame_index")

PRIVILEGED = "observation.environment_state"
CAMERA_PREFIX = "observation.images."

ALIASES = {
    "action": ("actions", "observation.action", "action.joint", "joint_action"),
    "state": ("state", "states", "observation.states", "observation.proprio", "proprio", "joint_state", "qpos"),
    "timestamp": ("timestamps", "time", "observation.timestamp"),
    "frame_index": ("frame_id", "step", "step_index", "frame"),
}
"""Names met in the wild. They are proposed, never taken."""

BOOKKEEPING = frozenset({"index", "episode_index", "task_index"})
"""Positions inside the data set, which the store keeps in its own tables."""

MAX_OTHER_WIDTH = 1024
"""Numbers a frame: wider columns (depth maps, point clouds) are no step of a robot and are left out."""

CHOOSE = """--set 'source_options.cameras=["NAME"]'"""

_NAME = re.compile(r"(?!\.|__|zarr\.json$)[^/\\\x00-\x1f\x7f]{1,200}(?<!\.partial)")
"""What a store takes as the name of an array (stores/manifest.py), since step names become array names."""


class Part(NamedTuple):
    """Components `start..stop-1` of a column."""

    column: str
    start: int
    stop: int


@dataclass(frozen=True)
class Column:
    """A column as the metadata describe it: `shape` excludes the frame axis, `size` of pictures is (height, width).

    `parts` is not empty where it is no column of the data but parts of such, end to end: read only if it is asked for.
    """

    kind: Literal["number", "picture", "video", "unused"]
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    privileged: bool = False
    size: tuple[int, int] | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class ColumnMap:
    """The resolved mapping: `cameras` and `steps` are {our name: their column}, `specs` describes each step column.

    `specs` always has `timestamp` and `frame_index`, also where no column holds them.
    """

    cameras: dict[str, str]
    steps: dict[str, str]
    specs: dict[str, StepSpec]

    @property
    def names(self) -> dict[str, str]:
        """All of it, {our name: their column}."""
        return {**self.steps, **self.cameras}


def resolve(
    columns: Mapping[str, Column],
    wanted: Mapping[str, str],
    cameras: Sequence[str] | None,
    *,
    where: str,
    camera_names: Mapping[str, Sequence[str]] | None = None,
    needs_time: bool = True,
) -> ColumnMap:
    """Choose columns. `wanted` is the user's {ours: theirs}, `cameras` the views to take in order (None: all, []:
    numbers alone).

    `camera_names` {their column: ours} are the data set's own names of cameras, the first of which is used unless
    `wanted` has another; `cameras` may be any of them. Without `needs_time`, rows may lack a timestamp.

    Raises `SourceError` naming `where`, the columns that are there, and the `--map` that would fix it; `UsageError`
    where `wanted` names one of ours twice.
    """
    chosen = _chosen(columns, wanted, where)
    steps = _steps(columns, chosen, where, OPTIONAL if needs_time else (*OPTIONAL, "timestamp"))
    views = _views(columns, chosen, cameras, where, camera_names or {})
    _require_usable({**steps, **views}, len(steps) + len(views), where)
    privileged = _sole_privileged(columns, steps)
    if privileged is not None:
        steps = {"privileged" if theirs == privileged else ours: theirs for ours, theirs in steps.items()}
    specs = {ours: _spec(ours, columns[theirs], where) for ours, theirs in steps.items()}
    for ours in ("timestamp", "frame_index"):
        specs.setdefault(ours, _spec(ours, Column("number", "", ()), where))
    return ColumnMap(views, steps, specs)


def our_name(name: str) -> str:
    """Return the short form of a LeRobot name: `observation.state` -> `state`, `observation.images.top` -> `top`."""
    known = {theirs: ours for ours, theirs in DEFAULTS.items()} | {PRIVILEGED: "privileged"}
    return known.get(name) or (name.removeprefix(CAMERA_PREFIX) or name)


def _chosen(columns: Mapping[str, Column], wanted: Mapping[str, str], where: str) -> dict[str, str]:
    """Return `wanted` under our short names, each column known to exist."""
    chosen: dict[str, str] = {}
    for name, theirs in wanted.items():
        ours = our_name(name)
        if ours in chosen:
            raise UsageError(f"--map names {ours!r} twice", expected="each of our names once")
        if theirs not in columns:
            close = nearest(theirs, columns)
            raise SourceError(f"--map {name}={theirs}: {where} has no {theirs!r}{close}", expected=_listing(columns))
        chosen[ours] = theirs
    return chosen


def _steps(
    columns: Mapping[str, Column], chosen: Mapping[str, str], where: str, optional: Sequence[str]
) -> dict[str, str]:
    numbers = {name for name, column in columns.items() if column.kind == "number"}
    steps: dict[str, str] = {}
    missing: dict[str, str] = {}
    for ours, default in DEFAULTS.items():
        theirs = chosen.get(ours, default)
        if theirs in numbers and not (ours == "state" and ours not in chosen and columns[theirs].privileged):
            steps[ours] = theirs
        elif ours in chosen:
            raise SourceError(
                f"--map {ours}={theirs}: in {where}, {theirs!r} holds {columns[theirs].dtype}", expected="numbers"
            )
        else:
            aliases = [alias for alias in ALIASES[ours] if alias in numbers and alias not in chosen.values()]
            # A state that is there under another name must not be dropped in silence; none at all is a fact.
            if (aliases and ours != "frame_index") or ours not in optional:
                missing[ours] = aliases[0] if aliases else _closest(ours, numbers)
    if missing:
        _refuse_missing(missing, columns, where)
    for ours, theirs in chosen.items():
        if columns[theirs].kind == "number":
            steps[ours] = theirs
    taken = set(steps.values()) | BOOKKEEPING
    others = [name for name in sorted(numbers - taken) if not columns[name].parts and _is_cheap(columns[name])]
    return steps | {name: name for name in others if name not in steps}


def _refuse_missing(missing: Mapping[str, str], columns: Mapping[str, Column], where: str) -> NoReturn:
    fix = " ".join(f"--map {ours}={theirs or 'THEIR_COLUMN'}" for ours, theirs in missing.items())
    if missing.get("timestamp") == "":
        fix += ", or --set source_options.align=index where row i saw frame i"
    absent = ", ".join(repr(DEFAULTS[ours]) for ours in missing)
    raise SourceError(f"{where} has no {absent}; it has {_listing(columns)}", expected="LeRobot's names", fix=fix)


def _views(
    columns: Mapping[str, Column],
    chosen: Mapping[str, str],
    cameras: Sequence[str] | None,
    where: str,
    names: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    pictures = [name for name, column in columns.items() if column.kind in ("picture", "video")]
    renamed = {theirs: names[theirs][0] for theirs in pictures if theirs in names}
    renamed |= {theirs: ours for ours, theirs in chosen.items() if theirs in pictures}
    known = {renamed.get(theirs, our_name(theirs)): theirs for theirs in pictures}
    if len(known) != len(pictures):
        raise SourceError(f"two cameras of {where} get one name", expected="a --map NAME=COLUMN for each")
    if cameras is not None and not cameras:
        return {}
    if not known:
        raise SourceError(f"{where} has no camera; it has {_listing(columns)}", expected="a video or image column")
    if cameras is None:
        return known
    also = {name: ours for ours, theirs in known.items() for name in (theirs, our_name(theirs), *names.get(theirs, ()))}
    views: dict[str, str] = {}
    for name in cameras:
        ours = next((ours for ours in (name, our_name(name), also.get(name)) if ours in known), None)
        if ours is None or ours in views:
            what = "no camera" if ours is None else "one camera asked for twice,"
            hint = nearest(name, known)
            raise SourceError(f"{where} has {what} {name!r}{hint}", expected=f"some of {', '.join(known)}", fix=CHOOSE)
        views[ours] = known[ours]
    return views


def _require_usable(names: Mapping[str, str], count: int, where: str) -> None:
    """Refuse names that cannot be an array's, or that are one where upper and lower case are not told apart."""
    if len(names) != count:
        raise SourceError(f"{where}: a camera and a column of numbers get one name", expected="--map NAME=COLUMN")
    folded: dict[str, str] = {}
    for ours, theirs in names.items():
        twin = folded.setdefault(ours.casefold(), theirs)
        if twin != theirs or _NAME.fullmatch(ours) is None or not ours.isprintable():
            why = f"{twin!r} and {theirs!r} differ in case only" if twin != theirs else f"{ours!r} cannot name an array"
            raise SourceError(f"{where}: {why}", expected="distinct plain names", fix=f"--map NEW_NAME={theirs!r}")


def _sole_privileged(columns: Mapping[str, Column], steps: Mapping[str, str]) -> str | None:
    """Return the column to be called `privileged`: the only one of that role, or LeRobot's environment state."""
    if "privileged" in steps:
        return None
    found = [name for ours, name in steps.items() if _role(ours, columns[name]) == "privileged" or name == PRIVILEGED]
    return PRIVILEGED if PRIVILEGED in found else found[0] if len(found) == 1 else None


def _role(ours: str, column: Column) -> Role:
    if ours in ("action", "state"):
        return "action" if ours == "action" else "state"
    return "privileged" if column.privileged or ours == "privileged" else "other"


def _spec(ours: str, column: Column, where: str) -> StepSpec:
    role = _role(ours, column)
    if ours in ("timestamp", "frame_index"):
        return StepSpec((), "float64" if ours == "timestamp" else "int64", "other")
    if role == "other":
        return StepSpec(column.shape if column.shape != (1,) else (), column.dtype, "other", column.names)
    if column.privileged and ours in ("action", "state"):
        raise SourceError(f"{where}: the column of {ours} is marked privileged", expected="what a real robot has")
    if len(column.shape) > 1 or 0 in column.shape:
        raise SourceError(f"{where}: {ours} has shape {column.shape}", expected="one axis, such as [7]")
    return StepSpec(column.shape or (1,), "float32", role, column.names)


def _is_cheap(column: Column) -> bool:
    return len(column.shape) <= 1 and 1 <= (column.shape or (1,))[0] <= MAX_OTHER_WIDTH


def _closest(word: str, names: Iterable[str]) -> str:
    hint = nearest(word, names)
    return hint.split("'")[1] if hint else ""


def _listing(columns: Mapping[str, Column]) -> str:
    return ", ".join(f"{name} ({column.dtype})" for name, column in columns.items() if name not in BOOKKEEPING)
