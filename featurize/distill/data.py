"""From stores and a teacher to batches: the grids of single steps beside the embedding of the same step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from vla.featurize.distill.pairing import PairedTeacher, PairingReport, pair
from vla.featurize.distill.teacher import open_teacher
from vla.stores.batches import WindowBatch, WindowBatches
from vla.stores.dtypes import INTEGERS
from vla.stores.errors import DataError, UsageError
from vla.stores.join import JoinedStores, join_stores
from vla.stores.memory import memory_limit
from vla.stores.reader import Verify
from vla.stores.settings import Settings
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable
from vla.stores.windows import WindowIndex, WindowSpec, split_episodes
from vla.training.storage import as_tensor

CACHE_SHARE = 0.7
"""Of the memory, how much of a store the page cache is taken to hold."""


class DistillData(Settings):
    """What a student is trained on.

    `stores`: folders of one or several stores of the same demonstrations. `teacher`: see teacher.py; `teacher_feature`
    names one of a store that has several. `features`: the grids to read (None: all features of the stores).
    `skip_unpaired`: leave steps without an embedding out, and count them. The rest as for heads (`vla train-head`).
    """

    stores: tuple[str, ...] = Field(json_schema_extra={"flag": "--store STORE"})
    teacher: str = Field(json_schema_extra={"flag": "--teacher PLACE"})
    teacher_feature: str | None = None
    features: tuple[str, ...] | None = None
    skip_unpaired: bool = False
    validation: float = Field(0.1, ge=0, lt=1)
    split_seed: int = 0
    verify: Verify = "first"
    shuffle: Literal["auto", "global", "blocks"] = "auto"
    allow_partial: bool = False
    random_weights: bool = False


@dataclass(frozen=True)
class StepBatch:
    """B steps of V views. `features` are as stored; read them through `grids`."""

    features: dict[str, Tensor]
    """name -> [B, V, y, x, C], float16, bfloat16, float32 or int8."""
    teacher: Tensor
    """[B, V or 1, E] float32."""
    row: Tensor
    """[B] int64, rows of the (first) store: the same number is the same step."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """name -> [B, C] float32, what int8 features are to be multiplied with."""

    def grids(self, view: int) -> dict[str, Tensor]:
        """Return {name: [B, y, x, C]} float32 of one view."""
        found = {}
        for name, stored in self.features.items():
            values = stored[:, view].float()
            found[name] = values * self.scales[name][:, None, None] if name in self.scales else values
        return found

    def to(self, device: torch.device, *, non_blocking: bool = False) -> StepBatch:
        """Return the same batch on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return StepBatch(
            {name: move(values) for name, values in self.features.items()},
            move(self.teacher),
            move(self.row),
            {name: move(values) for name, values in self.scales.items()},
        )


class PairedSteps(WindowIndex):
    """Windows of one frame over those rows of some episodes that have an embedding."""

    def __init__(self, table: EpisodeTable, episodes: NDArray[np.int64], paired: NDArray[np.bool_]) -> None:
        """Raise `DataError` where no row is left."""
        super().__init__(table, episodes, WindowSpec(n_obs=1, horizon=1))
        kept = paired[self._row]
        self._row, self._episode = self._row[kept], self._episode[kept]
        if not len(self._row):
            raise DataError(f"none of {len(episodes)} episodes has an embedding", fix="--set data.validation=0")


