"""Windows against a brute force that a reader can check by eye, and the split by episode."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.stores.errors import DataError, UsageError
from vla.stores.tables import EpisodeTable
from vla.stores.windows import WindowIndex, WindowSpec, split_episodes


def brute_force(
    start: int, length: int, row: int, spec: WindowSpec
) -> tuple[list[int], list[bool], list[int], list[bool]]:
    obs = [row - spec.n_obs + 1 + i for i in range(spec.n_obs)]
    action = [row + spec.action_offset + i for i in range(spec.horizon)]
    inside = range(start, start + length)
    near = lambda wanted: min(max(wanted, inside[0]), inside[-1])  # noqa: E731
    return [near(r) for r in obs], [r in inside for r in obs], [near(r) for r in action], [r in inside for r in action]


def table_of(lengths: list[int]) -> EpisodeTable:
    return EpisodeTable.plan(
        [f"e{i}" for i in range(len(lengths))], lengths, [f"t{i % 3}" for i in range(len(lengths))]
    )


specs = st.builds(WindowSpec, n_obs=st.integers(1, 6), horizon=st.integers(1, 32), action_offset=st.integers(-6, 0))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), spec=specs, data=st.data())
@settings(max_examples=1_000)
def test_windows_equal_a_brute_force(lengths: list[int], spec: WindowSpec, data: st.DataObject) -> None:
    compare_with_brute_force(lengths, spec, data)


@pytest.mark.long
@pytest.mark.timeout(1800)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), spec=specs, data=st.data())
@settings(max_examples=10_000, derandomize=False)
def test_windows_equal_a_brute_force_many_times(lengths: list[int], spec: WindowSpec, data: st.DataObject) -> None:
    compare_with_brute_force(lengths, spec, data)


def compare_with_brute_force(lengths: list[int], spec: WindowSpec, data: st.DataObject) -> None:
    table = table_of(lengths)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    index = WindowIndex(table, np.array(chosen), spec)
    rows = index.rows(np.arange(len(index)))
    wanted = [
        (*brute_force(int(table.row_start[e]), lengths[e], int(table.row_start[e]) + i, spec), int(table.task[e]))
        for e in chosen
        for i in range(lengths[e])
    ]
    assert len(index) == len(wanted)
    found = zip(
        *(part.tolist() for part in (rows.obs, rows.obs_valid, rows.action, rows.action_valid, rows.task)), strict=True
    )
    assert list(found) == wanted


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), spec=specs)
def test_no_observation_lies_in_the_future_or_in_another_episode(lengths: list[int], spec: WindowSpec) -> None:
    table = table_of(lengths)
    index = WindowIndex(table, np.arange(len(lengths)), spec)
    rows = index.rows(np.arange(len(index)))
    own = np.repeat(np.arange(len(lengths)), lengths)
    assert (rows.obs <= np.arange(len(own))[:, None]).all()
    assert (own[rows.obs] == own[:, None]).all()
    assert (own[rows.action] == own[:, None]).all()
    assert rows.obs_valid[:, -1].all()


def test_windows_of_a_subset_in_any_order_are_those_of_the_whole() -> None:
    index = WindowIndex(table_of([4, 1, 7]), np.arange(3), WindowSpec(n_obs=3, horizon=5, action_offset=-2))
    every, some = index.rows(np.arange(12)), np.array([11, 0, 0, 5])
    picked = index.rows(some)
    for name in ("obs", "obs_valid", "action", "action_valid", "task"):
        np.testing.assert_array_equal(getattr(picked, name), getattr(every, name)[some])


@pytest.mark.parametrize("wrong", [{"n_obs": 0}, {"horizon": 0}, {"action_offset": 1}])
def test_a_window_without_frames_or_with_future_labels_first_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        WindowSpec.build(wrong)


def test_windows_need_an_episode() -> None:
    with pytest.raises(DataError, match="no episode"):
        WindowIndex(table_of([3]), np.array([], np.int64), WindowSpec())


@given(
    count=st.integers(2, 40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_split_is_disjoint_complete_and_independent_of_order(
    count: int, share: float, seed: int, shuffle: object
) -> None:
    ids = [f"episode-{number}" for number in range(count)]
    usable = np.ones(count, bool)
    usable[count // 3] = count < 3
    train, held_out = split_episodes(usable, tuple(ids), share, seed)
    assert set(train) | set(held_out) == set(np.flatnonzero(usable))
    assert not set(train) & set(held_out)
    assert len(train) >= 1
    assert len(held_out) >= 1
    order = list(range(count))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    again = split_episodes(usable[order], tuple(ids[i] for i in order), share, seed)
    assert {ids[order[position]] for position in again[1]} == {ids[position] for position in held_out}


def test_the_split_follows_its_seed_and_its_share() -> None:
    ids = tuple(f"e{number}" for number in range(50))
    splits = {tuple(split_episodes(np.ones(50, bool), ids, 0.2, seed)[1]) for seed in range(5)}
    assert len(splits) == 5
    assert {len(split) for split in splits} == {10}
    train, held_out = split_episodes(np.ones(50, bool), ids, 0.0, 0)
    assert (len(train), len(held_out)) == (50, 0)


def test_one_episode_cannot_be_split() -> None:
    usable = np.array([False, True, False])
    with pytest.raises(DataError, match="1 usable episodes"):
        split_episodes(usable, ("a", "b", "c"), 0.1, 0)
    assert split_episodes(usable, ("a", "b", "c"), 0.0, 0)[0].tolist() == [1]
    with pytest.raises(DataError, match="0 usable episodes"):
        split_episodes(np.zeros(3, bool), ("a", "b", "c"), 0.0, 0)
