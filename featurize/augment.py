"""Augmented copies of pictures before a frozen backbone sees them, so that its cached features can be augmented.

Random crop, rotation, brightness, contrast and saturation, with the ranges that pi0 and pi0.5 are trained with (openpi,
`preprocess_observation`). There, one factor served a whole batch in a known port; here each copy of each view has its
own. What is drawn for a copy is a function of the settings and of (episode id, frame, camera, copy) alone: how a store
is cut into units, the size of a batch and resuming change nothing, and two backbones are shown the same pictures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image as Picture
from PIL import ImageStat
from pydantic import AfterValidator, Field, FiniteFloat

from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.image import Image
from vla.featurize.views import IMAGE
from vla.stores.errors import UsageError
from vla.stores.fingerprint import canonical
from vla.stores.manifest import MAX_COPIES
from vla.stores.settings import Settings

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G, B in the grey value (ITU-R BT.601), as in Pillow's "L"."""

RECIPE = {
    "geometry": "crop and rotation in one bicubic resampling to the size of the picture, borders mirrored",
    "colour": "brightness, contrast about the mean luma, saturation about the luma (BT.601), rounded once",
    "draws": "SHA-512 of the seed, episode, frame, camera and copy",
}
"""What the settings do not say; part of the fingerprint, and to be changed with the code below."""


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= values[0] <= values[1]:
        raise ValueError(f"expected 0 <= low <= high, got {values}")
    return values


Factors = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_ordered)]


class AugmentConfig(Settings):
    """How many augmented copies of each frame are cached, and what is done to their pictures.

    `copies`: K; 0 caches none. `crop`: share of both sides that is kept, at a random place, and enlarged to the whole.
    `rotate`: degrees either way. `brightness`, `contrast`, `saturation`: factors [low, high], 1 changes nothing.
    Everything is drawn uniformly. `colour_only`: cameras with one of these in their name are neither cropped nor
    turned, as in openpi: a camera on the wrist sees the gripper at one place, and the scene relative to it.
    `seed`: of all that is drawn.

    `per`: "episode" draws once for all frames of an episode (each camera for itself), "frame" anew for each. The
    default is "episode": a head that reads two frames sees speed in their difference, and so does a backbone that looks
    back; a camera that jumps by up to 5 degrees between them would drown it, and no real camera does so. "frame" has
    more variety (frames x K draws instead of episodes x K), and is the choice for heads of one frame (`n_obs` 1).
    """

    copies: int = Field(0, ge=0, le=MAX_COPIES)
    crop: float = Field(0.95, gt=0, le=1)
    rotate: float = Field(5.0, ge=0, le=45)
    brightness: Factors = (0.7, 1.3)
    contrast: Factors = (0.6, 1.4)
    saturation: Factors = (0.5, 1.5)
    colour_only: tuple[str, ...] = ("wrist",)
    seed: int = 0
    per: Literal["episode", "frame"] = "episode"

    def identity(self) -> dict[str, Any]:
        """Return all that the copies depend on, JSON-able, for the fingerprint; empty where there are none."""
        return {**self.model_dump(mode="json"), "recipe": RECIPE} if self.copies else {}


NO_COPIES = AugmentConfig()


@dataclass(frozen=True)
class Adjustment:
    """What is done to one picture. `x`, `y` in 0..1 place the crop, from left to right and from top to bottom.

    `angle` turns the scene counter-clockwise, in degrees. The default leaves a picture as it is.
    """

    crop: float = 1.0
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def require_augmentable(spec: BackboneSpec) -> None:
    """Raise `UsageError` for a backbone whose features do not come from pictures alone.

    A picture that is turned no longer fits its depth, its camera's pose, or features cached of the plain picture.
    """
    if spec.inputs != (IMAGE,) or spec.per != "frame":
        found = f"backbone {spec.name!r} reads {', '.join(spec.inputs)}, which --augment cannot change alike"
        raise UsageError(found, expected="a backbone that reads pictures alone")


