"""Stage 2: from stores to a trained head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla import __version__
from vla.heads.batch import Batch
from vla.heads.checkpoint import Artefact, StoreRecord, build_head
from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.evaluate import action_error
from vla.heads.model import HeadModel
from vla.heads.registry import head_class
from vla.heads.storage import largest_scales
from vla.stores.fingerprint import digest
from vla.stores.settings import Settings
from vla.training.config import TrainConfig
from vla.training.loop import FitReport, Progress, fit, seed_everything
from vla.training.run_folder import can_resume


class HeadTrainConfig(Settings):
    """Everything that `vla train-head` can be told: `head` its name, `model` its own settings, `data`, `train`."""

    head: str
    data: DataConfig
    model: dict[str, Any] = {}
    train: TrainConfig = TrainConfig()


def train_head(
    config: HeadTrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda step, total, metrics: None,
) -> FitReport:
    """Train a head into `run_dir`. Raises what opening the stores, building the head and `fit` raise."""
    config = with_head_defaults(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    data = open_data(config.data)
    seed_everything(config.train.seed)
    model = build_head(config.head, config.model, data.io)
    if not (resume and can_resume(run_dir)):  # a checkpoint holds every statistic
        model.prepare(data)
    seed_everything(config.train.seed)
    pin = config.train.device != "cpu" and torch.cuda.is_available()
    batches = data.batches(
        data.training, model.config.window, config.train.batch_size, pin=pin, augment=True, reads=model.reads
    )

    def stream(first: int, stride: int) -> Iterator[Batch]:
        return batches.shuffled(config.train.seed, first, stride)

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, HeadModel)
        return action_error(averaged, data, data.validation, device=next(averaged.parameters()).device).metrics()

    return fit(
        model,
        stream,
        config.train,
        run_dir,
        artefact=artefact_of(config, model, data).model_dump(mode="json"),
        validate=validate if len(data.validation) else None,
        param_groups=model.param_groups(config.train.lr),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def with_head_defaults(config: HeadTrainConfig) -> HeadTrainConfig:
    """Fill in what the head is best trained with, wherever `train` was not set explicitly."""
    explicit = config.train.model_dump(include=config.train.model_fields_set)
    defaults = head_class(config.head).defaults(config.model)
    if explicit.get("steps", math.inf) <= explicit.get("warmup_steps", defaults.get("warmup_steps", 0)):
        defaults = {key: value for key, value in defaults.items() if key != "warmup_steps"}
    train = TrainConfig.build({**defaults, **explicit}, where="train")
    return config.model_copy(update={"train": train})


def artefact_of(config: HeadTrainConfig, model: HeadModel, data: HeadData) -> Artefact:
    """Collect what the checkpoint keeps beside the weights."""
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
            scales=largest_scales(store, data.io.features),
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
        vla_version=__version__,
        frozen={name: frozen.digest for name, frozen in model.frozen.items()},
    )
