"""Stage 2: from stores to a trained head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import nn

from vla import __version__
from vla.heads.batch import Batch
from vla.heads.checkpoint import Artefact, StoreRecord, build_head
from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.evaluate import action_error, mean_action
from vla.heads.model import HeadModel
from vla.heads.notes import training_notes
from vla.heads.registry import head_class
from vla.heads.start import start_from
from vla.heads.tensor_batches import TensorBatches
from vla.stores.errors import UsageError
from vla.stores.fingerprint import digest
from vla.stores.owned import refuse_overlap
from vla.stores.settings import Settings, begun_in
from vla.stores.user_given import require_given
from vla.training.checkpoint import read_object
from vla.training.config import TrainConfig
from vla.training.loop import FitReport, Progress, fit, seed_everything
from vla.training.run_folder import begun_warmup, can_resume, refuse_existing, require_given_places, saved_settings
from vla.training.storage import live_scales
from vla.training.torch_device import choose_device

PLACES = ("data.stores", "stores.path", "state_range")
"""Entries of an artefact that say where a store is, not what it holds: a moved one goes on, for its digest is there.
Runs that were begun before `state_range` was kept go on as well."""


class HeadTrainConfig(Settings):
    """Everything that `vla train-head` can be told: `head` its name, `model` its own settings, `data`, `train`.

    `init_from`: a run of the same head whose weights and statistics this one starts from (start.py).
    """

    head: str = Field(json_schema_extra={"flag": "vla train-head HEAD; `vla heads` lists them"})
    data: DataConfig
    model: dict[str, Any] = {}
    train: TrainConfig = TrainConfig()
    init_from: str | None = None

    @classmethod
    def from_saved(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """See `Settings.from_saved`."""
        return saved_settings(values, file)

    @classmethod
    def require_given(cls, saved: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
        """See `Settings.require_given`."""
        require_given_places(saved, given, file)
        head = saved.get("head")
        if isinstance(head, str) and given.get("head", head) == head and isinstance(saved.get("model"), Mapping):
            model = given.get("model", {})
            require_given(head_class(head).Config, saved["model"], model, artefact=str(file), prefix="model.")


def begun_head(run_dir: Path | None, head: str | None, *, required: bool) -> Path | None:
    """Return the file of a run's settings; None where no run was begun, unless one is `required`.

    Raises `UsageError` where the run is of another head than `head`.
    """
    file = begun_in(run_dir, "run.json", required=required)
    if file is not None and head is not None:
        begun = read_object(file).get("artefact", {}).get("head")
        if begun != head:
            raise UsageError(f"{run_dir} was begun with head {begun!r}", expected=f"{head!r}, or no head")
    return file


def is_online(file: Path | None) -> bool:
    """Return whether a configuration, such as a saved run's, has settings of a training with the backbones in its loop.

    Raises `UsageError` where the file does not read.
    """
    return file is not None and "online" in HeadTrainConfig.read_file(file)


class Supplier(Protocol):
    """Gives training windows their features where they do not come from the stores: rollout/online.py."""

    identity: Mapping[str, Any]
    """What its features depend on beyond the stores' fingerprints, JSON-able; kept in every checkpoint."""

    def open(self, data: HeadData, model: HeadModel) -> None:
        """Make ready, before the first step. Raises where the features that the head reads cannot be supplied."""
        ...

    def supply(self, windows: TensorBatches, first: int, stride: int) -> Iterator[Batch]:
        """Yield the batches first, first + stride, … of a stream without features, with them."""
        ...


