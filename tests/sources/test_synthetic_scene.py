"""The scene behind `synthetic:depth=true`: depth, intrinsics and pose put every pixel onto the floor or onto a ball."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vla.featurize.backbones.spatial_geometry import GEOMETRY, make_square, patch_positions
from vla.featurize.sources.base import ViewSource
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.synthetic import SyntheticSource
from vla.featurize.sources.synthetic_scene import RADIUS, RANGE
from vla.stores.errors import UsageError

SIZE = 48


def source(**options: Any) -> SyntheticSource:
    return SyntheticSource(episodes=3, length=(6, 9), cameras=2, image_size=SIZE, depth=True, **options)


def seen(name: tuple[str, ...] = GEOMETRY) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[np.float64]]]:
    """Every view of every frame, and the centre of its ball [3] in metres."""
    made = source()
    for number, episode in enumerate(made.index().episodes):
        balls = np.asarray(made.steps(number)["privileged"], np.float64).reshape(-1, 2, 3)
        for views, centres in zip(made.views(number, 0, episode.length, name), balls, strict=True):
            yield from zip(views, centres, strict=True)


def in_the_world(view: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """The points of the pixels whose depth is known, [N, 3] in metres: K^-1 (u, v, 1) z, then the pose."""
    v, u = np.nonzero(view["depth"])
    pixels = np.stack([u, v, np.ones_like(u)], axis=1)
    rays = pixels @ np.linalg.inv(view["intrinsics"].astype(np.float64)).T
    pose = view["pose"].astype(np.float64)
    return np.asarray((rays * view["depth"][v, u, None]) @ pose[:3, :3].T + pose[:3, 3])


def test_every_pixel_with_depth_lies_on_the_floor_or_on_the_ball() -> None:
    for view, centre in seen():
        points = in_the_world(view)
        from_ball = np.abs(np.linalg.norm(points - centre, axis=1) - RADIUS)
        on_ball = from_ball < 1e-5
        assert np.minimum(from_ball, np.abs(points[:, 2])).max() < 1e-5
        assert 0.005 < on_ball.mean() < 0.3
        camera = view["pose"][:3, 3]
        # The side of the ball that the camera sees: towards it, less than a quarter turn from the middle.
        assert (((points[on_ball] - centre) * (camera - centre)).sum(1) > 0).all()


def test_the_floor_behind_the_ball_is_hidden() -> None:
    """No floor is seen along a ray that would have met the ball before."""
    for view, centre in seen():
        points, camera = in_the_world(view), view["pose"][:3, 3].astype(np.float64)
        floor = points[np.abs(points[:, 2]) < 1e-5]
        towards = (floor - camera) / np.linalg.norm(floor - camera, axis=1, keepdims=True)
        to_ball = centre - camera
        beside = np.linalg.norm(to_ball - (towards @ to_ball)[:, None] * towards, axis=1)
        assert beside.min() > RADIUS - 1e-5


def test_the_ball_is_where_the_picture_shows_the_blob() -> None:
    """Its centre projects to the place that the action is made of, and it stands on the floor."""
    made = source()
    for number in range(3):
        steps = made.steps(number)
        balls = np.asarray(steps["privileged"], np.float64).reshape(-1, 2, 3)
        length = made.index().episodes[number].length
        for frame, views in enumerate(made.views(number, 0, length, GEOMETRY)):
            for camera, view in enumerate(views):
                pose = view["pose"].astype(np.float64)
                there = pose[:3, :3].T @ (balls[frame, camera] - pose[:3, 3])
                u, v, w = view["intrinsics"] @ there
                place = (np.array([u, v]) / w + 0.5) / SIZE * 2 - 1
                np.testing.assert_allclose(place, steps["action"][frame, 2 * camera : 2 * camera + 2], atol=1e-5)
        np.testing.assert_allclose(balls[..., 2], RADIUS, atol=1e-6)


def test_poses_are_rigid_and_turn_with_time_and_what_is_far_has_no_depth() -> None:
    unknown, turned = [], []
    for view, _ in seen():
        rotation = view["pose"][:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        assert np.linalg.det(rotation) == pytest.approx(1)
        assert view["depth"].max() <= RANGE
        assert np.isfinite(view["depth"]).all()
        unknown.append((view["depth"] == 0).mean())
        turned.append(rotation.tobytes())
    assert 0.02 < min(unknown) <= max(unknown) < 0.2
    assert len(set(turned)) == 2 * max(episode.length for episode in source().index().episodes)


@pytest.mark.parametrize("size", [SIZE, 7 * SIZE])
def test_patches_of_the_spatial_backbone_lie_on_the_floor_or_on_the_ball(size: int) -> None:
    """Also where pictures are resized to CLIP's 336 pixels, patches of 14 beginning at every second pixel."""
    for view, centre in seen():
        placed = patch_positions(view, make_square(SIZE, SIZE, size, "crop"), SIZE // 2)
        points = placed[placed[:, 3] > 0, :3].astype(np.float64)
        near = np.minimum(np.abs(np.linalg.norm(points - centre, axis=1) - RADIUS), np.abs(points[:, 2]))
        assert len(points) > 400
        assert near.max() < 1e-5


def test_depth_is_by_choice_and_changes_neither_pictures_nor_numbers() -> None:
    """Nor, left out, the digest of stores that were made before there was such a choice."""
    with_it, without = source(), SyntheticSource(episodes=3, length=(6, 9), cameras=2, image_size=SIZE)
    assert SyntheticSource().digest() == "8232ebdaa2c32663c78a283234fea66978d71dc38dc45ad023ed23b2960f7d6c"
    assert SyntheticSource(depth=False).digest() == SyntheticSource().digest() != SyntheticSource(depth=True).digest()
    assert with_it.index().extras == GEOMETRY
    assert without.index().extras == ()
    assert with_it.steps(1).keys() - without.steps(1).keys() == {"privileged"}
    assert all(np.array_equal(with_it.steps(1)[name], values) for name, values in without.steps(1).items())
    pairs = zip(with_it.frames(1, 0, 6), without.frames(1, 0, 6), strict=True)
    assert all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_views_of_any_part_and_of_any_names_are_the_same() -> None:
    made = source()
    assert isinstance(made, ViewSource)
    whole = list(made.views(2, 0, 6, ("image", *GEOMETRY)))
    for name in ("image", *GEOMETRY):
        for part, views in zip(made.views(2, 3, 5, (name,)), whole[3:5], strict=True):
            for one, every in zip(part, views, strict=True):
                assert one.keys() == {name}
                assert np.array_equal(one[name], every[name])
    for number, images in enumerate(made.frames(2, 0, 6)):
        assert all(np.array_equal(view["image"], image) for view, image in zip(whole[number], images, strict=True))


def test_what_the_source_does_not_make_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has no depth; expected of image.*synthetic:depth=true"):
        open_source("synthetic:episodes=1").views(0, 0, 1, ("depth",))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="has no flow; expected of image, depth, intrinsics, pose"):
        source().describe(("flow",))
