"""`vla train-head --online`: the backbones in the loop, for pictures augmented anew in every batch, and to compare.

Windows, split, order and statistics are those of the stores, and the validation reads the stores: one training path.
Only the features of training batches come from the source's frames, through the backbones that made the stores, rebuilt
and compared by identity, and are rounded as the stores round. Pictures are read and made ready in a thread; the
backbones run between the steps, on the device of the training, without gradients.

What is drawn for a window is a function of (seed, number of the batch, place in the batch), so that a resumed run goes
on with the same pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from vla.featurize.augment import NO_COPIES, AugmentConfig, adjust, draw, require_augmentable
from vla.featurize.backbones.base import Backbone
from vla.featurize.batch_size import ON_CPU
from vla.featurize.rebuild import BackboneSettings, rebuild_backbone, require_known
from vla.featurize.sources.base import Source
from vla.featurize.sources.registry import (
    SOURCES,
    common_options,
    known_rate,
    open_source,
    recognise,
    resolve_options,
    shipped,
)
from vla.featurize.views import read_views
from vla.heads.batch import Batch
from vla.heads.data import HeadData
from vla.heads.model import HeadModel
from vla.heads.tensor_batches import TensorBatches
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.background import iterate_ahead
from vla.stores.errors import SourceError, UsageError
from vla.stores.remote.options import is_url
from vla.stores.settings import Settings
from vla.stores.store import Store, open_store
from vla.stores.user_given import set_flag
from vla.training.checkpoint import read_object
from vla.training.loop import FitReport
from vla.training.storage import live_scales, round_trip_dtype
from vla.training.torch_device import choose_device

AHEAD = 2
"""Batches of pictures waiting for the backbones."""


class OnlineConfig(Settings):
    """What `--online` can be told.

    `source`: the demonstrations, which have to be those of the stores, by digest; only made up ones and the data set
    that ships need not be named. `source_options`: of their settings those that name files. `augment`: what is done to
    pictures (`AugmentConfig`), anew in every batch; of `copies` K + 1 windows one, on average, sees its pictures as
    they are, so that 0 augments nothing. `batch_size`: time steps that a backbone is given at once.
    `freeze_backbone`: true, and nothing else.
    """

    source: str | None = None
    source_options: dict[str, Any] = {}
    augment: AugmentConfig = NO_COPIES
    batch_size: int = Field(ON_CPU, ge=1)
    freeze_backbone: bool = True

    @field_validator("freeze_backbone")
    @classmethod
    def _stays_frozen(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "the head's statistics, its validation and every rollout take the features that the stores hold, and a "
                "backbone that trains makes others from its first step on; fine-tune it elsewhere, then "
                "`vla featurize --weights` it"
            )
        return value


class OnlineTrainConfig(HeadTrainConfig):
    """Everything that `vla train-head --online` can be told. `online`: see `OnlineConfig`. `backbones` {name: {option:
    value}}: checkouts and weights of the stores' backbones; a store records them and never chooses."""

    online: OnlineConfig = OnlineConfig()
    backbones: BackboneSettings = {}


def train_online(
    config: OnlineTrainConfig, run_dir: Path | str, *, resume: bool = False, overwrite: bool = False, **hooks: Any
) -> FitReport:
    """Train a head with its backbones in the loop; see `train_head`, whose arguments `hooks` are.

    Raises `UsageError` where a run that was begun from cached features is to be resumed, and what opening the source
    and rebuilding the backbones raise.
    """
    run_dir = Path(run_dir)
    begun = run_dir / "run.json"
    if resume and begun.is_file() and not read_object(begun).get("artefact", {}).get("online"):
        raise UsageError(
            f"{run_dir} was begun from cached features",
            expected="the same features for all of a run",
            fix="--resume without --online, or another --out",
        )
    supplier = OnlineFeatures(
        config.online, seed=config.train.seed, device=config.train.device, backbones=config.backbones
    )
    return train_head(config, run_dir, resume=resume, overwrite=overwrite, supplier=supplier, **hooks)


@dataclass(frozen=True)
class _Live:
    """One store's backbone on its source. `features`: what the head reads of it, with how many frames of each."""

    backbone: Backbone
    source: Source
    store: Store
    rows: NDArray[np.int64]
    """Rows of this store for rows of the first; -1 where it has none."""
    features: Mapping[str, int]
    masks: Mapping[str, str]
    scales: Mapping[str, tuple[float, ...]]
    positions: Mapping[str, int]
    """Episode id -> its position in the source."""

    @property
    def frames(self) -> int:
        """The most frames that a window reads of this store."""
        return max(self.features.values())


@dataclass(frozen=True)
class _Ready:
    """Inputs of one backbone for a batch: `inputs` [U, (C + 1,) V, …] distinct ones, `place` int64 [B, frames]."""

    inputs: torch.Tensor
    place: NDArray[np.int64]


_Key = tuple[int, int]
"""A row of the store, and the place in the batch of the window whose augmentation it has; -1 without any."""


