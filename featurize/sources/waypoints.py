"""Waypoints of a base: where its velocities take it, as OpenTrackVLA's planner is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def integrate_waypoints(
    velocities: NDArray[np.float32], frames: int, horizon: int, dt: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (waypoints [frames, horizon, 3], valid [frames, horizon]) from velocities [N, 3] (vx, vy, wz).

    Velocities are in the body's frame, m/s and rad/s, one each `dt` seconds. From frame j on, pose 0 is the origin and
    pose_{k+1} = pose_k + dt * [R(theta_k) (vx, vy), wz] with the velocity of step j + k (explicit Euler): x and y in
    metres and the heading in radians, not wrapped, in the frame of the base at j. Waypoint i is the pose of number
    round(i * horizon / (horizon - 1)), numpy's rounding: 0, 1, 2, 3, 5, 6, 7, 8 for a horizon of 8.

    `valid` is true where each velocity on the way was demonstrated; past the last one the base stands still.
    """
    numbers = np.round(np.linspace(0, horizon, horizon)).astype(np.int64)
    moving = np.zeros((max(len(velocities), frames) + horizon, 3), np.float64)
    moving[: len(velocities)] = velocities
    poses = np.zeros((frames, horizon + 1, 3), np.float64)
    for k in range(horizon):
        vx, vy, wz = moving[k : k + frames].T
        heading = poses[:, k, 2]
        step = [vx * np.cos(heading) - vy * np.sin(heading), vx * np.sin(heading) + vy * np.cos(heading), wz]
        poses[:, k + 1] = poses[:, k] + dt * np.stack(step, axis=1)
    valid = np.arange(frames)[:, None] + numbers <= len(velocities)
    return poses[:, numbers].astype(np.float32), valid
