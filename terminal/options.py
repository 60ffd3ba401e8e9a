"""Options that several commands have, in the same words and under the same headings of `--help` everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer


def _option(title: str, text: str, *names: str, **more: Any) -> Any:
    """Make an option that `--help` tells about by `text`, in the panel called `title`."""
    return typer.Option(*names, help=text, rich_help_panel=title, **more)


SETTINGS = "Settings and output"
goes_in = partial(_option, "What goes in")
comes_out = partial(_option, "What comes out")
runs = partial(_option, "How and where it runs")
is_there = partial(_option, "What is there already")
settings = partial(_option, SETTINGS)

Source = Annotated[
    str | None, goes_in("Raw demonstrations: a folder, KIND:FOLDER, or synthetic. Left out: examples/push.", "--source")
]
Map = Annotated[list[str] | None, goes_in("OURS=THEIRS, such as action=actions.", "--map")]
SkipBad = Annotated[bool, goes_in("Leave unreadable episodes out; count them.", "--skip-bad")]
Stores = Annotated[list[str] | None, goes_in("A store; repeat to join several of one source.", "--store")]
Run = Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")]
Dtype = Annotated[str | None, comes_out("float16, bfloat16, float32, int8. Left out: the backbone's.", "--dtype")]
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
Config = Annotated[Path | None, settings("TOML, JSON or YAML file with any setting.", "--config")]
Set = Annotated[list[str] | None, settings("One setting, KEY=VALUE; repeat for several.", "--set")]
TrainSet = Annotated[list[str] | None, settings("One setting, such as --set train.batch_size=32.", "--set")]
ModelSet = Annotated[list[str] | None, settings("Such as --set model.n_action=1.", "--set")]
Json = Annotated[bool, settings("Print one JSON object on stdout, the log on stderr.", "--json")]


def as_set(short: Mapping[str, Any]) -> list[str]:
    """Return short options, by the settings that they are short for, as `--set` takes them; None is not given."""
    return [f"{key}={json.dumps(value)}" for key, value in short.items() if value is not None and value != []]
