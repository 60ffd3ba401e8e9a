"""Stores as a source: cached features in, for backbones that work on other backbones' features.

The source that a store was made from stays the source of what is made from the store, so that both join; what the
cached features depend on enters the new fingerprint as `backbone.inputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, ExtrasRecord, SourceIndex, StepSpec
from vla.stores.dtypes import decode
from vla.stores.errors import SourceError, UsageError
from vla.stores.join import JoinedReader, JoinedStores, join_stores
from vla.stores.store import open_store
from vla.stores.user_given import UserGiven

BLOCK = 32
"""Frames read at once: a few megabytes of features, and few calls."""


class StoreSource:
    """One or more stores of the same demonstrations as a `ViewSource`.

    `join` names further stores, whose features stand beside the first's. Each feature is an extra of its own name,
    given per view as float32 (float16 as it is, whole numbers as they are) of the shape that the store keeps without
    its view axis. There are no pictures: `frames` refuses. Raises `StoreError` where a store is not complete,
    `FingerprintError` where the stores are of different demonstrations.
    """

    def __init__(self, root: Path | str, *, join: Annotated[Sequence[str], UserGiven()] = ()) -> None:
        self._stores: JoinedStores = join_stores([open_store(path) for path in (root, *join)])
        manifests = [store.manifest for store in self._stores.stores]
        if any(manifest.cameras != manifests[0].cameras for manifest in manifests):
            raise UsageError("the stores hold different cameras", expected="the same cameras in the same order")
        self._episodes = np.flatnonzero(self._stores.usable)

    def index(self) -> SourceIndex:
        """See `Source.index`."""
        first = self._stores.first
        table, origin = first.episodes, first.manifest.fingerprint["source"]
        left_out = {table.ids[at]: "left out of a store" for at in np.flatnonzero(~self._stores.usable)}
        return SourceIndex(
            kind=origin["kind"],
            root=", ".join(str(store.root) for store in self._stores.stores),
            fps=first.manifest.fps,
            cameras=first.manifest.cameras,
            sizes=first.manifest.picture_sizes,
            episodes=tuple(
                Episode(table.ids[at], int(table.length[at]), table.tasks[int(table.task[at])], table.texts(int(at)))
                for at in self._episodes
            ),
            steps={
                name: StepSpec(info.shape, info.dtype, info.role, info.names)
                for name, info in first.manifest.steps.items()
            },
            licence=str(first.manifest.provenance["source_licence"]),
            mapping=origin["mapping"],
            skipped=left_out | first.skipped,
            extras=tuple(self._stores.owner),
            pictures=False,
            stores=tuple(store.place for store in self._stores.stores),
        )

    def digest(self) -> str:
        """Return the digest of the demonstrations that the stores were made from."""
        return str(self._stores.first.manifest.fingerprint["source"]["digest"])

    def describe(self, names: Sequence[str]) -> ExtrasRecord:
        """See `ViewSource.describe`."""
        identity, recipes, random = {}, {}, False
        for name in names:
            self._stores.feature_info(name)
            store = self._stores.stores[self._stores.owner[name]]
            manifest, scales = store.manifest, store.live_scales(name)
            identity[name] = {
                "backbone": manifest.fingerprint["backbone"],
                "context": manifest.fingerprint["context"],
                "feature": manifest.fingerprint["features"][name],
            }
            recipes[name] = {
                "backbone": manifest.provenance["backbone"],
                "scales": None if scales is None else scales.tolist(),
            }
            random |= manifest.random_weights
        return ExtrasRecord(identity, recipes, random)

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """See `Source.steps`."""
        rows = self._rows(episode)
        return {name: values[rows] for name, values in self._steps.items()}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """Refuse with `SourceError`: a store holds no pictures."""
        raise SourceError(
            f"{self._stores.first.root} is a store: it holds features, not pictures",
            expected="the demonstrations",
            fix="--source DIR",
        )

    def views(
        self, episode: int, start: int, stop: int, names: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, NDArray[Any]], ...]]:
        """See `ViewSource.views`."""
        rows = self._rows(episode)
        if not 0 <= start <= stop <= len(rows):
            raise SourceError(f"frames {start} to {stop} of episode {episode}", expected=f"0 to {len(rows)}")
        readers = {name: self._stores.reader(name) for name in names}
        try:
            for at in range(start, stop, BLOCK):
                block = rows[at : min(at + BLOCK, stop)]
                values = {name: self._read(name, reader, block) for name, reader in readers.items()}
                for frame in range(len(block)):
                    views = range(len(self._stores.first.manifest.cameras))
                    yield tuple({name: values[name][frame, view] for name in names} for view in views)
        finally:
            for reader in readers.values():
                reader.close()

    @cached_property
    def _steps(self) -> dict[str, NDArray[Any]]:
        first = self._stores.first
        return {name: first.steps(name) for name in first.manifest.steps}

    def _read(self, name: str, reader: JoinedReader, rows: NDArray[np.int64]) -> NDArray[Any]:
        info = self._stores.feature_info(name)
        stored = np.empty((len(rows), *info.shape), info.stored)
        reader.read(rows, stored)
        scales = reader.scales(rows)
        if scales is not None:
            scales = scales.reshape(len(rows), *(1,) * (stored.ndim - 2), -1)
        return decode(info.dtype, stored, scales)

    def _rows(self, episode: int) -> NDArray[np.int64]:
        table, at = self._stores.first.episodes, int(self._episodes[episode])
        return int(table.row_start[at]) + np.arange(int(table.length[at]))
