"""The folder of a run: begun, refused, gone on with, replaced; and which of its checkpoints are kept.

run.json        what decides the weights: settings, processes, the caller's artefact; and `settings`, all that the
                caller was configured with, from which the run replays
metrics.jsonl   one line per log step
best.json       the checkpoint with the lowest validation metric
checkpoints/    see checkpoint.py
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from vla.stores.errors import CheckpointError, UsageError
from vla.stores.filesystem import PARTIAL, explaining, write_atomic
from vla.stores.fingerprint import differences
from vla.stores.owned import CHECKPOINT, RUN, foreign, remove_owned, sweep
from vla.stores.remote.options import is_url
from vla.stores.settings import Settings
from vla.training.checkpoint import CHECKPOINT_NAME, checkpoints, read_object, step_of, survey

log = logging.getLogger(__name__)

SETTINGS = "settings"
TYPED_IN = "typed_in"
"""Of the settings of a run: the folder in which they were typed, to which relative places in them belong."""


class Best(Settings):
    """The checkpoint with the lowest `metric` so far."""

    checkpoint: str = Field(pattern=CHECKPOINT_NAME)
    metric: str
    value: float


def can_resume(run_dir: Path) -> bool:
    """Return whether a run has come as far as a first checkpoint, from which `fit(…, resume=True)` would go on.

    Before that, resuming starts at step 0 with the module as it is given.
    """
    return bool(checkpoints(run_dir))


def begun_warmup(run_dir: Path) -> int | None:
    """Return the steps of warm-up that a run was begun with; None where no run was. Raises `CheckpointError`."""
    file = run_dir / "run.json"
    train = read_object(file).get("train") if file.is_file() else None
    steps = train.get("warmup_steps") if isinstance(train, dict) else None
    return steps if type(steps) is int and steps >= 0 else None


def saved_settings(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the caller's settings in the content of a `run.json`; the content of another configuration as it is.

    Relative folders under `data` that are not here are those of the folder where the run began, if they are there.
    Raises `UsageError` for a run that was written before runs kept them.
    """
    if not {"train", "processes", "artefact"} <= values.keys():
        return values
    settings = values.get(SETTINGS)
    if not isinstance(settings, dict):
        raise UsageError(f"{file} has no {SETTINGS!r}: an earlier version wrote it", fix="the flags that it began with")
    settings.pop("backbones", None)  # checkouts and weights: the store's backbones name what the user has to give
    began, data = settings.pop(TYPED_IN, None), settings.get("data")
    if isinstance(data, dict):
        data.pop("remote", None)  # an endpoint would receive the user's credentials, a cache folder the bytes
    if isinstance(began, str) and isinstance(data, dict):
        for name in data.keys() & {"stores", "teacher"}:
            data[name] = _found(data[name], Path(began))
    return settings


