"""A camera in RoboTwin's HDF5 files: its pictures, and the depth, intrinsics and poses that go with them.

Pictures are JPEG in byte strings, which HDF5 pads with zeros. What is given is as `ViewSource.views` says: metres, and
camera to world with OpenCV axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from vla.featurize.hdf5 import find, need, opened, require_rows
from vla.featurize.image import Image
from vla.featurize.sources.episode_checks import OTHER_CAMERA, SKIP
from vla.featurize.sources.pictures import decode_picture, require_size
from vla.stores.errors import SourceError

Channels = Literal["bgr", "rgb"]
MAX_PICTURE_BYTES = 1 << 26
"""No camera's frame is encoded in 64 MiB."""

_ENCODED, _RAW = "encoded", "raw"


@dataclass(frozen=True)
class Camera:
    """Where a camera's data lie; `extras` maps "depth", "intrinsics" and "pose" to paths, where they are there."""

    pictures: str
    extras: Mapping[str, str]


def camera_of(file: h5py.File, group: str, newer: bool) -> Camera | None:
    """Return a camera that has pictures."""
    if find(file, f"{group}/{'colors' if newer else 'rgb'}") is None:
        return None
    known = {
        "depth": ("depths",) if newer else ("depth",),
        "intrinsics": ("intrinsic_matrix",) if newer else ("intrinsic_cv",),
        "pose": ("extrinsics_matrix", "extrinsic_matrix") if newer else ("extrinsic_cv", "cam2world_gl"),
    }
    extras: dict[str, str] = {}
    for extra, keys in known.items():
        place = next((f"{group}/{key}" for key in keys if find(file, f"{group}/{key}") is not None), None)
        extras |= {extra: place} if place else {}
    return Camera(f"{group}/{'colors' if newer else 'rgb'}", extras)


def form_of(data: h5py.Dataset) -> str:
    """Return how a camera's frames are kept: encoded (byte strings or vectors of bytes), or raw uint8 [T, H, W, 3]."""
    is_bytes = data.dtype.kind == "S" and data.dtype.itemsize <= MAX_PICTURE_BYTES
    vector = h5py.check_vlen_dtype(data.dtype)
    if data.ndim == 1 and (is_bytes or vector == np.uint8):
        return _ENCODED
    if data.ndim == 4 and data.dtype == np.uint8 and data.shape[3] == 3:
        return _RAW
    raise SourceError(
        f"{data.file.filename}:{data.name} is {data.dtype} {data.shape}",
        expected="byte strings [T] of JPEG, or uint8 [T, H, W, 3]",
        fix=OTHER_CAMERA,
    )


def read_pictures(path: Path, camera: Camera, start: int, stop: int, channels: Channels) -> Iterator[Image]:
    """Yield frames `start..stop-1` of a camera, uint8 [H, W, 3] RGB; `channels`: what a JPEG decoder gives."""
    with opened(path) as file:
        data = need(file, camera.pictures)
        encoded = form_of(data) == _ENCODED
        require_rows(data, 1)
        for frame in range(start, stop):
            where = f"{path}:{camera.pictures}, frame {frame}"
            if encoded:
                image = decode_picture(bytes(data[frame]), where)
                yield np.ascontiguousarray(image[..., ::-1]) if channels == "bgr" else image
            else:
                require_size((data.shape[1], data.shape[2]), None, where)
                yield data[frame]


def read_extras(
    path: Path, camera: Camera, start: int, stop: int, wanted: Sequence[str], metres: float, world_to_camera: bool
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield "depth", "intrinsics", "pose" of frames `start..stop-1` as `ViewSource.views` has them.

    `metres` is the unit of the file's depth. `world_to_camera` says how a newer file's extrinsics are meant: OpenCV
    axes, world to camera; otherwise OpenGL axes (y up, z back), camera to world, as RoboTwin writes them.
    """
    with opened(path) as file:
        data = {extra: need(file, camera.extras[extra]) for extra in wanted}
        for values in data.values():
            require_rows(values, 1 if values.ndim > 2 else len(values))
        for frame in range(start, stop):
            made = {}
            for extra, values in data.items():
                where = f"{path}:{camera.extras[extra]}, frame {frame}"
                row = np.asarray(values[frame] if values.ndim > 2 else values[()], np.float64)
                if extra == "depth":
                    made[extra] = _depth(row, metres, where)
                elif extra == "intrinsics":
                    made[extra] = _intrinsics(row, where)
                else:
                    inward = world_to_camera or camera.extras[extra].endswith("/extrinsic_cv")
                    made[extra] = _pose(row, inward, where)
            yield made


def _depth(row: NDArray[np.float64], metres: float, where: str) -> NDArray[np.float32]:
    """Return depth [H, W] in metres; what is not finite is unknown, hence 0."""
    row = row[..., 0] if row.ndim == 3 and row.shape[2] == 1 else row
    known = np.where(np.isfinite(row), row, 0.0)
    if row.ndim != 2 or (known < 0).any():
        raise SourceError(f"{where} has shape {row.shape}, least {known.min()}", expected="[H, W] from 0 on", fix=SKIP)
    return _single((known * metres), where)


def _intrinsics(row: NDArray[np.float64], where: str) -> NDArray[np.float32]:
    is_matrix = row.shape == (3, 3) and bool(np.isfinite(row).all()) and row[2].tolist() == [0, 0, 1]
    if not is_matrix or min(row[0, 0], row[1, 1]) <= 0:
        raise SourceError(f"{where} is no pinhole matrix", expected="[[fx, s, cx], [0, fy, cy], [0, 0, 1]]", fix=SKIP)
    return _single(row, where)


def _pose(row: NDArray[np.float64], world_to_camera: bool, where: str) -> NDArray[np.float32]:
    """Return camera to world [4, 4], OpenCV axes."""
    matrix = np.vstack([row, [0, 0, 0, 1]]) if row.shape == (3, 4) else row
    rigid = (
        matrix.shape == (4, 4)
        and bool(np.isfinite(matrix).all())
        and np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6)
        and np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-3)
    )
    if not rigid:
        raise SourceError(f"{where} is no rigid motion", expected="[3, 4] or [4, 4], rotation and shift", fix=SKIP)
    # The columns of an OpenGL camera's rotation are right, up, back; OpenCV's are right, down, forward.
    pose = np.linalg.inv(matrix) if world_to_camera else matrix @ np.diag([1.0, -1.0, -1.0, 1.0])
    return _single(pose, where)


def _single(values: NDArray[np.float64], where: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        single = values.astype(np.float32)
    if not np.isfinite(single).all():
        raise SourceError(f"{where} has numbers above float32", expected="metres or pixels", fix=SKIP)
    return single
