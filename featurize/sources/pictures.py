"""Pictures stored as encoded bytes, to RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from vla.featurize.image import Image
from vla.stores.errors import SourceError

RGB_MODES = {"RGB", "RGBA", "L", "LA", "P", "CMYK", "1"}
MAX_PIXELS = 64_000_000
"""Above this a picture of some kilobytes may be made to fill the memory; cameras have 12 million."""


def decode_picture(data: bytes, where: str) -> Image:
    """Decode PNG, JPEG and the like to uint8 [H, W, 3] RGB, turned upright by its EXIF orientation.

    Transparency is dropped, grey and CMYK are converted. Raises `SourceError` naming `where` for bytes that are no
    picture, for more than 8 bits a channel (depth is not colour), and for pictures above 64 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            with Pillow.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise SourceError(
                        f"{where} has {picture.width} x {picture.height} pixels", expected="a camera picture"
                    )
                if picture.mode not in RGB_MODES:
                    raise SourceError(f"{where} has pixels of mode {picture.mode}", expected="8 bits a channel")
                upright = ImageOps.exif_transpose(picture)
                return np.array(upright.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Pillow.DecompressionBombWarning) as error:
        raise SourceError(f"{where} cannot be decoded: {error}", expected="a PNG or JPEG") from None
    except Pillow.DecompressionBombError as error:
        raise SourceError(f"{where}: {error}", expected="a camera picture") from None
