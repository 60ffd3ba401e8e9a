"""Several stores of one source as one: rows matched by episode id and frame, features side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.stores.copies import PlaceReader
from vla.stores.errors import DataError, FingerprintError, UsageError
from vla.stores.fingerprint import require_equal
from vla.stores.manifest import FeatureInfo, copy_name
from vla.stores.reader import FeatureReader, Verify
from vla.stores.store import Store


@dataclass(frozen=True)
class JoinedStores:
    """One or more stores of the same demonstrations. Rows, episodes and steps are those of the first.

    `owner[feature]` is the position of the store that holds it (its augmented copies are not named here); `row_maps[i]`
    int64 [rows] takes rows of the first store to rows of store i (-1 where it has none). `usable` marks the episodes
    that every store can serve.
    """

    stores: tuple[Store, ...]
    owner: dict[str, int]
    row_maps: tuple[NDArray[np.int64], ...]
    usable: NDArray[np.bool_]

    @property
    def first(self) -> Store:
        """The store whose rows and episodes count."""
        return self.stores[0]

    def feature_info(self, feature: str) -> FeatureInfo:
        """Return the `FeatureInfo` of a feature, whichever store holds it. Raises `UsageError` naming those there."""
        if feature not in self.owner:
            raise UsageError(f"no store has feature {feature!r}", expected=f"one of {', '.join(sorted(self.owner))}")
        return self.stores[self.owner[feature]].feature_info(feature)

    def copies(self, features: Iterable[str]) -> int:
        """Return K, how many augmented copies those of the features have that have any; 0 where none has.

        Raises `FingerprintError` where two stores were augmented differently: copy k of the one would not show the
        picture that copy k of the other shows.
        """
        held = [self.stores[position] for position in sorted({self.owner[name] for name in features})]
        augmented = [store for store in held if store.manifest.copies]
        for other in augmented[1:]:
            require_equal(
                other.manifest.augment,
                augmented[0].manifest.augment,
                what=f"the augmentation of {other.root} beside {augmented[0].root}",
                fix="stores of one --augment, or --set data.augment=false",
            )
        return augmented[0].manifest.copies if augmented else 0

    def reader(self, feature: str, verify: Verify = "first", copy: int = 0) -> JoinedReader:
        """Return a reader of a feature, or of one of its augmented copies, that takes rows of the first store."""
        self.feature_info(feature)
        position, array = self.owner[feature], copy_name(feature, copy)
        mapped, store = self.row_maps[position] if position else None, self.stores[position]
        scales = store.scales(array)
        of_row = None if scales is None else RowScales(scales, store.manifest.unit_rows)
        return JoinedReader(store.reader(array, verify), mapped, of_row)

    def place_reader(self, feature: str, verify: Verify = "first") -> PlaceReader:
        """Return a reader of a feature and its augmented copies by places of the first store (see copies.py)."""
        self.feature_info(feature)
        copies = self.stores[self.owner[feature]].manifest.copies
        readers = [self.reader(feature, verify, copy) for copy in range(copies + 1)]
        return PlaceReader(readers, self.first.manifest.rows)


@dataclass(frozen=True)
class RowScales:
    """Scales of an int8 feature by unit, float32 [units, C]; a unit has `unit_rows` rows."""

    scales: NDArray[np.float32]
    unit_rows: int


class JoinedReader:
    """A `FeatureReader` addressed by the rows of the first store."""

    def __init__(
        self, reader: FeatureReader, row_map: NDArray[np.int64] | None, scales: RowScales | None = None
    ) -> None:
        self._reader, self._row_map, self._scales = reader, row_map, scales

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """See `FeatureReader.read`."""
        self._reader.read(rows if self._row_map is None else self._row_map[rows], out)

    def scales(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return what int8 rows [n] are to be multiplied with, float32 [n, C]; None for other dtypes."""
        if self._scales is None:
            return None
        there = rows if self._row_map is None else self._row_map[rows]
        return self._scales.scales[there // self._scales.unit_rows]

    def extents(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """See `FeatureReader.extents`."""
        return self._reader.extents(rows if self._row_map is None else np.sort(self._row_map[rows]))

    def limit_files(self, count: int) -> None:
        """Hold at most `count` files open."""
        self._reader.files.most = count

    def close(self) -> None:
        """Close all files."""
        self._reader.close()


def join_stores(stores: Sequence[Store]) -> JoinedStores:
    """Join stores of one source.

    Raises `FingerprintError` where they were made from different sources, `UsageError` where two hold a feature of the
    same name, `DataError` where an episode's length differs.
    """
    first = stores[0]
    owner: dict[str, int] = {}
    maps = []
    usable = first.usable.copy()
    for position, store in enumerate(stores):
        if position:
            _require_same_source(first, store)
        for feature in store.manifest.plain:
            if feature in owner:
                other = stores[owner[feature]].place
                raise UsageError(
                    f"{other} and {store.place} both hold {feature!r}",
                    expected="features of different names",
                    fix=f"--store {other} without the other, or one of another backbone",
                )
            owner[feature] = position
        row_map, serves = _map_rows(first, store)
        maps.append(row_map)
        usable &= serves
    if not usable.any():
        raise DataError("the stores share no usable episode", expected="stores of the same episodes")
    return JoinedStores(tuple(stores), owner, tuple(maps), usable)


def _require_same_source(first: Store, other: Store) -> None:
    mine, theirs = (store.manifest.fingerprint.get("source", {}).get("digest") for store in (first, other))
    if mine is None or mine != theirs:
        raise FingerprintError(
            f"{other.place} was made from another source than {first.place} (source.digest differs)",
            expected="stores of one data set",
            fix="featurize both from the same --source",
        )


def _map_rows(first: Store, other: Store) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    position = {name: index for index, name in enumerate(other.episodes.ids)}
    row_map = np.full(first.manifest.rows, -1, np.int64)
    serves = np.zeros(len(first.episodes), bool)
    for index, name in enumerate(first.episodes.ids):
        there = position.get(name)
        if there is None or not other.usable[there]:
            continue
        length = int(first.episodes.length[index])
        if int(other.episodes.length[there]) != length:
            raise DataError(
                f"episode {name!r}: {length} frames in {first.place}, {other.episodes.length[there]} in {other.place}"
            )
        start, start_there = int(first.episodes.row_start[index]), int(other.episodes.row_start[there])
        row_map[start : start + length] = np.arange(start_there, start_there + length)
        serves[index] = True
    return row_map, serves