def train_head(
    config: HeadTrainConfig,
    run_dir: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    supplier: Supplier | None = None,
    begun: Callable[[HeadModel], None] = lambda model: None,
    progress: Progress = lambda step, total, metrics: None,
) -> FitReport:
    """Train a head into `run_dir`. Raises what opening the stores, building the head and `fit` raise, and `UsageError`
    where `run_dir` overlaps with a store or with the run to start from.

    `supplier` gives the training batches their features; statistics and validation read the stores all the same.
    `begun` is called with the head before the first step.
    """
    run_dir = Path(run_dir)
    if os.environ.get("RANK", "0") == "0":  # another process may come here after the first has begun the run
        refuse_existing(run_dir, resume=resume, overwrite=overwrite)  # before a head of billions is built
    asked = config.train
    if not resume:
        refuse_overlap(run_dir, [*config.data.stores, *([config.init_from] if config.init_from else [])])
    config = with_head_defaults(config, begun=resume and begun_warmup(run_dir) is not None)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    data = open_data(config.data)
    if not len(data.validation) and "best_metric" in asked.model_fields_set:
        raise UsageError(
            f"train.best_metric {asked.best_metric!r} of a validation that there is not",
            expected="episodes held out",
            fix="--set data.validation=0.1, or leave train.best_metric out",
        )
    seed_everything(config.train.seed)
    model = build_head(config.head, config.model, data.io)
    if not (resume and can_resume(run_dir)):  # a checkpoint holds every statistic
        if config.init_from is None:
            model.prepare(data)
        else:
            start_from(Path(config.init_from), model, artefact_of(config, model, data, {}))
        model.check_reach(data)
        model.notes = training_notes(model, data)
    seed_everything(config.train.seed)
    pin = choose_device(config.train.device, "train.device").type == "cuda"
    stored = supplier is None
    if supplier is not None:
        supplier.open(data, model)
    batches = data.batches(
        data.training,
        model.config.window,
        config.train.batch_size,
        pin=pin,
        augment=stored,
        reads=model.reads if stored else {},
    )
    identity = {} if supplier is None else supplier.identity
    begun(model)

    def stream(first: int, stride: int) -> Iterator[Batch]:
        if supplier is not None:
            return supplier.supply(batches, first, stride)
        return batches.shuffled(config.train.seed, first, stride)

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, HeadModel)
        return action_error(averaged, data, data.validation, device=next(averaged.parameters()).device).metrics()

    return fit(
        model,
        stream,
        config.train,
        run_dir,
        artefact=artefact_of(config, model, data, identity).model_dump(mode="json"),
        places=PLACES if not resume or _has_content(run_dir) else (*PLACES, "stores.content"),
        settings=config.model_dump(mode="json"),
        validate=validate if len(data.validation) else None,
        param_groups=model.param_groups(config.train.lr),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def with_head_defaults(config: HeadTrainConfig, *, begun: bool = False) -> HeadTrainConfig:
    """Fill in what the head is best trained with, wherever `train` was not set explicitly.

    `begun`: the run goes on. Where its schedule is constant it keeps the warm-up that it was begun with (`fit`).
    """
    explicit = config.train.model_dump(include=config.train.model_fields_set)
    defaults = head_class(config.head).defaults(config.model)
    if explicit.get("steps", math.inf) <= (explicit.get("warmup_steps", defaults.get("warmup_steps")) or 0):
        defaults = {key: value for key, value in defaults.items() if key != "warmup_steps"}
    if begun and (defaults | explicit).get("schedule") == "constant":
        defaults = {key: value for key, value in defaults.items() if key != "warmup_steps"}
    train = TrainConfig.build({**defaults, **explicit}, where="train")
    return config.model_copy(update={"train": train})


def _has_content(run_dir: Path) -> bool:
    """Return whether a run was begun by a version that keeps the stores' content."""
    file = run_dir / "run.json"
    artefact = read_object(file).get("artefact") if file.is_file() else None
    stores = artefact.get("stores") if isinstance(artefact, dict) else None
    return isinstance(stores, list) and all(isinstance(store, dict) and "content" in store for store in stores)


def _trained_tasks(model: HeadModel, data: HeadData) -> tuple[str, ...]:
    """Return the instructions of a head that an episode of the training split has, as its task or by its labels."""
    table = data.stores.first.episodes
    told = {table.tasks[number] for number in table.task[data.training].tolist()}
    if table.labels:
        told |= {text for number in table.label[data.training].tolist() for text in table.labels[number].values()}
    return tuple(text for text in model.instructions if text in told)


def _state_range(data: HeadData) -> tuple[tuple[float, float], ...]:
    """Return the least and greatest value of each state column [S] over the training split."""
    states = data.states(data.training)
    return tuple(zip(states.min(axis=0).tolist(), states.max(axis=0).tolist(), strict=True)) if len(states) else ()


def artefact_of(config: HeadTrainConfig, model: HeadModel, data: HeadData, online: Mapping[str, Any]) -> Artefact:
    """Collect what the checkpoint keeps beside the weights. `online`: the identity of a supplier; {} without one."""
    masks = {f"{name}_mask" for name, feature in data.io.features.items() if feature.masked}
    held = data.io.features.keys() | masks
    texts = () if data.texts is None else (data.texts.store,)
    records = [
        StoreRecord(
            path=store.place,
            sha256=digest(store.manifest.fingerprint),
            fingerprint=store.manifest.fingerprint,
            recipe=store.manifest.provenance["backbone"],
            features={name: info for name, info in store.manifest.features.items() if name in held},
            cameras=store.manifest.cameras,
            random_weights=store.manifest.random_weights,
            scales=live_scales(store, data.io.features),
            fps=store.manifest.fps,
            picture_sizes=store.manifest.picture_sizes,
            content=store.content(),
        )
        for store in (*data.stores.stores, *texts)
    ]
    return Artefact(
        head=config.head,
        config=model.config.model_dump(mode="json"),
        data=data.config,
        io=data.io,
        state=data.state,
        stores=tuple(records),
        training_episodes=len(data.training),
        trained_tasks=_trained_tasks(model, data),
        init_from=config.init_from,
        vla_version=__version__,
        frozen={name: frozen.digest for name, frozen in model.frozen.items()},
        online=dict(online),
        action_mean=tuple(mean_action(data).tolist()),
        state_range=_state_range(data),
    )
