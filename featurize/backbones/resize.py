"""How a picture becomes square: Pillow's antialiased resampling of the whole picture, nothing cropped.

Cropping would hide a gripper at the border; the aspect ratio is given up instead, or black bars are added, whichever
the system does that a backbone follows.
Pillow works in uint8 on the CPU, so a cached picture and a live one pass through the same arithmetic on any device.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image as Picture

from vla.featurize.image import Image
from vla.stores.errors import DataError

Filter = Literal["bicubic", "bilinear", "box"]
RESAMPLING = {
    "bicubic": Picture.Resampling.BICUBIC,
    "bilinear": Picture.Resampling.BILINEAR,
    "box": Picture.Resampling.BOX,
}


def resize_square(image: Image, size: int, resample: Filter) -> torch.Tensor:
    """Resize [H, W, 3] uint8 to [3, size, size] float32 in 0..255 (whole numbers: Pillow rounds to uint8).

    Raises what `resize_exact` raises.
    """
    return resize_exact(image, size, size, resample)


def resize_exact(image: Image, height: int, width: int, resample: Filter) -> torch.Tensor:
    """Resize [H, W, 3] uint8 to [3, height, width] float32 in 0..255 (whole numbers).

    Raises `DataError` for anything but a non-empty uint8 RGB picture: a float picture in 0..1 would turn black.
    """
    return _to_tensor(_to_picture(image).resize((width, height), RESAMPLING[resample]))


def resize_with_pad(image: Image, size: int, resample: Filter) -> torch.Tensor:
    """Fit [H, W, 3] uint8 into [3, size, size] float32 in 0..255, its shape kept, centred on black.

    Whole numbers, as in `resize_square`, and the same errors. Sizes are worked out in floating point and cut off, as
    openpi does, whose models were trained so: some pictures come out one pixel smaller than their frame.
    """
    picture = _to_picture(image)
    width, height = picture.size
    if (width, height) != (size, size):
        ratio = max(width / size, height / size)
        inner = (max(1, int(width / ratio)), max(1, int(height / ratio)))
        frame = Picture.new("RGB", (size, size))
        frame.paste(picture.resize(inner, RESAMPLING[resample]), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        picture = frame
    return _to_tensor(picture)


def _to_picture(image: Image) -> Picture.Image:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise DataError(f"a picture of shape {image.shape}, {image.dtype}", expected="[H, W, 3] uint8, RGB")
    return Picture.fromarray(image)


def _to_tensor(picture: Picture.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32).transpose(2, 0, 1).copy())
