"""Names of components, however a data set nests them; sizes that are refused before anything is allocated."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vla.featurize.sources.lerobot import LeRobotSource
from vla.featurize.sources.pictures import decode_picture
from vla.featurize.sources.synthetic import SyntheticSource
from vla.featurize.sources.video import Clip, read_clip
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Any]


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "z"],
        [["x", "y", "z"]],
        [["x"], ["y", "z"]],
        {"motors": ["x", "y", "z"]},
        {"motors": [["x", "y", "z"]]},
        {"left": ["x", "y"], "right": ["z"]},
        {"z": 2, "x": 0, "y": 1},
    ],
    ids=str,
)
def test_names_nested_in_lists_and_tables_are_kept(names: Any, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path / "set")
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["action"]["names"] = names
    path.write_text(json.dumps(info))
    assert LeRobotSource(root).index().steps["action"].names == ("x", "y", "z")


def _png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pillow.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(SourceError, match="pic"):
        decode_picture(_png(width, height), "pic")


def test_a_bomb_of_a_hundred_megapixels_is_refused() -> None:
    out = io.BytesIO()
    Pillow.new("1", (10_000, 10_000)).save(out, "PNG")
    assert len(out.getvalue()) < 20_000
    with pytest.raises(SourceError, match="pic"):
        decode_picture(out.getvalue(), "pic")


def test_a_video_whose_stream_is_larger_than_allowed_is_refused_by_the_decoder(
    tmp_path: Path, write_video: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "v.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3)
    monkeypatch.setattr("vla.featurize.sources.video.MAX_PIXELS", 1000)
    with pytest.raises(SourceError, match=r"v\.mp4"):
        list(read_clip(Clip(tmp_path / "v.mp4", 0, 10, None, "camera a"), 0, 3))


@pytest.mark.parametrize(
    "options",
    [{"length": [1, 10**9]}, {"episodes": 10**6, "length": [1, 10**6]}, {"image_size": 4096, "cameras": 16}],
    ids=str,
)
def test_made_up_demonstrations_that_would_not_fit_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        SyntheticSource(**options)
