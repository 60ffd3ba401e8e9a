"""The sources by name, and which one a folder is. A new source is one file and one line in `SOURCES`."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from vla.featurize.options import checked_options, keywords, options_model
from vla.featurize.sources.base import Source
from vla.stores.errors import SourceError, UsageError
from vla.stores.owned import refuse_overlap
from vla.stores.settings import nearest, parse_value
from vla.stores.user_given import resolve


class Entry(NamedTuple):
    """`target` is "module:Class", imported when used; `markers` globs below the folder (or, with `file`, the file's
    name) of which any tells a data set of this kind; `layout` says in words what is recognised."""

    target: str
    markers: tuple[str, ...]
    layout: str
    file: bool = False


SOURCES: dict[str, Entry] = {
    "lerobot": Entry("vla.featurize.sources.lerobot:LeRobotSource", ("meta/info.json",), "LeRobot v3.0, v2.1 or v2.0"),
    "store": Entry("vla.featurize.sources.cached:StoreSource", ("commits/writer.lock",), "a store of cached features"),
    "trackvla": Entry(
        "vla.featurize.sources.trackvla:TrackVLASource",
        (
            "jsonl/seed_*/*/*.jsonl",
            *(
                f"{above}seed_*/*/{name}"
                for above in ("", "*/", "sim_data/*/")
                for name in ("*_info.json", "*/info.json")
            ),
        ),
        "OpenTrackVLA, raw or prepared",
    ),
    "hierarchical": Entry(
        "vla.featurize.sources.hierarchical:HierarchicalSource",
        ("stage*/run*/actions.npy", "*/*/run*/actions.npy", "stage*/run*/data.txt", "*/*/run*/data.txt"),
        "runs of subtasks or stages",
    ),
    "robotwin": Entry(
        "vla.featurize.sources.robotwin:RoboTwinSource",
        tuple(
            f"{above}{below}"
            for above in ("", "*/", "*/*/")
            for below in ("data/episode*.hdf5", "_traj_data/episode*.pkl")
        ),
        "RoboTwin HDF5 or planner paths of one task, or folders of them",
    ),
    "replay-buffer": Entry(
        "vla.featurize.sources.replay_buffer:ReplayBufferSource",
        ("meta/episode_ends/.zarray", "meta/episode_ends/zarr.json"),
        "Diffusion Policy's ReplayBuffer, zarr v2 or v3",
    ),
    "robomimic": Entry(
        "vla.featurize.sources.robomimic:RobomimicSource", ("*.hdf5", "*.h5"), "robomimic or LIBERO HDF5", file=True
    ),
    "folders": Entry("vla.featurize.sources.folders:FoldersSource", ("*/actions.npy",), "pictures and npy"),
    "synthetic": Entry("vla.featurize.sources.synthetic:SyntheticSource", (), "made up in memory"),
}
"""The first kind whose marker is there takes the data set; `KIND:PATH` chooses one by name. A class takes the path
first, if it has one, and its options as keywords, each with a default."""


def open_source(spec: str | Path, /, **options: Any) -> Source:
    """Open demonstrations: a path, `KIND:PATH`, `synthetic`, or `synthetic:episodes=8,seed=1`; nothing is read yet.

    `options` go to the source: `map` {our name: their column}, `cameras`, `skip_bad` for LeRobot. None alone counts as
    not given: an empty list is a value (`cameras=[]`: numbers without pictures). Raises `SourceError` for a path that
    is missing or of no known layout, naming what it holds; `UsageError` for options that the source does not have, or
    of another type than it declares.
    """
    kind, place, written = _parse(spec)
    given = {key: value for key, value in options.items() if value is not None}
    source = _class_of(kind)
    return cast(Source, source(*place, **checked_options(source, written | given, f"{kind} source")))


def common_options(
    *, map: Mapping[str, str] | None = None, skip_bad: bool = False, pad_actions: bool = False
) -> dict[str, Any]:
    """Return those settings of every command that change something: a source without the option refuses it then."""
    given = {"map": map, "skip_bad": skip_bad, "pad_actions": pad_actions}
    return {key: value for key, value in given.items() if value}


def known_rate(spec: str | Path, fps: float) -> dict[str, float]:
    """Return the option `fps` for a source that has it: a store's rate opens the demonstrations that it was made of."""
    return {"fps": fps} if "fps" in option_names(spec) else {}


def shipped() -> Path:
    """Return the data set that ships with a checkout and with the wheel. Raises `UsageError` where there is none."""
    path = Path(__file__).parents[2] / "examples" / "push"
    if not path.is_dir():
        raise UsageError("no --source given", expected="a folder of demonstrations", fix="--source DIR")
    return path


