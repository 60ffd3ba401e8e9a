"""From stores on disk to batches of tensors: which features, which state, which episodes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vla.heads.batch import HeadIO
from vla.heads.columns import episode_dims, feature_io, label_columns, target_info, task_dims
from vla.heads.tensor_batches import TensorBatches
from vla.heads.texts import TextTable, is_text_store
from vla.stores.batches import Shuffle, WindowBatches
from vla.stores.dtypes import DtypeName
from vla.stores.errors import DataError, UsageError
from vla.stores.join import JoinedStores, join_stores
from vla.stores.memory import memory_limit
from vla.stores.reader import Verify
from vla.stores.remote.options import RemoteOptions
from vla.stores.settings import Settings
from vla.stores.store import Store, open_store
from vla.stores.user_given import PlainText, UserGiven
from vla.stores.windows import WindowIndex, WindowSpec, split_episodes

log = logging.getLogger(__name__)

CACHE_SHARE = 0.7
"""Of the memory, how much of a store the page cache is taken to hold; the rest is the training's own."""


class DataConfig(Settings):
    """What a head is trained on.

    `stores`: folders of one or several stores of the same demonstrations. `features`: names to read (None: all of
    them). `state`: step columns that are proprioception; () for none. A column whose role is `privileged` (simulator
    truth) has to be named here to be used at all. `validation`: share of episodes held out, whole episodes at a time.
    `split_seed`: which of them. `allow_partial`: train on the committed part of a store that is not complete.
    `verify`: when rows are compared with their checksums. `random_weights`: allow features of random weights.
    `shuffle`: "global" draws batches from all of the store, "blocks" from random places of it, which reads a store that
    exceeds memory far faster (vla.stores.shuffle); "auto" decides by the memory, and checkpoints keep its decision.
    `target`: the step column that heads learn to predict. One number a dimension and row is a window's next actions;
    a column [H, A] is a chunk that each row holds by itself (8 waypoints), valid where `<target>_valid` says so.
    `remote`: how stores on object stores are reached and cached.
    A bool column `<target>_dims` [A] marks the dimensions that a task has, where tasks differ. `dims`: only episodes
    that have exactly these dimensions, and no others of the label (`--group-by action-dim` sets it; None: everything,
    masked).
    `augment`: training batches draw each window from the plain features or from one of the augmented copies beside them
    (`vla featurize --augment`), where a store has any; all else reads plain features.
    """

    stores: Annotated[tuple[str, ...], UserGiven()] = Field(json_schema_extra={"flag": "--store STORE"})
    features: Annotated[tuple[str, ...] | None, PlainText()] = None
    state: Annotated[tuple[str, ...] | None, PlainText()] = None
    target: Annotated[str, PlainText()] = "action"
    dims: tuple[int, ...] | None = None
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

    `copies`: K, how many augmented copies training draws from; 0 where there are none, or none are wanted. `texts`: the
    text store that was given beside the demonstrations.
    """

    config: DataConfig
    stores: JoinedStores
    io: HeadIO
    features: tuple[str, ...]
    state: tuple[str, ...]
    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    copies: int = 0
    texts: TextTable | None = None

    def rows(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return all rows of some episodes, in order."""
        table = self.stores.first.episodes
        parts = [np.arange(start, start + n) for start, n in zip(table.row_start, table.length, strict=True)]
        return np.concatenate([parts[episode] for episode in episodes.tolist()])

    def actions(self, episodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the actions of some episodes, float32 [N, A], in the data's units; of chunks every valid step."""
        rows = self.rows(episodes)
        actions = self._column("")[rows].astype(np.float32)
        if self.config.dims is not None:
            actions = actions[..., list(self.config.dims)]
        return actions if self.io.chunk is None else actions[self._column("_valid")[rows]]

    def action_rows(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of the first store that each of `actions` is from, int64 [N]."""
        rows = self.rows(episodes)
        return rows if self.io.chunk is None else np.repeat(rows, self._column("_valid")[rows].sum(axis=1))

    def action_dims(self, episodes: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Return which dimensions of `actions` are real, bool [N, A]; None where all are."""
        name = f"{self.config.target}_dims"
        if self.config.dims is not None:
            return None
        return self.stores.first.steps(name)[self.rows(episodes)] if name in self.stores.first.manifest.steps else None

    def _column(self, suffix: str) -> NDArray[Any]:
        return self.stores.first.steps(self.config.target + suffix)

    def states(self, episodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the state of some episodes, float32 [N, S]; S is 0 where none is used."""
        rows = self.rows(episodes)
        columns = [self.stores.first.steps(name)[rows].reshape(len(rows), -1) for name in self.state]
        return np.concatenate([np.empty((len(rows), 0)), *columns], axis=1).astype(np.float32)

    def channel_statistics(self, feature: str) -> tuple[NDArray[np.float64], NDArray[np.float64], DtypeName]:
        """Return mean and standard deviation [C] of a feature over its whole store, and the dtype it is stored in."""
        statistics = self.stores.stores[self.stores.owner[feature]].statistics(feature)
        return statistics.mean, statistics.std, self.stores.feature_info(feature).dtype

    def batches(
        self,
        episodes: NDArray[np.int64],
        window: WindowSpec,
        batch_size: int,
        *,
        pin: bool,
        augment: bool = False,
        reads: Mapping[str, int] | None = None,
    ) -> TensorBatches:
        """Return batches over all windows of some episodes; with `augment`, shuffled ones draw from the copies.

        `reads`: the features to read and how many frames of each; None: all of them, n_obs frames.
        """
        if self.io.chunk is not None:
            if window.action_offset:
                raise UsageError(
                    f"actions from {-window.action_offset} steps before the present on, over {self.config.target!r}",
                    expected="steps from the present on: they are all that a row holds",
                    fix=f"--set model.n_obs=1 --set model.horizon={self.io.chunk}",
                )
            if window.horizon != self.io.chunk:
                raise UsageError(
                    f"a horizon of {window.horizon} over {self.config.target!r}",
                    expected=f"{self.io.chunk}, the steps that each row holds",
                    fix=f"--set model.horizon={self.io.chunk}",
                )
            window = window.model_copy(update={"horizon": 1})
        index = WindowIndex(self.stores.first.episodes, episodes, window)
        frames = dict.fromkeys(self.features, window.n_obs) if reads is None else dict(reads)
        frames |= {f"{name}_mask": count for name, count in frames.items() if self.io.features[name].masked}
        batches = WindowBatches(
            self.stores,
            index,
            features=frames,
            obs_steps=self.state,
            action_steps=label_columns(self.config.target, self.stores.first.manifest.steps),
            batch_size=batch_size,
            verify=self.config.verify,
            allocate=_allocate_pinned if pin else np.empty,
            shuffle="blocks" if self.config.shuffle == "blocks" else "global",
            copies=self.copies if augment else 0,
        )
        dtypes = {name: self.stores.feature_info(name).dtype for name in frames}
        return TensorBatches(batches, self.state, dtypes, self.config.target, self.io, self.config.dims)


def open_data(config: DataConfig) -> HeadData:
    """Open and join the stores, choose features and state, split the episodes.

    Raises `UsageError` for names that are not there, `StoreError` and `FingerprintError` as the stores do, `DataError`
    for random weights that were not asked for and for actions that are not finite.
    """
    if not config.stores:
        raise UsageError("no store given", fix="--store stores/NAME")
    opened = [open_store(path, allow_partial=config.allow_partial, remote=config.remote) for path in config.stores]
    texts = [TextTable(store) for store in opened if is_text_store(store)]
    shown = [store for store in opened if not is_text_store(store)]
    if not shown or len(texts) > 1:
        found = f"{len(shown)} stores of demonstrations and {len(texts)} of instructions"
        raise UsageError(found, expected="one or more of demonstrations, and at most one of instructions")
    for store in opened:
        if store.manifest.random_weights and not config.random_weights:
            raise DataError(
                f"{store.place} was made with random weights",
                expected="features of trained weights",
                fix="--set data.random_weights=true, if this is a test of the pipeline",
            )
        if store.skipped_episodes:
            total = len(store.episodes) + len(store.skipped_episodes.keys() - set(store.episodes.ids))
            log.warning("%s was made without %d of %d episodes", store.place, len(store.skipped_episodes), total)
    stores = join_stores(shown)
    first = stores.first
    steps = first.manifest.steps
    masks = {f"{name}_mask" for name in stores.owner} & stores.owner.keys()
    features = config.features if config.features is not None else tuple(n for n in stores.owner if n not in masks)
    state = config.state if config.state is not None else tuple(name for name, s in steps.items() if s.role == "state")
    for name in state:
        if name not in steps or steps[name].role == "action" or name == config.target:
            known = ", ".join(key for key, step in steps.items() if step.role != "action")
            raise UsageError(f"data.state names {name!r}", expected=f"one of {known}")
    target = target_info(config.target, first)
    dims = episode_dims(config.target, first, stores.usable)
    usable = stores.usable if config.dims is None else stores.usable & _of_group(config, dims, target.shape[-1], first)
    training, validation = split_episodes(usable, first.episodes.ids, config.validation, config.split_seed)
    widths = {name: int(np.prod(steps[name].shape)) for name in state}
    columns = range(target.shape[-1]) if config.dims is None else config.dims
    io = HeadIO(
        action_dim=len(columns),
        action_names=tuple(target.names[column] for column in columns) if target.names else (),
        state_dim=sum(widths.values()),
        state_names=tuple(
            f"{name}.{part}"
            for name in state
            for part in (steps[name].names or tuple(str(index) for index in range(widths[name])))
        ),
        features={name: feature_io(stores, name) for name in features},
        tasks=first.episodes.tasks,
        labels=tuple(dict(label) for label in first.episodes.labels),
        text=texts[0].io() if texts else None,
        task_dims=()
        if dims is None
        else task_dims(dims[usable][:, list(columns)], first.episodes.task[usable], len(first.episodes.tasks)),
        chunk=target.shape[0] if len(target.shape) == 2 else None,
    )
    copies = stores.copies(features) if config.augment else 0
    if config.shuffle == "auto":
        config = config.model_copy(update={"shuffle": _shuffle_for(stores, features, copies)})
    data = HeadData(config, stores, io, features, state, training, validation, copies, texts[0] if texts else None)
    if not np.isfinite(data.actions(np.flatnonzero(usable))).all():
        raise DataError(f"{first.place} holds actions that are not finite", fix=f"vla verify {first.place}")
    return data


def _of_group(config: DataConfig, dims: NDArray[np.bool_] | None, width: int, store: Store) -> NDArray[np.bool_]:
    """Return which episodes have exactly the dimensions `config.dims`."""
    wanted = np.isin(np.arange(width), config.dims or ())
    found = np.ones((len(store.episodes), width), bool) if dims is None else dims
    chosen: NDArray[np.bool_] = (found == wanted).all(axis=1)
    if not chosen.any() or wanted.sum() != len(config.dims or ()):
        sets = sorted({tuple(np.flatnonzero(row).tolist()) for row in found})
        raise UsageError(f"no episode of {store.place} has the action dimensions {config.dims}", expected=f"of {sets}")
    return chosen


def _shuffle_for(stores: JoinedStores, features: tuple[str, ...], copies: int) -> Shuffle:
    size = 0
    for name in features:
        arrays = 1 + min(copies, stores.stores[stores.owner[name]].manifest.copies)
        size += stores.first.manifest.rows * stores.feature_info(name).row_bytes * arrays
    return "blocks" if size > CACHE_SHARE * memory_limit() else "global"


def _allocate_pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array: NDArray[Any] = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True).numpy()
    return array
