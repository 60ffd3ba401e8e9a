"""Patches put back into the world, against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image as Picture

from vla.featurize.backbones.spatial_geometry import cut_square, make_square, patch_positions
from vla.stores.errors import DataError

K = np.array([[50, 0, 20], [0, 40, 12], [0, 0, 1]], np.float32)
SIZE = 28
"""Twice the height of the pictures: a square of 28 px, patches of 7 px, from 14 x 24 pixels."""


def make_view(depth: Any = 2.0, pose: Any = None, shape: tuple[int, int] = (14, 24)) -> dict[str, Any]:
    pose = np.eye(4) if pose is None else pose
    return {
        "depth": np.broadcast_to(np.asarray(depth, np.float32), shape),
        "intrinsics": K,
        "pose": pose.astype(np.float32),
    }


def rotation(axis: int, degrees: float) -> np.ndarray[Any, Any]:
    """Right-handed, about x, y or z."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = np.eye(3)
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    turned[[first, second], [first, second]] = cos
    turned[first, second], turned[second, first] = -sin, sin
    return turned


def test_a_plane_at_a_known_depth_comes_back_as_the_plane_with_y_down_and_x_right() -> None:
    square = make_square(14, 24, SIZE, "square")
    made = patch_positions(make_view(2.0), square, 4).reshape(4, 4, 4)
    u, v = np.arange(4) * 24 / 4, np.arange(4) * 14 / 4  # a patch is 6 x 3.5 pixels of the picture
    np.testing.assert_allclose(made[..., 0], np.broadcast_to((u - 20) / 50 * 2, (4, 4)), atol=1e-6)
    np.testing.assert_allclose(made[..., 1], np.broadcast_to((v - 12) / 40 * 2, (4, 4)).T, atol=1e-6)
    np.testing.assert_allclose(made[..., 2], 2.0)
    np.testing.assert_array_equal(made[..., 3], 1.0)


def test_a_crop_keeps_the_middle_and_moves_the_principal_point() -> None:
    square = make_square(14, 24, SIZE, "crop")
    assert (square.resized, square.left, square.top) == ((48, 28), 10, 0)
    made = patch_positions(make_view(3.0), square, 4).reshape(4, 4, 4)
    u = (np.arange(4) * 7 + 10) / 2  # in pixels of the picture, which was doubled
    np.testing.assert_allclose(made[0, :, 0], (u - 20) / 50 * 3, atol=1e-6)
    np.testing.assert_allclose(made[:, 0, 1], (np.arange(4) * 3.5 - 12) / 40 * 3, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "degrees", "forward"),
    [(1, 90, (1, 0, 0)), (1, -90, (-1, 0, 0)), (0, 90, (0, -1, 0)), (0, -90, (0, 1, 0))],
)
def test_a_turned_camera_looks_where_its_pose_says(axis: int, degrees: float, forward: tuple[int, ...]) -> None:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(axis, degrees), (10, 20, 30)
    view = make_view(5.0, pose)
    view["intrinsics"] = np.array([[50, 0, 12], [0, 40, 7], [0, 0, 1]], np.float32)  # patch (2, 2) on the axis
    made = patch_positions(view, make_square(14, 24, SIZE, "square"), 4).reshape(4, 4, 4)
    np.testing.assert_allclose(made[2, 2, :3], np.array([10, 20, 30]) + 5 * np.array(forward), atol=1e-5)


def test_two_cameras_that_see_one_point_agree_on_where_it_is() -> None:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(1, -30), (1, 0.1, 0)
    point = np.array([0.3, -0.2, 2.0])
    for camera in (np.eye(4), pose):
        seen = camera[:3, :3].T @ (point - camera[:3, 3])
        view = make_view(seen[2], camera)
        # A principal point that puts the point on the first patch's pixel.
        x, y = seen[:2] / seen[2]
        view["intrinsics"] = np.array([[50, 0, -50 * x], [0, 40, -40 * y], [0, 0, 1]])
        made = patch_positions(view, make_square(14, 24, SIZE, "square"), 4)
        np.testing.assert_allclose(made[0, :3], point, atol=1e-6)


def test_a_patch_takes_the_depth_of_the_pixel_that_nearest_neighbour_resizing_picks() -> None:
    depth = np.random.default_rng(0).uniform(1, 4, (97, 131)).astype(np.float32)  # reduced: pixels are passed over
    for fit in ("crop", "square"):
        square = make_square(97, 131, SIZE, fit)  # type: ignore[arg-type]
        resized = np.asarray(Picture.fromarray(depth).resize(square.resized, Picture.Resampling.NEAREST))
        wanted = resized[square.top :: 7, square.left :: 7][:4, :4]
        made = patch_positions(make_view(depth, shape=depth.shape), square, 4).reshape(4, 4, 4)
        np.testing.assert_allclose(made[..., 2], wanted)


def test_a_patch_without_depth_is_marked_and_zero() -> None:
    depth = np.full((14, 24), 2.0)
    depth[:, :12] = 0
    made = patch_positions(make_view(depth), make_square(14, 24, SIZE, "square"), 4).reshape(4, 4, 4)
    np.testing.assert_array_equal(made[..., 3], [[0, 0, 1, 1]] * 4)
    assert not made[:, :2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": np.ones((13, 24))}, r"depth of shape \(13, 24\); expected \(14, 24\)"),
        ({"depth": np.full((14, 24), np.nan)}, "depth holds NaN"),
        ({"depth": np.full((14, 24), -1.0)}, "a depth of -1 m"),
        ({"intrinsics": np.eye(4)}, "intrinsics of shape"),
        ({"intrinsics": np.zeros((3, 3))}, "focal lengths 0 and 0"),
        ({"pose": np.diag([2.0, 2, 2, 1])}, "no rotation"),
        ({"pose": np.diag([-1.0, 1, 1, 1])}, "no rotation"),
        ({"pose": np.full((4, 4), np.inf)}, "pose holds NaN or infinite"),
    ],
)
def test_geometry_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        patch_positions({**make_view(), **change}, make_square(14, 24, SIZE, "crop"), 4)


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (50, 50), (337, 455)])
def test_the_crop_is_that_of_clips_own_processor(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=84)
    wanted = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    made = cut_square(picture, make_square(*shape, 84, "crop"), Picture.Resampling.BICUBIC)
    np.testing.assert_array_equal(made.transpose(2, 0, 1), wanted)
