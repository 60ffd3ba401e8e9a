"""Stores of one source side by side, matched by episode id and frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.batches import WindowBatches
from vla.stores.errors import DataError, FingerprintError, UsageError
from vla.stores.join import join_stores
from vla.stores.windows import WindowIndex, WindowSpec

OTHER = {"tokens": ((2, 5), "float32")}


def rows_of(made: Any, episode: str) -> slice:
    at = made.episodes.ids.index(episode)
    start = int(made.episodes.row_start[at])
    return slice(start, start + int(made.episodes.length[at]))


def test_features_meet_by_episode_and_frame_whatever_the_order_and_the_units(
    tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    one = make_store(tmp_path / "one", lengths=(5, 9, 6), ids=("a", "b", "c"), unit_rows=8)
    two = make_store(
        tmp_path / "two", lengths=(6, 3, 5, 9), ids=("c", "only-here", "a", "b"), unit_rows=5, features=OTHER
    )
    joined = join_stores([one.open(), two.open()])
    assert joined.usable.tolist() == [True, True, True]
    reader = joined.reader("tokens")
    out = np.empty((20, 2, 5), np.float32)
    reader.read(np.arange(20), out)
    reader.close()
    for episode in ("a", "b", "c"):
        np.testing.assert_array_equal(out[rows_of(one, episode)], two.features["tokens"][rows_of(two, episode)])


def test_windows_over_joined_stores_hold_both_features(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one", ids=("a", "b", "c"))
    two = make_store(tmp_path / "two", lengths=(6, 9, 5), ids=("c", "b", "a"), features=OTHER)
    joined = join_stores([one.open(), two.open()])
    index = WindowIndex(joined.first.episodes, np.flatnonzero(joined.usable), WindowSpec(n_obs=2))
    batches = WindowBatches(
        joined, index, features=("grid", "tokens"), obs_steps=(), action_steps=("action",), batch_size=20
    )
    batch = next(iter(batches.in_order()))
    for position, (episode, frame) in enumerate([(e, f) for e, n in (("a", 5), ("b", 9), ("c", 6)) for f in range(n)]):
        np.testing.assert_array_equal(
            batch.features["grid"][position, 1], one.features["grid"][rows_of(one, episode)][frame]
        )
        np.testing.assert_array_equal(
            batch.features["tokens"][position, 1], two.features["tokens"][rows_of(two, episode)][frame]
        )


def test_an_episode_that_one_store_lacks_is_not_usable(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one", ids=("a", "b", "c"))
    two = make_store(tmp_path / "two", lengths=(6, 5), ids=("c", "a"), features=OTHER)
    joined = join_stores([one.open(), two.open()])
    assert joined.usable.tolist() == [True, False, True]
    reader = joined.reader("tokens")
    with pytest.raises(IndexError, match=r"rows -1\.\.-1 of 11"):
        reader.read(np.array([6]), np.empty((1, 2, 5), np.float32))


def test_an_episode_whose_units_are_missing_in_one_store_is_not_usable(
    tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    one = make_store(tmp_path / "one")
    two = make_store(tmp_path / "two", features=OTHER, units=[0])
    joined = join_stores([one.open(), two.open(allow_partial=True)])
    assert joined.usable.tolist() == [True, False, False]


def test_stores_of_another_source_are_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one")
    two = make_store(tmp_path / "two", features=OTHER, source="source-b")
    with pytest.raises(FingerprintError, match=r"two was made from another source than .*one \(source\.digest"):
        join_stores([one.open(), two.open()])


def test_stores_that_do_not_say_their_source_are_not_joined(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one", fingerprint={"source": {}})
    two = make_store(tmp_path / "two", features=OTHER, fingerprint={"source": {}})
    with pytest.raises(FingerprintError, match="another source"):
        join_stores([one.open(), two.open()])
    assert join_stores([one.open()]).usable.all()


def test_the_same_feature_twice_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one, two = make_store(tmp_path / "one"), make_store(tmp_path / "two")
    with pytest.raises(UsageError, match="both hold 'grid'"):
        join_stores([one.open(), two.open()])


def test_an_episode_of_two_lengths_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one")
    two = make_store(tmp_path / "two", lengths=(5, 8, 6), features=OTHER)
    with pytest.raises(DataError, match=r"'episode-1': 9 frames in .* 8 in"):
        join_stores([one.open(), two.open()])


def test_stores_without_a_common_episode_are_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    one = make_store(tmp_path / "one", ids=("a", "b", "c"))
    two = make_store(tmp_path / "two", ids=("d", "e", "f"), features=OTHER)
    with pytest.raises(DataError, match="share no usable episode"):
        join_stores([one.open(), two.open()])


def test_an_unknown_feature_names_those_there(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    joined = join_stores([make_store(tmp_path / "one").open()])
    with pytest.raises(UsageError, match=r"no store has feature 'x'; expected one of grid"):
        joined.reader("x")
