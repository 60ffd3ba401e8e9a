"""Waypoints integrated from base velocities, against closed forms and a second implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vla.featurize.sources.waypoints import integrate_waypoints


def one_by_one(velocities: list[list[float]], start: int, horizon: int, dt: float) -> list[list[float]]:
    """Walk pose by pose, as a person would; then keep every round(linspace)-th."""
    poses = [[0.0, 0.0, 0.0]]
    for vx, vy, wz in velocities[start : start + horizon]:
        x, y, heading = poses[-1]
        dx = vx * math.cos(heading) - vy * math.sin(heading)
        dy = vx * math.sin(heading) + vy * math.cos(heading)
        poses.append([x + dx * dt, y + dy * dt, heading + wz * dt])
    return [poses[number] for number in (0, 1, 2, 3, 5, 6, 7, 8)[: len(poses)] if number < len(poses)]


def test_each_frame_agrees_with_walking_pose_by_pose() -> None:
    velocities = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    waypoints, valid = integrate_waypoints(velocities, 30, 8, 0.1)
    assert (waypoints.shape, waypoints.dtype, valid.shape, valid.dtype) == ((30, 8, 3), np.float32, (30, 8), np.bool_)
    for frame in range(30):
        walked = one_by_one(velocities.tolist(), frame, 8, 0.1)
        assert valid[frame].sum() == len(walked)
        np.testing.assert_allclose(waypoints[frame, : len(walked)], walked, atol=1e-6)


def test_straight_ahead_the_waypoints_are_at_0_1_2_3_5_6_7_8_steps() -> None:
    waypoints, _ = integrate_waypoints(np.tile(np.float32([2, 0, 0]), (20, 1)), 1, 8, 0.5)
    np.testing.assert_allclose(waypoints[0, :, 0], [0, 1, 2, 3, 5, 6, 7, 8])
    np.testing.assert_array_equal(waypoints[0, :, 1:], 0)


def test_sideways_velocity_turns_with_the_body() -> None:
    quarter = math.pi / 2
    velocities = np.float32([[0, 0, quarter], [1, 0, 0], [0, 1, 0], [0, 0, quarter], [1, 0, 0], *[[0, 0, 0]] * 3])
    waypoints, valid = integrate_waypoints(velocities, 1, 8, 1.0)
    assert valid.all()
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 1], [-1, 1, 1], *[[-2, 1, 2]] * 4]
    np.testing.assert_allclose(waypoints[0] / [1, 1, quarter], expected, atol=1e-6)


def test_the_heading_is_not_wrapped() -> None:
    waypoints, _ = integrate_waypoints(np.tile(np.float32([0, 0, 4]), (8, 1)), 1, 8, 1.0)
    np.testing.assert_allclose(waypoints[0, -1, 2], 32)


def test_at_the_end_only_what_was_demonstrated_is_valid_and_no_frame_is_dropped() -> None:
    _, valid = integrate_waypoints(np.ones((10, 3), np.float32), 10, 8, 0.1)
    assert valid.sum(axis=1).tolist() == [8, 8, 8, 7, 6, 5, 4, 4, 3, 2]
    assert valid[-1].tolist() == [True, True, *[False] * 6]


def test_velocities_beyond_the_last_frame_make_more_waypoints_valid() -> None:
    _, valid = integrate_waypoints(np.ones((12, 3), np.float32), 3, 8, 0.1)
    assert valid.all()
    assert np.isfinite(integrate_waypoints(np.ones((2, 3), np.float32), 30, 8, 0.1)[0]).all()


@pytest.mark.parametrize("horizon", [2, 5, 16])
def test_other_horizons_reach_from_the_origin_to_their_last_step(horizon: int) -> None:
    waypoints, valid = integrate_waypoints(np.tile(np.float32([1, 0, 0]), (40, 1)), 40 - horizon, horizon, 1.0)
    assert valid.all()
    np.testing.assert_allclose(waypoints[:, [0, -1], 0], np.tile([0, horizon], (40 - horizon, 1)))
