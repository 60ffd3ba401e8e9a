"""Where in the world the patches of a picture are: from depth, intrinsics and pose, axes as OpenCV's.

A network sees a square of the picture. LLaVA-3D gives each of its patches the world position of the one pixel that
nearest-neighbour sampling picks, the patch's top left, and scales intrinsics with the picture, pixel centres at whole
numbers: the same is done here, in float64 on the CPU, so that voxels are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from vla.featurize.image import Image
from vla.stores.errors import DataError

Fit = Literal["crop", "square"]
GEOMETRY = ("depth", "intrinsics", "pose")
RIGID = 1e-3
"""How far the rotation of a pose may be from orthonormal: poses are often kept in float16 or as rounded text."""


@dataclass(frozen=True)
class Square:
    """How a picture of `height` x `width` pixels becomes a square of `size`.

    It is resized to `resized` (width, height), then `size` x `size` pixels from (`left`, `top`) on are cut out.
    """

    height: int
    width: int
    resized: tuple[int, int]
    left: int
    top: int
    size: int


def make_square(height: int, width: int, size: int, fit: Fit) -> Square:
    """Plan the square: "crop" resizes the shorter side to `size` and cuts the middle out of the longer (CLIP's own
    preprocessing); "square" squeezes the whole picture.
    """
    if fit == "square":
        return Square(height, width, (size, size), 0, 0, size)
    short = min(height, width)
    resized = (int(size * width / short), int(size * height / short))
    return Square(height, width, resized, (resized[0] - size) // 2, (resized[1] - size) // 2, size)


def cut_square(image: Image, square: Square, resample: Picture.Resampling) -> NDArray[np.uint8]:
    """Return the square [size, size, 3] uint8 of a picture. Raises `DataError` for anything but uint8 RGB."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise DataError(f"a picture of shape {image.shape}, {image.dtype}", expected="[H, W, 3] uint8, RGB")
    resized = np.asarray(Picture.fromarray(image).resize(square.resized, resample))
    return resized[square.top : square.top + square.size, square.left : square.left + square.size]


def patch_positions(view: Mapping[str, Any], square: Square, side: int) -> NDArray[np.float32]:
    """Return the world positions of `side` x `side` patches, row by row: float32 [P, 4] of x, y, z and 1, or zeros.

    `view` has "depth" [H, W] along the optical axis in metres, 0 where unknown, "intrinsics" [3, 3] in pixels and
    "pose" [4, 4] camera to world. With pixel (u, v) of depth z: X = R [(u - cx) z / fx, (v - cy) z / fy, z] + t.
    Raises `DataError` for geometry that cannot be.
    """
    depth, intrinsics, pose = _checked(view, square)
    first = np.arange(side) * square.size // side
    # Pixels of the original: as a coordinate for the ray, and as the one whose depth nearest-neighbour resizing picks.
    scale_x, scale_y = square.resized[0] / square.width, square.resized[1] / square.height
    u, v = (first + square.left) / scale_x, (first + square.top) / scale_y
    column = np.minimum(((first + square.left + 0.5) / scale_x).astype(np.int64), square.width - 1)
    row = np.minimum(((first + square.top + 0.5) / scale_y).astype(np.int64), square.height - 1)
    z = depth[row[:, None], column[None, :]]
    x = (u[None, :] - intrinsics[0, 2]) / intrinsics[0, 0] * z
    y = (v[:, None] - intrinsics[1, 2]) / intrinsics[1, 1] * z
    world = np.stack([x, y, z], axis=-1) @ pose[:3, :3].T + pose[:3, 3]
    known = (z > 0)[..., None]
    return np.concatenate([np.where(known, world, 0), known], axis=-1).reshape(-1, 4).astype(np.float32)


def _checked(view: Mapping[str, Any], square: Square) -> tuple[NDArray[np.float64], ...]:
    depth, intrinsics, pose = (np.asarray(view[name], np.float64) for name in GEOMETRY)
    shapes = {"depth": (square.height, square.width), "intrinsics": (3, 3), "pose": (4, 4)}
    for name, values in zip(GEOMETRY, (depth, intrinsics, pose), strict=True):
        if values.shape != shapes[name]:
            raise DataError(f"{name} of shape {values.shape}", expected=f"{shapes[name]}, as the picture has it")
        if not np.isfinite(values).all():
            raise DataError(f"{name} holds NaN or infinite values", expected="finite ones, and depth 0 where unknown")
    if depth.min() < 0:
        raise DataError(f"a depth of {depth.min():g} m", expected="metres in front of the camera, 0 where unknown")
    if intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0:
        raise DataError(f"focal lengths {intrinsics[0, 0]:g} and {intrinsics[1, 1]:g}", expected="above 0, in pixels")
    rotation = pose[:3, :3]
    rigid = np.abs(rotation @ rotation.T - np.eye(3)).max() < RIGID and np.linalg.det(rotation) > 0
    if not rigid or not np.array_equal(pose[3], [0, 0, 0, 1]):
        raise DataError("a pose that is no rotation and translation", expected="camera to world, last row 0 0 0 1")
    return depth, intrinsics, pose
