"""Options that several commands have, in the same words everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[
    str | None, typer.Option("--source", help="Raw demonstrations: a folder, or synthetic. Left out: examples/push.")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file with any setting.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as --set batch_size=32.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, the log on stderr.")]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16, float32, int8. Left out: the backbone's.")]
Copies = Annotated[int | None, typer.Option(metavar="K", help="Cache K augmented copies of each frame for training.")]
Map = Annotated[list[str] | None, typer.Option("--map", help="OURS=THEIRS, such as action=actions.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable episodes out; count them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Worker processes on this machine: one a GPU, or a group of cores.")
]
Scheduler = Annotated[str | None, typer.Option(help="tcp://HOST:PORT of a running dask cluster.")]
UnitIndex = Annotated[
    str | None, typer.Option("--unit-index", metavar="I/N", help="Share I of N, for one job of an array.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Write whatever the disk seems to have room for.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps.")]
Run = Annotated[Path, typer.Argument(help="A run of `vla train-head`, or one checkpoint.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an earlier run left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def as_set(short: Mapping[str, Any]) -> list[str]:
    """Return short options, by the settings that they are short for, as `--set` takes them; None is not given."""
    return [f"{key}={json.dumps(value)}" for key, value in short.items() if value is not None and value != []]
