"""Pictures stored as encoded bytes, to RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from vla.featurize.image import Image
from vla.stores.errors import SourceError
from vla.stores.pointers import is_pointer, pointer_error

FORMATS = ("PNG", "JPEG", "WEBP")
"""What LeRobot and its neighbours write. Fewer decoders face files from strangers."""

RGB_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "PA", "CMYK", "YCbCr", "1"})
"""Pillow's modes of at most 8 bits a channel that are colour or grey."""

MAX_PIXELS = 64_000_000
"""Above this a picture of some kilobytes may be made to fill the memory; cameras have 12 million."""

_PNG = b"\x89PNG\r\n\x1a\n"


def decode_picture(data: bytes, where: str, size: tuple[int, int] | None = None) -> Image:
    """Decode PNG, JPEG or WebP to uint8 [H, W, 3] RGB, turned upright by its EXIF orientation.

    Transparency is dropped; grey, palette and CMYK are converted. Raises `SourceError` naming `where` for bytes that
    are no such picture, for more than 8 bits a channel (depth is not colour), for pictures above 64 million pixels,
    and for another size upright than `size` (height, width).
    """
    if is_pointer(data):
        raise pointer_error(where)
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            _require_8_bit(picture, data, where)
            # Before anything else: to read a PNG's EXIF, Pillow decodes it.
            require_size((picture.height, picture.width), None, where)
            if size is not None and {picture.height, picture.width} != set(size):
                require_size((picture.height, picture.width), size, where)
            image = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
            require_size((image.shape[0], image.shape[1]), size, where)
            return image
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise SourceError(f"{where}: {error}", expected=f"at most {MAX_PIXELS} pixels") from None
    except SourceError:
        raise
    # What Pillow's decoders raise on bytes cut or changed, besides the documented OSError and SyntaxError.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise SourceError(f"{where} cannot be decoded: {_brief(error)}", expected=" or ".join(FORMATS)) from None


def require_size(found: tuple[int, int], wanted: tuple[int, int] | None, where: str) -> None:
    """Raise `SourceError` where a picture (height, width) is not of the size that the metadata say, or a bomb."""
    height, width = found
    if height * width > MAX_PIXELS:
        raise SourceError(f"{where} has {width} x {height} pixels", expected=f"at most {MAX_PIXELS} in all")
    if wanted is not None and (height, width) != wanted:
        expected = f"{wanted[1]} x {wanted[0]} as meta/info.json says"
        raise SourceError(
            f"{where} has {width} x {height} pixels", expected=expected, fix="resize it, or correct the shape there"
        )


def _require_8_bit(picture: Pillow.Image, data: bytes, where: str) -> None:
    # Pillow opens a PNG of 16 bits a channel as "RGB" and drops the lower byte; byte 24 of a PNG is its bit depth.
    is_deep = data.startswith(_PNG) and data[24] == 16
    if is_deep or picture.mode not in RGB_MODES:
        depth = "16 bits a channel" if is_deep else f"pixels of mode {picture.mode}"
        raise SourceError(f"{where} has {depth}", expected="8 bits a channel; depth maps are no pictures")


def _brief(error: BaseException) -> str:
    # Pillow names the buffer by its address, which no two runs share: the reason is kept in the store.
    return " ".join(str(error).partition(" <_io.BytesIO")[0].split())[:120] or type(error).__name__
