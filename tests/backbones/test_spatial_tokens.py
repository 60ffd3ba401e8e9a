"""Voxel pooling against a loop, and the subset that fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vla.featurize.backbones.spatial_tokens import Tokens, choose, keep_patches, pool_voxels

SIZE = 0.25
KNOWN = [22, 29, 36, 40, 41, 54, 68, 82, 90, 95]
"""The subset of the 100 voxels of a test, as it came out first."""


@pytest.fixture(scope="module")
def seen() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views of 30 patches with 5 channels, in a box of 0.8 m: most voxels have several patches."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 30, 5, generator=generator)
    positions = torch.rand(2, 30, 3, generator=generator) * 0.8 - 0.4
    known = torch.rand(2, 30, generator=generator) > 0.2
    return values, positions, known


def by_hand(
    values: torch.Tensor, positions: torch.Tensor, known: torch.Tensor, across_views: bool
) -> list[dict[tuple[int, ...], torch.Tensor]]:
    """For each view {cell: mean token}, the cell owned by the first view that sees it, or by each."""
    members: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for view in range(len(values)):
        for patch in range(values.shape[1]):
            if known[view, patch]:
                cell = tuple(int(c) for c in np.rint(positions[view, patch].numpy() / np.float32(SIZE)))
                members.setdefault(cell if across_views else (view, *cell), []).append((view, patch))
    rows: list[dict[tuple[int, ...], torch.Tensor]] = [{} for _ in values]
    for key, group in members.items():
        mean = torch.stack([torch.cat([values[place], positions[place]]) for place in group]).mean(0)
        rows[min(view for view, _ in group)][key[-3:]] = mean
    return rows


@pytest.mark.parametrize("across_views", [True, False])
def test_pooling_equals_a_loop_over_patches(
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor], across_views: bool
) -> None:
    made = pool_voxels(*seen, size=SIZE, count=40, across_views=across_views)
    for view, wanted in enumerate(by_hand(*seen, across_views=across_views)):
        count = len(wanted)
        assert made.mask[view].tolist() == [1] * count + [0] * (40 - count)
        rows = torch.stack([wanted[cell] for cell in sorted(wanted)])
        torch.testing.assert_close(torch.cat([made.values, made.positions], -1)[view, :count], rows)
        assert not made.values[view, count:].any()
        assert not made.positions[view, count:].any()


def test_across_views_the_rows_together_are_the_scene_each_voxel_once(
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    values, positions, known = seen
    made = pool_voxels(*seen, size=SIZE, count=60, across_views=True)
    whole = pool_voxels(
        values.reshape(1, 60, 5),
        positions.reshape(1, 60, 3),
        known.reshape(1, 60),
        size=SIZE,
        count=60,
        across_views=True,
    )
    rows = {tuple(row.tolist()) for row in made.values[made.mask > 0].round(decimals=4)}
    assert rows == {tuple(row.tolist()) for row in whole.values[whole.mask > 0].round(decimals=4)}
    assert made.mask.sum() == whole.mask.sum() == len(rows)
    apart = pool_voxels(*seen, size=SIZE, count=60, across_views=False)
    assert apart.mask.sum() > made.mask.sum(), "the views share voxels"


def test_where_nothing_is_known_there_are_no_tokens(seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    values, positions, known = seen
    made = pool_voxels(values, positions, known & False, size=SIZE, count=4, across_views=True)
    assert made.values.shape == (2, 4, 5)
    assert not any(part.any() for part in (made.values, made.positions, made.mask))


def test_patches_keep_their_place_and_the_unknown_are_zero(
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    values, positions, known = seen
    made = keep_patches(values, positions, known)
    assert torch.equal(made.mask > 0, known)
    assert torch.equal(made.values[known], values[known])
    assert torch.equal(made.positions[known], positions[known])
    assert not made.values[~known].any()


def test_a_subset_is_the_frames_own_whatever_its_mates(
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    def pool(across_views: bool, views: slice = slice(None)) -> Tokens:
        return pool_voxels(*(part[views] for part in seen), size=SIZE, count=7, across_views=across_views)

    state = torch.random.get_rng_state()
    first, again = pool(True), pool(True)
    assert torch.equal(first.values, again.values)
    assert first.mask.sum(1).tolist() == [7, 7]
    alone, both = pool(False, slice(1, 2)), pool(False)
    torch.testing.assert_close(alone.values[0], both.values[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_subset_is_ascending_without_repeats_and_known_for_ever() -> None:
    cells = np.stack(np.meshgrid(range(5), range(-5, 5), range(2), indexing="ij"), -1).reshape(-1, 3)
    chosen = choose(cells, 10)
    # Written down once: another subset on another machine or version would make other features of the same frame.
    assert chosen.tolist() == KNOWN
    assert choose(cells[1:], 10).tolist() != [index - 1 for index in KNOWN], "another frame, another subset"
    assert choose(cells, 100).tolist() == list(range(100))


def test_every_voxel_has_the_same_chance() -> None:
    frames = [np.stack([np.arange(20), np.full(20, frame), np.zeros(20, int)], -1) for frame in range(400)]
    counts = np.bincount(np.concatenate([choose(cells, 5) for cells in frames]), minlength=20)
    # 100 expected each, standard deviation 8.7: bounds of five of them.
    assert counts.min() > 56
    assert counts.max() < 144