def refuse_overwriting_source(root: Path | str, spec: str | Path, source: Source) -> None:
    """Raise `UsageError` where the store at `root` overlaps with what `source`, opened from `spec`, reads."""
    refuse_overlap(root, [*source.index().stores, *_parse(spec)[1]])


def resolve_options(
    spec: str | Path, recorded: Mapping[str, Any], given: Mapping[str, Any], *, artefact: str, prefix: str
) -> dict[str, Any]:
    """Return the options of a source that an artefact records, those that reach the disk as the user gives them.

    Raises what `vla.stores.user_given.resolve` raises.
    """
    return resolve(options_model(_class_of(_parse(spec)[0])), recorded, given, artefact=artefact, prefix=prefix)


def option_names(spec: str | Path) -> list[str]:
    """Return the names of the options that the source of `spec` takes. Raises as `open_source` does."""
    return keywords(_class_of(_parse(spec)[0]))


def _parse(spec: str | Path) -> tuple[str, tuple[Path, ...], dict[str, Any]]:
    """Return the kind, the place if it has one, and the options written in `spec`."""
    kind, colon, text = str(spec).partition(":")
    if isinstance(spec, str) and kind in SOURCES and not SOURCES[kind].markers:
        return kind, (), _written(kind, text) if colon else {}
    if isinstance(spec, str) and kind in SOURCES and colon:
        if not Path(text).exists():
            raise SourceError(f"{text} does not exist", expected=SOURCES[kind].layout, fix=f"--source {kind}:PATH")
        return kind, (Path(text),), {}
    path = Path(spec)
    if isinstance(spec, str) and colon and re.fullmatch(r"[A-Za-z][\w-]*", kind) and not path.exists():
        known = f"KIND:PATH with one of {', '.join(SOURCES)}, or a path that exists"
        raise UsageError(f"no kind of source {kind!r}{nearest(kind, SOURCES)}", expected=known)
    return _kind_of(path), (path,), {}


def recognise(path: Path) -> str | None:
    """Return the kind of a data set by its markers, or None."""
    for kind, entry in SOURCES.items():
        if entry.file and path.is_file() and any(path.match(marker) for marker in entry.markers):
            return kind
        if not entry.file and path.is_dir() and any(next(path.glob(marker), None) for marker in entry.markers):
            return kind
    return None


def _kind_of(path: Path) -> str:
    layouts = ", ".join(f"{entry.markers[0]} ({entry.layout})" for entry in SOURCES.values() if entry.markers)
    kind = recognise(path)
    if kind:
        return kind
    if not path.exists():
        hint = nearest(str(path), [name for name, entry in SOURCES.items() if not entry.markers])
        raise SourceError(f"{path} does not exist{hint}", expected=f"a folder with {layouts}", fix="--source DIR")
    if path.is_file():
        root = next((folder for folder in path.absolute().parents[:3] if recognise(folder)), "DIR")
        unpack = f"unzip {shlex.quote(str(path))} -d DIR, then --source DIR"
        fix = unpack if path.suffix == ".zip" else f"--source {root}"
        raise SourceError(f"{path} is of no known layout", expected=layouts, fix=fix)
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    listing = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    raise SourceError(
        f"{path} is of no known layout: it holds {listing or 'nothing'}",
        expected=layouts,
        fix=_nested(path) or "--source DIR, or --source KIND:DIR",
    )


def _nested(root: Path) -> str:
    """Return `--source` with a folder one level down, a snapshot of the hub's cache, or else the folder above, if any
    is a data set."""
    folders = [*sorted(path for path in root.iterdir() if path.is_dir()), *root.glob("snapshots/*"), root.parent]
    found = next((folder for folder in folders if recognise(folder)), None)
    return f"--source {found}" if found else ""


def _written(kind: str, text: str) -> dict[str, Any]:
    """Parse `a=1,b=[2,3]`; commas inside brackets do not separate. Values are JSON, or strings where they are not."""
    options: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", text)):
        key, equals, raw = pair.partition("=")
        if not equals:
            raise UsageError(f"{kind} source option {pair!r}", expected=f"KEY=VALUE, such as {kind}:episodes=8,seed=1")
        options[key.strip()] = parse_value(raw)
    return options


def _class_of(kind: str) -> Any:
    module, _, name = SOURCES[kind].target.partition(":")
    return getattr(importlib.import_module(module), name)