def draw(config: AugmentConfig, episode: str, frame: int, camera: str, copy: int | Sequence[int]) -> Adjustment:
    """Return what copy 1, 2, … of a view is made with. The numbers come from a hash: no library's generator changes.

    `copy` may be several numbers, where copies are not counted but drawn anew in every batch.
    """
    copy = copy if isinstance(copy, int) else list(copy)
    key = [config.seed, episode, frame if config.per == "frame" else None, camera, copy]
    words = np.frombuffer(hashlib.sha512(canonical(key)).digest(), "<u8")
    uniform = ((words >> np.uint64(11)) * 2.0**-53).tolist()  # 53 bits of each: 0 <= u < 1

    def between(position: int, low: float, high: float) -> float:
        return float(low + (high - low) * uniform[position])

    how = Adjustment(
        crop=config.crop,
        x=uniform[0],
        y=uniform[1],
        angle=between(2, -config.rotate, config.rotate),
        brightness=between(3, *config.brightness),
        contrast=between(4, *config.contrast),
        saturation=between(5, *config.saturation),
    )
    held = any(part in camera for part in config.colour_only)
    return replace(how, crop=1.0, x=0.5, y=0.5, angle=0.0) if held else how


def adjust(image: Image, how: Adjustment) -> Image:
    """Return the picture [H, W, 3] adjusted, uint8 of the same size."""
    return np.asarray(_recolour(_turn(image, how), how))


def augmented(
    views: Sequence[Image], config: AugmentConfig, episode: str, frame: int, cameras: Sequence[str]
) -> Iterator[tuple[Image, ...]]:
    """Yield copies 1 to K of the views of one time step."""
    for copy in range(1, config.copies + 1):
        drawn = (draw(config, episode, frame, camera, copy) for camera in cameras)
        yield tuple(adjust(view, how) for view, how in zip(views, drawn, strict=True))


def _turn(image: Image, how: Adjustment) -> Picture.Image:
    """Crop and rotate in one resampling: two would blur twice.

    A corner that comes from outside the picture (5 degrees reach 4 % of a side) shows the picture mirrored at its
    border: black wedges would tell a network what was done, repeated border pixels would be streaks.
    """
    height, width = image.shape[:2]
    cos, sin = how.crop * math.cos(math.radians(how.angle)), how.crop * math.sin(math.radians(how.angle))
    # Where output (u, v) comes from, in pixels from the upper left corner, y down: middle + R (u - W/2, v - H/2).
    middle_x = width * (how.crop / 2 + how.x * (1 - how.crop))
    middle_y = height * (how.crop / 2 + how.y * (1 - how.crop))
    reach_x = (width * abs(cos) + height * abs(sin)) / 2
    reach_y = (width * abs(sin) + height * abs(cos)) / 2
    outside = max(reach_x - middle_x, middle_x + reach_x - width, reach_y - middle_y, middle_y + reach_y - height)
    margin = max(math.ceil(outside) + 2, 0)  # the cubic reaches two pixels further
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric") if margin else image
    left = middle_x + margin - (cos * width - sin * height) / 2
    top = middle_y + margin - (sin * width + cos * height) / 2
    return Picture.fromarray(padded).transform(
        (width, height), Picture.Transform.AFFINE, (cos, -sin, left, sin, cos, top), Picture.Resampling.BICUBIC
    )


def _recolour(picture: Picture.Image, how: Adjustment) -> Picture.Image:
    """Brightness, contrast and saturation, one after the other, as one matrix: they are linear, so it rounds once."""
    mean = how.brightness * sum(weight * of for weight, of in zip(LUMA, ImageStat.Stat(picture).mean, strict=True))
    gain, grey, offset = how.brightness * how.contrast, 1 - how.saturation, (1 - how.contrast) * mean
    rows = [
        [gain * (grey * weight + (how.saturation if to == channel else 0.0)) for channel, weight in enumerate(LUMA)]
        for to in range(3)
    ]
    matrix = tuple(value for row in rows for value in (*row, offset))
    return picture.convert("RGB", matrix)
