"""From stores on disk to batches of tensors: which features, which state, which episodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.storage import as_tensor
from vla.stores.batches import Shuffle, WindowBatch, WindowBatches
from vla.stores.dtypes import DtypeName
from vla.stores.errors import DataError, UsageError
from vla.stores.join import JoinedStores, join_stores
from vla.stores.memory import memory_limit
from vla.stores.reader import Verify
from vla.stores.remote.options import RemoteOptions
from vla.stores.settings import Settings
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec, split_episodes

CACHE_SHARE = 0.7
"""Of the memory, how much of a store the page cache is taken to hold; the rest is the training's own."""


class DataConfig(Settings):
    """What a head is trained on.

    `stores`: folders of one or several stores of the same demonstrations. `features`: names to read (None: all of
    them). `state`: step columns that are proprioception; () for none. A column whose role is `privileged` (simulator
    truth) has to be named here to be used at all. `validation`: share of episodes held out, whole episodes at a time.
    `verify`: when rows are compared with their checksums. `random_weights`: allow features of random weights.
    `shuffle`: "global" draws batches from all of the store, "blocks" from random places of it, which reads a store that
    exceeds memory far faster (vla.stores.shuffle); "auto" decides by the memory, and checkpoints keep its decision.
    `remote`: how stores on object stores are reached and cached.
    `augment`: training batches draw each window from the plain features or from one of the augmented copies beside them
    (`vla featurize --augment`), where a store has any; all else reads plain features.
    """

    stores: tuple[str, ...]
    features: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    validation: float = Field(0.1, ge=0, lt=1)
    split_seed: int = 0
    verify: Verify = "first"
    shuffle: Literal["auto", "global", "blocks"] = "auto"
    augment: bool = True
    allow_partial: bool = False
    random_weights: bool = False
    remote: RemoteOptions = RemoteOptions()