def require_given_places(saved: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
    """Raise `UsageError` where saved settings name a bucket, and the user has not given stores."""
    data, chosen = saved.get("data"), given.get("data", {})
    stores = data.get("stores", ()) if isinstance(data, Mapping) else ()
    urls = [store for store in stores if is_url(store)]
    if urls and "stores" not in chosen:
        fix = " ".join(f"--store {shlex.quote(str(store))}" for store in stores)
        raise UsageError(
            f"{file} names {urls[0]}, and no saved run chooses an address", expected="your own value", fix=fix
        )


def _found(place: Any, began: Path) -> Any:
    """Return a place, or each of a list, where it is: here, or seen from the folder `began`."""
    if isinstance(place, list):
        return [_found(each, began) for each in place]
    if not isinstance(place, str) or "://" in place or Path(place).exists() or not (began / place).exists():
        return place
    return str(began / place)


def refuse_existing(run_dir: Path, *, resume: bool, overwrite: bool) -> list[Path]:
    """Return what is in the folder of a run. Raises `UsageError` where that is not a run, or neither flag is given."""
    inside = [path for path in run_dir.iterdir() if path.suffix != PARTIAL] if run_dir.exists() else []
    if inside and not (run_dir / "run.json").is_file():
        raise UsageError(f"{run_dir} exists and is not a run of `vla train-head`", fix="another --out")
    if inside and not resume and not overwrite:
        raise UsageError(f"{run_dir} exists", fix="--resume to go on, --overwrite to replace it, or another --out")
    return inside


def prepare_run(
    run_dir: Path,
    decides: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    places: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path | None, tuple[str, ...]]:
    """Make the folder ready. Return the checkpoint to go on from (None: from step 0), and why newer ones are not it.

    `decides` is everything the weights depend on, JSON-able; `places` names what of it only says where something is,
    such as "artefact.stores.path" (of every item of a list), which may be another on resuming. `settings` are kept
    beside `decides`, to replay the run from. Raises `UsageError` where the folder exists and neither flag is given,
    where it is not a run, where `overwrite` would delete what is no part of a run, and where the run was begun with
    something else, naming the field; `CheckpointError` where there are checkpoints and all of them are damaged.
    """
    file = run_dir / "run.json"
    with explaining(run_dir):
        inside = refuse_existing(run_dir, resume=resume, overwrite=overwrite)
        if inside and resume:
            _require_same(file, decides, places)
        elif inside:
            # run.json stays until it is replaced: an interrupted --overwrite leaves a run.
            remove_owned(run_dir, RUN, keep=(file.name,))
        if (run_dir / "checkpoints").is_symlink():  # pruning would delete where the link leads
            raise UsageError(f"{run_dir / 'checkpoints'} is a symbolic link", fix="a link in the run folder's place")
        run_dir.mkdir(parents=True, exist_ok=True)
        sweep(run_dir, RUN)
        kept = dict(decides) if settings is None else {**decides, SETTINGS: {**settings, TYPED_IN: str(Path.cwd())}}
        write_atomic(file, json.dumps(kept, indent=1).encode())
    found = survey(run_dir)
    if found.newest is None and found.passed_over:
        raise CheckpointError(
            f"every checkpoint of {run_dir} is damaged: {found.passed_over[0]}", fix="--overwrite to start again"
        )
    if resume:
        log.info("going on from %s", found.newest or f"step 0: {run_dir} has no checkpoint yet")
    return found.newest, found.passed_over


def write_best(run_dir: Path, best: Best | None) -> None:
    """Point `best.json` to a checkpoint, or to none."""
    file = run_dir / "best.json"
    if best is None:
        file.unlink(missing_ok=True)
    else:
        write_atomic(file, json.dumps({"checkpoint": best.checkpoint, best.metric: best.value}).encode())


def prune(run_dir: Path, keep: int, step: int, best: Best | None) -> None:
    """Delete all checkpoints up to `step` but the newest `keep` and the best.

    Later ones stay: they are damaged ones, from which a resumed run fell back, and take nobody's place. So do those
    that hold other files than a checkpoint's.
    """
    past = [folder for folder in checkpoints(run_dir) if step_of(folder) <= step]
    with explaining(run_dir):
        for folder in past[keep:]:
            if best is None or folder.name != best.checkpoint:
                others = foreign(folder, CHECKPOINT)
                if others:
                    log.warning("%s is kept: it holds %s, which is no part of a checkpoint", folder, others[0])
                    continue
                # Under its name a checkpoint is whole: half a deletion must not look like damage.
                partial = folder.rename(folder.with_name(folder.name + PARTIAL))
                remove_owned(partial, CHECKPOINT)


def _require_same(file: Path, decides: Mapping[str, Any], places: Sequence[str]) -> None:
    begun: Any = read_object(file)
    ours: Any = json.loads(json.dumps(decides))
    begun.pop(SETTINGS, None)  # what of them decides is in the rest
    for place in places:
        _drop(begun, place.split("."))
        _drop(ours, place.split("."))
    lines = differences(begun, ours)
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise UsageError(
            f"{file.parent} was begun with other settings: {'; '.join(lines[:3])}{more}",
            fix="the settings it was begun with, --overwrite, or another --out",
        )


def _drop(value: Any, path: list[str]) -> None:
    if isinstance(value, list):
        for item in value:
            _drop(item, path)
    elif isinstance(value, dict) and len(path) > 1:
        _drop(value.get(path[0]), path[1:])
    elif isinstance(value, dict):
        value.pop(path[0], None)
