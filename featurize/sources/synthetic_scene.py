"""The three-dimensional scene behind `synthetic:depth=true`: balls that roll over a floor, each before its own camera.

The world has its floor at z = 0 and z upwards, in metres. Camera v hangs 1 m above the floor, 10 m from the next, looks
forward and down, and turns about the vertical as the episode goes on; it sees the ball of its own view alone, whose
centre is on the ray through the centre of the picture's blob. Depth is that of the first surface each pixel's ray
meets, in closed form. It knows nothing of pixels' colours: blobs have no edge, and the same size far and near.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FOCAL = 2.0
"""In units of half a picture: an opening of 53 degrees."""
HEIGHT, SPACING, TILT = 1.0, 10.0, np.pi / 4
"""Of a camera above the floor, between cameras (their views never meet), below the horizon."""
TURN_OF_A_VIEW, TURN_OF_A_FRAME = 0.3, 0.02
"""Radians about the vertical."""
RADIUS = 0.15
"""Of a ball: about as large in the picture as its blob."""
RANGE = 2.5
"""Farther surfaces have no depth, as with a real sensor: a stripe of floor at the upper edge of the picture."""


def intrinsics(size: int) -> NDArray[np.float32]:
    """Return the pinhole matrix [3, 3] of pictures of `size` x `size` pixels, pixel centres at whole numbers."""
    focal, centre = FOCAL * size / 2, (size - 1) / 2
    return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)


def camera_poses(frames: NDArray[np.int64], cameras: int) -> NDArray[np.float64]:
    """Return camera to world [T, V, 4, 4] at frames [T], OpenCV axes (x right, y down, z forward)."""
    view = np.arange(cameras)
    yaw = TURN_OF_A_VIEW * view + TURN_OF_A_FRAME * frames[:, None]
    right = np.stack([np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)], axis=-1)
    ahead = np.stack([-np.sin(yaw), np.cos(yaw), np.zeros_like(yaw)], axis=-1)
    up = np.array([0.0, 0.0, 1.0])
    poses = np.zeros((len(frames), cameras, 4, 4))
    poses[..., :3, 0] = right
    poses[..., :3, 1] = -np.sin(TILT) * ahead - np.cos(TILT) * up
    poses[..., :3, 2] = np.cos(TILT) * ahead - np.sin(TILT) * up
    poses[..., 0, 3], poses[..., 2, 3], poses[..., 3, 3] = SPACING * view, HEIGHT, 1.0
    return poses


def ball_centres(places: NDArray[np.float64], poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centres [T, V, 3] of balls that lie on the floor, seen at places [T, V, 2] in [-1, 1] of a picture."""
    rays = np.concatenate([places / FOCAL, np.ones_like(places[..., :1])], axis=-1)
    world = np.einsum("tvij,tvj->tvi", poses[..., :3, :3], rays)
    along = (RADIUS - poses[..., 2, 3]) / world[..., 2]
    return np.asarray(poses[..., :3, 3] + along[..., None] * world)


def depth(centre: NDArray[np.float64], pose: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Return depth [size, size] along the optical axis in metres, 0 beyond `RANGE`, of a floor and one ball.

    `centre` [3] of the ball and `pose` [4, 4] of the camera, both in the world. A pixel's ray is z * d with d of depth
    1: it meets the floor where t_z + z (R d)_z = 0, and the ball where |z d - c|^2 = r^2 (c: centre from the camera).
    """
    axis = ((np.arange(size) + 0.5) / size * 2 - 1) / FOCAL
    x, y = np.meshgrid(axis, axis)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1)
    floor = -pose[2, 3] / (rays @ pose[2, :3])  # every ray goes down: the horizon is above the picture
    to_ball = pose[:3, :3].T @ (centre - pose[:3, 3])
    square, product = (rays**2).sum(-1), rays @ to_ball
    under_root = product**2 - square * (to_ball @ to_ball - RADIUS**2)
    ball = (product - np.sqrt(np.maximum(under_root, 0))) / square
    nearest = np.where(under_root >= 0, ball, floor)  # lying on the floor, it is before it on every ray that meets it
    return np.where(nearest <= RANGE, nearest, 0).astype(np.float32)
