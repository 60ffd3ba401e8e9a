"""Pictures of every 8-bit kind become upright RGB; deep ones, bombs and broken bytes are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vla.featurize.sources.pictures import MAX_PIXELS, decode_picture
from vla.stores.errors import SourceError

RED = (250, 10, 20)
WHERE = "file.parquet, camera front, episode_000003, frame 7"


def encode(picture: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def flag() -> Pillow.Image:
    """Return 24 wide, 16 high: the left half red, the right half green, the lowest quarter blue."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12], pixels[:, 12:], pixels[12:] = RED, (0, 250, 0), (0, 0, 250)
    return Pillow.fromarray(pixels)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_come_back_bit_for_bit(kind: str, options: dict[str, Any]) -> None:
    image = decode_picture(encode(flag(), kind, **options), WHERE, (16, 24))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(flag()))


def test_jpeg_is_near_what_was_drawn() -> None:
    image = decode_picture(encode(flag(), "JPEG", quality=95, subsampling=0), WHERE)
    assert np.abs(image[:8, :8].astype(int) - RED).max() < 8


def test_transparency_is_dropped_and_the_colour_below_kept() -> None:
    picture = flag().convert("RGBA")
    picture.putalpha(0)
    np.testing.assert_array_equal(decode_picture(encode(picture), WHERE), np.asarray(flag()))


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_has_three_equal_channels(mode: str) -> None:
    image = decode_picture(encode(flag().convert(mode)), WHERE)
    assert image.shape == (16, 24, 3)
    np.testing.assert_array_equal(image, np.asarray(flag().convert("L"))[:, :, None].repeat(3, axis=2))


def test_palettes_and_black_and_white_are_converted() -> None:
    np.testing.assert_array_equal(decode_picture(encode(flag().quantize(8)), WHERE), np.asarray(flag()))
    bits = Pillow.fromarray(np.tile(np.uint8([0, 255]), (4, 2))).convert("1")
    np.testing.assert_array_equal(decode_picture(encode(bits), WHERE)[0, :, 0], [0, 255, 0, 255])


def test_cmyk_is_converted_to_rgb() -> None:
    cyan = Pillow.new("CMYK", (8, 8), (255, 0, 0, 0))
    image = decode_picture(encode(cyan, "JPEG", quality=95), WHERE)
    assert np.abs(image.astype(int) - (0, 255, 255)).max() < 8


@pytest.mark.parametrize(
    ("orientation", "back"),
    [
        (2, Pillow.Transpose.FLIP_LEFT_RIGHT),
        (3, Pillow.Transpose.ROTATE_180),
        (4, Pillow.Transpose.FLIP_TOP_BOTTOM),
        (5, Pillow.Transpose.TRANSPOSE),
        (6, Pillow.Transpose.ROTATE_270),
        (7, Pillow.Transpose.TRANSVERSE),
        (8, Pillow.Transpose.ROTATE_90),
    ],
)
def test_a_camera_held_sideways_gives_upright_pictures(orientation: int, back: Pillow.Transpose) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    upright = flag().transpose(back)
    data = encode(flag(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_picture(data, WHERE, (upright.height, upright.width)), np.asarray(upright))
    if upright.size != flag().size:  # the size that counts is the upright one
        with pytest.raises(SourceError, match="has 16 x 24 pixels; expected 24 x 16"):
            decode_picture(data, WHERE, (16, 24))


def test_another_size_than_declared_is_refused() -> None:
    with pytest.raises(SourceError, match=r"frame 7 has 24 x 16 pixels; expected 16 x 24 as meta/info\.json says"):
        decode_picture(encode(flag()), WHERE, (24, 16))


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Assemble a PNG by hand: Pillow writes neither 16-bit colour nor pictures of a size it would not read."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_a_channel_are_refused_not_cut_to_eight() -> None:
    colour = png_of(2, 2, 16, 2, (b"\0" + bytes(12)) * 2)
    grey = png_of(2, 2, 16, 0, (b"\0" + bytes(4)) * 2)
    for data in (colour, grey):
        with pytest.raises(SourceError, match=r"frame 7 has 16 bits a channel; expected 8 bits"):
            decode_picture(data, WHERE)


def test_the_same_hand_made_picture_with_eight_bits_reads() -> None:
    np.testing.assert_array_equal(decode_picture(png_of(2, 1, 8, 2, b"\0" + bytes(range(6))), WHERE)[0, 1], [3, 4, 5])


@pytest.mark.parametrize("side", [8_500, 40_000])  # Pillow itself warns above 9,459 and refuses above 13,377
def test_a_bomb_is_refused_before_any_pixel_is_decoded(side: int) -> None:
    assert side * side > MAX_PIXELS
    bomb = png_of(side, side, 8, 2, b"")  # no pixels at all: decoding them would say so instead
    with pytest.raises(SourceError, match=rf"{WHERE}.*expected at most {MAX_PIXELS}"):
        decode_picture(bomb, WHERE)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(SourceError, match="expected PNG or JPEG or WEBP"):
        decode_picture(encode(flag(), kind), WHERE)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_bytes_that_are_no_picture_are_named(data: bytes) -> None:
    with pytest.raises(SourceError, match=f"{WHERE} cannot be decoded"):
        decode_picture(data, WHERE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_anywhere_is_refused_and_never_half_grey(kind: str) -> None:
    noise = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    data = encode(noise, kind)
    for keep in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(SourceError, match="frame 7"):
            decode_picture(data[: int(len(data) * keep)], WHERE)
