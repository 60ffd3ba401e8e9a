"""Environments by name, and which seeds are whose.

A new simulator is one file and one line of `ENVS`; its class takes the task's name and keyword options.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from vla.rollout.envs.base import Env
from vla.stores.errors import UsageError
from vla.stores.settings import nearest

ENVS: dict[str, str] = {
    "metaworld": "vla.rollout.envs.metaworld:MetaWorldEnv",
}
"""Prefix of a name such as `metaworld:push-v3` to the module and class that make it, imported when first asked for."""

SEEDS_PER_RUN = 1_000_000
"""Every run seed owns this many environment seeds: seed * 1,000,000 and up."""

FIRST_EVALUATION_SEED = 500_000
"""The upper half of a run's seeds is evaluation's alone, so no demonstration of any run shows an evaluated scene."""


def make_env(name: str, **options: Any) -> Env:
    """Make the environment called `prefix:task`; `options` go to its class (cameras, image_size, ...).

    Raises `UsageError` for an unknown prefix or task, with the nearest match, and `MachineError` where the simulator
    or a library that it renders with is not installed.
    """
    prefix, colon, task = name.partition(":")
    if prefix not in ENVS:
        hint = nearest(prefix, ENVS) or f" (known: {', '.join(sorted(ENVS))})"
        raise UsageError(f"unknown environment {prefix!r}{hint}", expected="PREFIX:TASK, such as metaworld:push-v3")
    if not (colon and task):
        raise UsageError(f"environment {name!r} names no task", expected="PREFIX:TASK, such as metaworld:push-v3")
    module, _, cls = ENVS[prefix].partition(":")
    return cast(Env, getattr(importlib.import_module(module), cls)(task, **options))


def demonstration_seed(run_seed: int, attempt: int) -> int:
    """Return the environment seed of demonstration attempt 0, 1, ... of a run: the lower half of the run's seeds."""
    return run_seed * SEEDS_PER_RUN + _within_half(attempt)


def evaluation_seed(run_seed: int, rollout: int) -> int:
    """Return the environment seed of evaluation rollout 0, 1, ...: never one that a demonstration may use."""
    return run_seed * SEEDS_PER_RUN + FIRST_EVALUATION_SEED + _within_half(rollout)


def _within_half(number: int) -> int:
    if not 0 <= number < FIRST_EVALUATION_SEED:
        raise UsageError(f"episode number {number}", expected=f"0 to {FIRST_EVALUATION_SEED - 1}", fix="another --seed")
    return number
