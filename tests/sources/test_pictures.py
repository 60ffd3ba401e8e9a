from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image as Pillow

from vla.featurize.sources.pictures import decode_picture
from vla.stores.errors import SourceError

Encode = Callable[..., bytes]
RED = np.zeros((8, 12, 3), np.uint8)
RED[:, :, 0] = 200


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_8_bit_png_becomes_rgb(mode: str, encoded: Encode) -> None:
    image = decode_picture(encoded(Pillow.fromarray(RED).convert(mode)), "here")
    assert (image.shape, image.dtype) == ((8, 12, 3), np.uint8)
    np.testing.assert_array_equal(image, np.array(Pillow.fromarray(RED).convert(mode).convert("RGB")))


def test_transparency_is_dropped(encoded: Encode) -> None:
    pixels = np.dstack([RED, np.zeros((8, 12), np.uint8)])
    np.testing.assert_array_equal(decode_picture(encoded(pixels), "here"), RED)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_jpeg_becomes_rgb(mode: str, encoded: Encode) -> None:
    source = Pillow.fromarray(RED).convert(mode)
    image = decode_picture(encoded(source, "JPEG", quality=95), "here")
    assert image.mean(axis=(0, 1)) == pytest.approx(np.array(source.convert("RGB")).mean(axis=(0, 1)), abs=4)


def test_webp_is_read(encoded: Encode) -> None:
    np.testing.assert_array_equal(decode_picture(encoded(RED, "WEBP", lossless=True), "here"), RED)


def test_a_picture_of_one_pixel_is_read(encoded: Encode) -> None:
    assert decode_picture(encoded(RED[:1, :1]), "here").tolist() == [[[200, 0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, encoded: Encode) -> None:
    upright = np.zeros((6, 10, 3), np.uint8)
    upright[0, 0] = 255
    upright[0, 1, 0] = 255
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = np.ascontiguousarray(undo[orientation](upright))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif.tobytes())
    np.testing.assert_array_equal(decode_picture(data, "here", size=(6, 10)), upright)


def test_a_picture_of_another_size_is_refused(encoded: Encode) -> None:
    with pytest.raises(SourceError, match=r"frame 3 has 12 x 8 pixels; expected 8 x 12 as meta/info.json says"):
        decode_picture(encoded(RED), "frame 3", size=(12, 8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_are_refused_and_not_cut_to_eight(colour: int, channels: int) -> None:
    data = png(4, 2, 16, colour, (b"\0" + b"\x12\x34" * 4 * channels) * 2)
    Pillow.open(io.BytesIO(data)).load()  # a sound file: it is refused for its depth
    with pytest.raises(SourceError, match="has 16 bits a channel; expected 8 bits"):
        decode_picture(data, "here")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 1), (60_000, 1100)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(SourceError, match="expected at most 64000000"):
        decode_picture(png(width, height, 8, 2, b"\0"), "here")


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "PPM"])
def test_other_formats_are_refused(kind: str, encoded: Encode) -> None:
    with pytest.raises(SourceError, match=r"cannot be decoded.*expected PNG or JPEG or WEBP"):
        decode_picture(encoded(RED, kind), "here")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_end_in_a_picture_or_a_source_error(kind: str, encoded: Encode) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    whole = encoded(noise, kind)
    generator = np.random.default_rng(1)
    refused = 0
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[int(generator.integers(len(data))) :]
        else:
            for at in generator.integers(0, len(data), 3):
                data[at] = int(generator.integers(256))
        try:
            assert decode_picture(bytes(data), "here").dtype == np.uint8
        except SourceError:
            refused += 1
    assert refused >= 90