@dataclass(frozen=True)
class DistillSource:
    """Opened stores, paired teacher and split. `inputs` {feature: (y, x, C)}; `random_weights` of any of them."""

    config: DistillData
    stores: JoinedStores
    teacher: PairedTeacher
    teacher_record: dict[str, Any]
    inputs: dict[str, tuple[int, int, int]]
    training: PairedSteps
    validation: PairedSteps | None
    random_weights: bool

    @property
    def teacher_dim(self) -> int:
        """E."""
        return int(self.teacher.values.shape[-1])

    @property
    def pairing(self) -> PairingReport:
        """How many steps have an embedding."""
        return self.teacher.report

    def shuffled(
        self, index: PairedSteps, batch_size: int, seed: int, start: int = 0, stride: int = 1
    ) -> Generator[StepBatch, None, None]:
        """Yield batches start, start + stride, … for ever; batch k is a function of (seed, k).

        Each is valid until the next one.
        """
        batches = WindowBatches(
            self.stores,
            index,
            features=tuple(self.inputs),
            batch_size=batch_size,
            verify=self.config.verify,
            shuffle="blocks" if self.config.shuffle == "blocks" else "global",
        )
        order = copy.copy(batches)  # another thread uses `batches`, which remembers its epoch
        for number, batch in zip(
            itertools.count(start, stride), batches.shuffled(seed, start, stride=stride), strict=False
        ):
            yield self._step_batch(batch, index.row[order.windows_of_batch(seed, number)])

    def _step_batch(self, batch: WindowBatch, rows: NDArray[np.int64]) -> StepBatch:
        dtypes = {name: self.stores.feature_info(name).dtype for name in self.inputs}
        return StepBatch(
            {name: as_tensor(values[:, 0], dtypes[name]) for name, values in batch.features.items()},
            torch.from_numpy(self.teacher.read(rows)),
            torch.from_numpy(rows),
            {name: torch.from_numpy(values[:, 0]) for name, values in batch.scales.items()},
        )


def open_distill(config: DistillData) -> DistillSource:
    """Open stores and teacher, pair them, split the episodes.

    Raises what the stores and `pair` raise, `UsageError` for features that are no grids, `DataError` for random
    weights that were not asked for.
    """
    if not config.stores:
        raise UsageError("no store given", fix="--store stores/NAME")
    stores = join_stores([open_store(path, allow_partial=config.allow_partial) for path in config.stores])
    names = config.features if config.features is not None else tuple(stores.owner)
    inputs = {name: _grid_of(stores, name) for name in names}
    teacher = open_teacher(Path(config.teacher), config.teacher_feature)
    random = [str(store.root) for store in stores.stores if store.manifest.random_weights]
    random += [config.teacher] if teacher.random_weights else []
    if random and not config.random_weights:
        raise DataError(
            f"{random[0]} was made with random weights",
            expected="features of trained weights",
            fix="--set data.random_weights=true, if this is a test of the pipeline",
        )
    table, views = stores.first.episodes, len(stores.first.manifest.cameras)
    paired = pair(teacher, table, stores.usable, skip_unpaired=config.skip_unpaired)
    if paired.values.shape[1] not in (1, views):
        raise UsageError(f"the teacher has {paired.values.shape[1]} views", expected=f"1, or {views} as the stores")
    training, validation = split_episodes(stores.usable, table.ids, config.validation, config.split_seed)
    if config.shuffle == "auto":
        size = stores.first.manifest.rows * sum(stores.feature_info(name).row_bytes for name in names)
        chosen: Literal["blocks", "global"] = "blocks" if size > CACHE_SHARE * memory_limit() else "global"
        config = config.model_copy(update={"shuffle": chosen})
    return DistillSource(
        config,
        stores,
        paired,
        {"kind": teacher.kind, "path": config.teacher, "sha256": teacher.digest()},
        inputs,
        PairedSteps(table, training, paired.paired),
        PairedSteps(table, validation, paired.paired) if len(validation) else None,
        bool(random),
    )


def _grid_of(stores: JoinedStores, name: str) -> tuple[int, int, int]:
    """Return (y, x, C) of a feature. Tokens without rows and columns have no place that others could share."""
    info = stores.feature_info(name)
    views = {len(store.manifest.cameras) for store in stores.stores}
    if len(info.shape) != 4 or info.dtype in INTEGERS:
        raise UsageError(
            f"{name!r} is {info.dtype} {info.shape}",
            expected="a grid [V, y, x, C]",
            fix="--set data.features='[\"NAME\", …]'",
        )
    if views != {info.shape[0]}:
        raise UsageError(f"{name!r} has {info.shape[0]} views", expected=f"{max(views)}, as the other stores")
    return info.shape[1], info.shape[2], info.shape[3]
