"""Options that several commands have, in the same words and under the same headings of `--help` everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vla import __version__
from vla.terminal import complete


def _option(title: str, text: str, *names: str, **more: Any) -> Any:
    """Make an option that `--help` tells about by `text`, in the panel called `title`."""
    return typer.Option(*names, help=text, rich_help_panel=title, **more)


SETTINGS = "Settings and output"
goes_in = partial(_option, "What goes in")
comes_out = partial(_option, "What comes out")
runs = partial(_option, "How and where it runs")
is_there = partial(_option, "What is there already")
settings = partial(_option, SETTINGS)

SIMULATORS = ("metaworld", "robosuite")
DTYPES = ("float16", "bfloat16", "float32", "int8")

_offered = {
    "source": complete.either(
        complete.names(complete.SOURCES, suffix=":", more=("synthetic",)),
        complete.folders("examples", "meta/info.json"),
    ),
    "backbone": complete.names(complete.BACKBONES),
    "head": complete.names(complete.HEADS),
    "cache": complete.names(complete.CACHES),
    "env": complete.names(complete.ENVS, suffix=":"),
    "simulator": complete.names(more=SIMULATORS),
    "dtype": complete.names(more=DTYPES),
    "store": complete.folders("stores", "zarr.json"),
    "run": complete.folders("runs", "run.json"),
}
"""What TAB offers, by what it is for."""


def _named(what: str, text: str, *names: str) -> Any:
    """Make an option of what goes in, whose values TAB offers."""
    return goes_in(text, *names, autocompletion=_offered[what])


def _place(what: str, text: str) -> Any:
    """Make an argument whose values TAB offers."""
    return typer.Argument(help=text, autocompletion=_offered[what])


Source = Annotated[
    str | None,
    _named("source", "Demonstrations: a folder, KIND:FOLDER, or synthetic. Left out: the shipped ones.", "--source"),
]
Backbone = Annotated[str | None, _named("backbone", "A name of `vla backbones`.", "--backbone")]
OneBackbone = Annotated[str | None, _place("backbone", "One backbone, to list every option of it.")]
Map = Annotated[list[str] | None, goes_in("OURS=THEIRS, such as action=actions.", "--map")]
SkipBad = Annotated[bool, goes_in("Leave unreadable episodes out; count them.", "--skip-bad")]
_STORES = _named("store", "A store; repeat to join several of one source.", "--store")
Stores = Annotated[list[str] | None, _STORES]
SomeStores = Annotated[list[str], _STORES]
OtherStores = Annotated[list[str] | None, _named("store", "Other stores. Left out: held-out episodes.", "--store")]
AStore = Annotated[str, _place("store", "A store: folder or URL.")]
MaybeStore = Annotated[str | None, _place("store", "A store: folder or URL.")]
Run = Annotated[Path, _place("run", "A run of `vla train-head`, or one checkpoint.")]
From = Annotated[str | None, _named("run", "A run whose weights to start from.", "--from")]
Head = Annotated[str | None, _place("head", "A name of `vla heads`. Left out: a saved run's.")]
OneHead = Annotated[str | None, _place("head", "One head, to list every setting of it.")]
Cache = Annotated[str, _place("cache", "opentrackvla, rgb2pc-windows, replay-buffer, robomimic or arrays.")]
Simulator = Annotated[str, _place("simulator", "metaworld, or robosuite: its human demonstrations.")]
Environment = Annotated[str, _named("env", "Such as metaworld:push-v3.", "--env")]
Dtype = Annotated[
    str | None,
    comes_out(f"{', '.join(DTYPES)}. Left out: the backbone's.", "--dtype", autocompletion=_offered["dtype"]),
]
Copies = Annotated[int | None, comes_out("Cache K augmented copies of each frame for training.", metavar="K")]
Workers = Annotated[
    int | None, runs("Worker processes on this machine: one a GPU, or a group of cores.", "--workers", metavar="N")
]
Scheduler = Annotated[str | None, runs("tcp://HOST:PORT of a running dask cluster.", "--scheduler")]
UnitIndex = Annotated[str | None, runs("Share I of N, for one job of an array: 0/N to N-1/N.", metavar="I/N")]
Steps = Annotated[int | None, runs("Optimiser steps.", "--steps")]
DryRun = Annotated[bool, runs("Print the plan, write nothing.", "--dry-run")]
Yes = Annotated[bool, runs("Go on though there seems to be too little room, or too many files.", "--yes")]
Resume = Annotated[bool, is_there("Go on with what an earlier run left.", "--resume")]
Overwrite = Annotated[bool, is_there("Replace it.", "--overwrite")]
Config = Annotated[
    Path | None, settings("TOML, JSON or YAML file with any setting, or a saved run or store.", "--config")
]
Set = Annotated[list[str] | None, settings("One setting, KEY=VALUE; repeat for several.", "--set")]
TrainSet = Annotated[list[str] | None, settings("One setting, such as --set train.batch_size=32.", "--set")]
ModelSet = Annotated[list[str] | None, settings("Such as --set model.n_action=1.", "--set")]
Json = Annotated[bool, settings("Print one JSON object on stdout, the log on stderr.", "--json")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vla {__version__}")
        raise typer.Exit


def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `vla` itself."""


def as_set(short: Mapping[str, Any]) -> list[str]:
    """Return short options, by the settings that they are short for, as `--set` takes them; None is not given."""
    return [f"{key}={json.dumps(value)}" for key, value in short.items() if value is not None and value != []]
