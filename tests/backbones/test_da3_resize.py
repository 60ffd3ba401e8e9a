"""Depth Anything 3's resizing from its definition: sizes, areas and ramps. Needs no network."""

from __future__ import annotations

import numpy as np
import pytest

from vla.featurize.backbones.da3_resize import resize_upper_bound, upper_bound_shape


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [
        (480, 640, 504, (378, 504)),
        (1080, 1920, 504, (280, 504)),
        (100, 100, 504, (504, 504)),
        (97, 53, 84, (84, 42)),
        (30, 40, 84, (70, 84)),  # 63 rows lie half way between 56 and 70: up
        (500, 10, 504, (504, 14)),
    ],
)
def test_sides_become_the_nearest_multiples_of_the_patch(
    height: int, width: int, size: int, shape: tuple[int, int]
) -> None:
    assert upper_bound_shape(height, width, size) == shape
    flat = resize_upper_bound(np.full((height, width, 3), 77, np.uint8), size)
    assert flat.shape == (*shape, 3)
    assert (flat == 77).all(), "weights that sum to one keep a flat picture flat"


def test_shrinking_averages_the_area_and_a_picture_of_the_right_size_stays_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (126, 168, 3), dtype=np.uint8)
    thirds = picture.reshape(42, 3, 56, 3, 3).mean((1, 3))
    assert np.abs(resize_upper_bound(picture, 56) - thirds).max() <= 0.501
    assert np.array_equal(resize_upper_bound(picture, 168), picture)
    # 3 columns become 2, so that one of them counts half to each: a ramp stays a ramp.
    ramp = np.repeat(np.arange(0, 210, dtype=np.uint8)[None, :, None], 210, 0).repeat(3, 2)
    shrunk = resize_upper_bound(ramp, 140)
    centres = (np.arange(140) + 0.5) * 1.5 - 0.5
    assert np.abs(shrunk[70, :, 0] - centres).max() <= 0.501


def test_growing_follows_a_ramp_between_its_ends() -> None:
    ramp = np.repeat(np.arange(0, 210, 5, dtype=np.uint8)[None, :, None], 42, 0).repeat(3, 2)
    grown = resize_upper_bound(ramp, 84)
    wanted = ((np.arange(84) + 0.5) / 2 - 0.5) * 5
    assert np.abs(grown[10, 4:-4, 0] - wanted[4:-4]).max() <= 0.76  # the cubic with a = -0.75 bends a ramp a little