class OnlineFeatures:
    """A `Supplier` of `train_head`. `seed` is the training's; `device` its `train.device`; `backbones`: see
    `OnlineTrainConfig`."""

    def __init__(
        self,
        config: OnlineConfig,
        *,
        seed: int,
        device: str,
        backbones: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.identity: Mapping[str, Any] = {
            "augment": config.augment.identity(),
            "backbone": "in the loop, frozen",
        }
        self._config, self._seed, self._device_name = config, seed, device
        self._backbones = backbones or {}
        self._live: list[_Live] = []

    def open(self, data: HeadData, model: HeadModel) -> None:
        """Open the source and rebuild the backbones of all features that the head reads."""
        sources: dict[str, Source] = {}
        read = {data.stores.owner[name] for name in model.reads}
        recipes = {at: data.stores.stores[at].manifest.provenance["backbone"] for at in sorted(read)}
        require_known(self._backbones, [(recipes[at], data.stores.stores[at].manifest.features) for at in recipes])
        for position, recipe in recipes.items():
            store = data.stores.stores[position]
            held = {name: count for name, count in model.reads.items() if data.stores.owner[name] == position}
            identity, features = store.manifest.fingerprint["backbone"], tuple(store.manifest.features)
            backbone = rebuild_backbone(recipe, identity, self._backbones, features=features)
            if self._config.augment.copies:
                require_augmentable(backbone.spec())
            place = self._config.source or str(store.manifest.provenance["source"])
            if place not in sources:
                sources[place] = open_demonstrations(store, self._config.source, self._config.source_options)
            source = sources[place]
            index = source.index()
            self._live.append(
                _Live(
                    backbone=backbone,
                    source=source,
                    store=store,
                    rows=data.stores.row_maps[position],
                    features=held,
                    masks={name: f"{name}_mask" for name in held if data.io.features[name].masked},
                    scales=live_scales(store, held),
                    positions={episode.id: at for at, episode in enumerate(index.episodes)},
                )
            )

    def supply(self, windows: TensorBatches, first: int, stride: int) -> Iterator[Batch]:
        """See `Supplier`."""
        device = choose_device(self._device_name, "train.device")
        for live in self._live:
            live.backbone.to(device)
        with closing(iterate_ahead(self._prepared(windows, first, stride), AHEAD)) as ahead:
            for batch, prepared in ahead:
                features: dict[str, torch.Tensor] = {}
                valid: dict[str, torch.Tensor] = {}
                for live, ready in zip(self._live, prepared, strict=True):
                    made = self._encode(live, ready.inputs)
                    place = torch.from_numpy(ready.place)
                    for name, count in live.features.items():
                        stored = round_trip_dtype(
                            made[name], live.store.feature_info(name).dtype, live.scales.get(name)
                        )
                        chosen = place[:, -count:].to(stored.device)
                        features[name] = stored[chosen]
                        if name in live.masks:
                            valid[name] = made[live.masks[name]].bool()[chosen]
                yield replace(batch.to(device), features=features, feature_valid=valid)

    def _prepared(self, windows: TensorBatches, first: int, stride: int) -> Iterator[tuple[Batch, list[_Ready]]]:
        """Yield batches without features, and the inputs of the backbones for each."""
        numbers = itertools.count(first, stride)
        for number, batch in zip(numbers, windows.shuffled(self._seed, first, stride), strict=False):
            rows = windows.observed(self._seed, number)
            yield batch, [self._read(live, rows, number) for live in self._live]

    def _read(self, live: _Live, rows: NDArray[np.int64], number: int) -> _Ready:
        """Read and preprocess what a backbone needs for the rows [B, N] of a batch; each distinct input once."""
        wanted = live.rows[rows[:, -live.frames :]]
        changed = self._changed(len(rows), number)
        keys = [[(row, at if changed[at] else -1) for row in window] for at, window in enumerate(wanted.tolist())]
        distinct = {key: at for at, key in enumerate(dict.fromkeys(itertools.chain(*keys)))}
        inputs = _Inputs(live, self._config.augment, (self._seed, number))
        return _Ready(
            torch.stack([inputs.of(key) for key in distinct]),
            np.array([[distinct[key] for key in window] for window in keys]),
        )

    def _changed(self, count: int, number: int) -> NDArray[np.bool_]:
        """Return which windows [B] of a batch are augmented: K of K + 1."""
        copies = self._config.augment.copies
        # The 2 tells this generator from those of the order and of the cached copies (stores/batches.py).
        return np.random.default_rng([self._seed, number, 2]).integers(0, copies + 1, count) > 0

    def _encode(self, live: _Live, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        size = self._config.batch_size
        wanted = {*live.features, *live.masks.values()}
        with torch.no_grad():
            parts = [live.backbone.encode(inputs[at : at + size]) for at in range(0, len(inputs), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in wanted}


class _Inputs:
    """The inputs of one backbone for one batch, frames read and preprocessed once however many windows share them."""

    def __init__(self, live: _Live, augment: AugmentConfig, drawn: tuple[int, int]) -> None:
        self._live, self._augment, self._drawn = live, augment, drawn
        self._spec = live.backbone.spec()
        self._views: dict[int, tuple[Any, ...]] = {}
        self._ready: dict[_Key, torch.Tensor] = {}

    def of(self, key: _Key) -> torch.Tensor:
        """Return [V, …] of one time step, or [C + 1, V, …] with the frames that the backbone looks back on."""
        row, window = key
        table, context = self._live.store.episodes, self._spec.context
        start = int(table.row_start[self._episode(row)])
        past = [max(row - back, start) for back in range(context, -1, -1)]
        seen = [self._frame((frame, window)) for frame in past]
        return torch.stack(seen) if context else seen[0]

    def _frame(self, key: _Key) -> torch.Tensor:
        if key not in self._ready:
            row, window = key
            views = self._seen(row)
            if window >= 0:
                table, at = self._live.store.episodes, self._episode(row)
                frame, copy = row - int(table.row_start[at]), (*self._drawn, window)
                cameras = self._live.store.manifest.cameras
                drawn = (draw(self._augment, table.ids[at], frame, camera, copy) for camera in cameras)
                views = tuple(adjust(view, how) for view, how in zip(views, drawn, strict=True))
            self._ready[key] = torch.stack([self._live.backbone.preprocess(view) for view in views])
        return self._ready[key]

    def _seen(self, row: int) -> tuple[Any, ...]:
        if row not in self._views:
            table, at = self._live.store.episodes, self._episode(row)
            frame = row - int(table.row_start[at])
            episode, task = self._live.positions[table.ids[at]], table.tasks[int(table.task[at])]
            (self._views[row],) = read_views(self._live.source, self._spec, episode, task, frame, frame + 1)
        return self._views[row]

    def _episode(self, row: int) -> int:
        return int(np.searchsorted(self._live.store.episodes.row_start, row, side="right")) - 1


def open_demonstrations(store: Store, place: str | None = None, options: Mapping[str, Any] | None = None) -> Source:
    """Return the demonstrations at `place`, which have to be those that a store was made from.

    Without a `place` only demonstrations that no path names are opened: made up ones, and the data set that ships. A
    store that was made from stores leads to where those were made from. The source's recorded settings are used, but
    for those that reach the disk: these are `options`. Raises `UsageError` where a place or such a setting is lacking,
    `SourceError` where the demonstrations are not there or are others, by digest.
    """
    fingerprint, provenance = store.manifest.fingerprint["source"], store.manifest.provenance
    root = str(provenance["source"])
    first = root.partition(", ")[0]
    if not is_url(first) and recognise(Path(first)) == "store":
        return open_demonstrations(_first_store(first, store), place, options)
    given = _source_record(store, root)
    kind, colon, _ = given.given.partition(":")
    folder = not (kind in SOURCES and not SOURCES[kind].markers)
    if place is None and folder and not _ships(root):
        raise UsageError(
            f"{store.place} was made from {root}, and no store chooses what is read here",
            expected="your own word",
            fix=set_flag("online.source", f"{kind}:{root}" if kind in SOURCES and colon else root),
        )
    fix = "--set online.source=DIR"
    try:
        opened = place or (
            f"{kind}:{root}" if folder and kind in SOURCES and colon else root if folder else given.given
        )
        asked = {"artefact": store.place, "prefix": "online.source_options."}
        settings = resolve_options(opened, given.options, options or {}, **asked)
        rate = known_rate(opened, store.manifest.fps)  # stores made while `fps` had a default do not list it
        source = open_source(opened, **{**rate, **common_options(map=given.map), **settings})
        found = source.digest()
    except SourceError as error:
        what = f"the demonstrations of {store.place}: {error.found}"
        raise SourceError(what, expected=error.expected, fix=fix) from None
    if found != fingerprint["digest"]:
        raise SourceError(
            f"{place or root} holds other demonstrations than {store.place} was made from (source.digest differs)",
            expected=f"{fingerprint['digest']}, found {found}",
            fix=fix,
        )
    return source


class _SourceRecord(Settings):
    """How the demonstrations of a store were opened."""

    given: str
    map: dict[str, str] = {}
    options: dict[str, Any] = {}


def _source_record(store: Store, root: str) -> _SourceRecord:
    """Return what a store records; old stores know the mapping alone. Raises `SourceError` for another shape."""
    mapping = store.manifest.fingerprint["source"]["mapping"]
    recorded = store.manifest.provenance["backbone"].get("source", {"given": root, "map": mapping})
    try:
        return _SourceRecord.build(recorded, where=f"the source of {store.place}")
    except UsageError as error:  # an artefact's mistake, not the user's
        raise SourceError(str(error)) from None


def _first_store(path: str, store: Store) -> Store:
    """Open the store that another was made from, for its manifest. Raises `SourceError` where it is of other
    demonstrations: the path comes from the artefact."""
    before = open_store(path)
    ours, theirs = (each.manifest.fingerprint["source"]["digest"] for each in (store, before))
    if ours != theirs:
        raise SourceError(f"{path} is not what {store.place} was made from (source.digest differs)")
    return before


def _ships(root: str) -> bool:
    """Return whether `root` is the data set that ships."""
    try:
        return Path(root).resolve() == shipped().resolve()
    except UsageError:  # an installed package has none
        return False