@dataclass(frozen=True)
class HeadData:
    """Opened stores and the split. `training` and `validation` are episode positions, int64.

    `copies`: K, how many augmented copies training draws from; 0 where there are none, or none are wanted.
    """

    config: DataConfig
    stores: JoinedStores
    io: HeadIO
    features: tuple[str, ...]
    state: tuple[str, ...]
    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    copies: int = 0

    def rows(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return all rows of some episodes, in order."""
        table = self.stores.first.episodes
        parts = [np.arange(start, start + n) for start, n in zip(table.row_start, table.length, strict=True)]
        return np.concatenate([parts[episode] for episode in episodes.tolist()])

    def actions(self, episodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the actions of some episodes, float32 [N, A], in the data's units."""
        return self.stores.first.steps("action")[self.rows(episodes)].astype(np.float32)

    def states(self, episodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the state of some episodes, float32 [N, S]; S is 0 where none is used."""
        rows = self.rows(episodes)
        columns = [self.stores.first.steps(name)[rows].reshape(len(rows), -1) for name in self.state]
        return np.concatenate([np.empty((len(rows), 0)), *columns], axis=1).astype(np.float32)

    def batches(
        self, episodes: NDArray[np.int64], window: WindowSpec, batch_size: int, *, pin: bool, augment: bool = False
    ) -> TensorBatches:
        """Return batches over all windows of some episodes; with `augment`, shuffled ones draw from the copies."""
        index = WindowIndex(self.stores.first.episodes, episodes, window)
        batches = WindowBatches(
            self.stores,
            index,
            features=self.features,
            obs_steps=self.state,
            action_steps=("action",),
            batch_size=batch_size,
            verify=self.config.verify,
            allocate=_allocate_pinned if pin else np.empty,
            shuffle="blocks" if self.config.shuffle == "blocks" else "global",
            copies=self.copies if augment else 0,
        )
        dtypes = {name: self.stores.feature_info(name).dtype for name in self.features}
        return TensorBatches(batches, self.state, dtypes)


@dataclass(frozen=True)
class TensorBatches:
    """`WindowBatches` as torch batches. Features share memory with the ring: a batch is valid until the next one."""

    batches: WindowBatches
    state: tuple[str, ...]
    dtypes: dict[str, DtypeName]

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches start, start + 1, … for ever; batch k is a function of (seed, k)."""
        return map(self._to_torch, self.batches.shuffled(seed, start))

    def in_order(self) -> Iterator[Batch]:
        """Yield every window once."""
        return map(self._to_torch, self.batches.in_order())

    def _to_torch(self, batch: WindowBatch) -> Batch:
        B, N = batch.obs_valid.shape
        state = [batch.obs_steps[name].reshape(B, N, -1).astype(np.float32) for name in self.state]
        return Batch(
            features={name: as_tensor(values, self.dtypes[name]) for name, values in batch.features.items()},
            state=torch.from_numpy(np.concatenate(state, axis=2)) if state else None,
            task=torch.from_numpy(batch.task),
            obs_valid=torch.from_numpy(batch.obs_valid),
            action=torch.from_numpy(batch.action_steps["action"].astype(np.float32)),
            action_valid=torch.from_numpy(batch.action_valid),
            scales={name: torch.from_numpy(values) for name, values in batch.scales.items()},
        )


def open_data(config: DataConfig) -> HeadData:
    """Open and join the stores, choose features and state, split the episodes.

    Raises `UsageError` for names that are not there, `StoreError` and `FingerprintError` as the stores do, `DataError`
    for random weights that were not asked for and for actions that are not finite.
    """
    if not config.stores:
        raise UsageError("no store given", fix="--store stores/NAME")
    stores = join_stores(
        [open_store(path, allow_partial=config.allow_partial, remote=config.remote) for path in config.stores]
    )
    for store in stores.stores:
        if store.manifest.random_weights and not config.random_weights:
            raise DataError(
                f"{store.place} was made with random weights",
                expected="features of trained weights",
                fix="--set data.random_weights=true, if this is a test of the pipeline",
            )
    first = stores.first
    steps = first.manifest.steps
    features = config.features if config.features is not None else tuple(stores.owner)
    state = config.state if config.state is not None else tuple(name for name, s in steps.items() if s.role == "state")
    for name in state:
        if name not in steps or steps[name].role == "action":
            known = ", ".join(key for key, step in steps.items() if step.role != "action")
            raise UsageError(f"data.state names {name!r}", expected=f"one of {known}")
    training, validation = split_episodes(stores.usable, first.episodes.ids, config.validation, config.split_seed)
    widths = {name: int(np.prod(steps[name].shape)) for name in state}
    if "action" not in steps:
        found = f"{first.root} has no actions: it is a store of {first.manifest.fingerprint['backbone']['name']}"
        raise UsageError(found, expected="a store of demonstrations as the first --store")
    io = HeadIO(
        action_dim=int(np.prod(steps["action"].shape)),
        action_names=steps["action"].names,
        state_dim=sum(widths.values()),
        state_names=tuple(
            f"{name}.{part}"
            for name in state
            for part in (steps[name].names or tuple(str(index) for index in range(widths[name])))
        ),
        features={name: _feature_io(stores, name) for name in features},
        tasks=first.episodes.tasks,
    )
    copies = stores.copies(features) if config.augment else 0
    if config.shuffle == "auto":
        config = config.model_copy(update={"shuffle": _shuffle_for(stores, features, copies)})
    data = HeadData(config, stores, io, features, state, training, validation, copies)
    if not np.isfinite(data.actions(np.flatnonzero(stores.usable))).all():
        raise DataError(f"{first.place} holds actions that are not finite", fix=f"vla verify {first.place}")
    return data


def _shuffle_for(stores: JoinedStores, features: tuple[str, ...], copies: int) -> Shuffle:
    size = 0
    for name in features:
        arrays = 1 + min(copies, stores.stores[stores.owner[name]].manifest.copies)
        size += stores.first.manifest.rows * stores.feature_info(name).row_bytes * arrays
    return "blocks" if size > CACHE_SHARE * memory_limit() else "global"


def _feature_io(stores: JoinedStores, name: str) -> FeatureIO:
    info = stores.feature_info(name)
    return FeatureIO(shape=info.shape, dims=info.dims[1:])


def _allocate_pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array: NDArray[Any] = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True).numpy()
    return array
