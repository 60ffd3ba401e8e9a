"""The baseline and the toy: what they promise beyond the conformance suite."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import torch

from vla.featurize.backbones.pixels import Pixels, PixelsSettings
from vla.featurize.backbones.toy import Toy, ToySettings


def test_pixels_keep_the_picture_upright_in_minus_one_to_one() -> None:
    backbone = Pixels(PixelsSettings(size=4))
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[0, 3] = (255, 0, 51)
    grid = backbone.encode(backbone.preprocess(picture)[None, None])["grid"][0, 0]
    assert torch.equal(grid[0, 3, :2], torch.tensor([1.0, -1.0]))
    assert abs(grid[0, 3, 2].item() - (2 * 51 / 255 - 1)) < 1e-6
    assert (grid == -1).sum() == 4 * 4 * 3 - 2


def test_pixels_average_boxes_when_they_shrink() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    grid = Pixels(PixelsSettings(size=32)).preprocess(picture)
    wanted = picture.reshape(32, 2, 32, 3, 3).astype(float).mean((1, 3)).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(grid.numpy() - wanted).max() <= 1.01 / 127.5  # Pillow rounds to whole pixels


def test_the_toy_is_the_average_colour_times_its_projection() -> None:
    backbone = Toy(ToySettings(grid=2, channels=5, seed=3))
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4, 4:] = (255, 102, 0)
    grid = backbone.encode(backbone.preprocess(picture)[None, None])["grid"][0, 0]
    colour = torch.tensor([1.0, 102 / 127.5 - 1, -1.0])
    assert torch.allclose(grid[0, 1], colour @ backbone.projection)
    assert torch.allclose(grid[1, 0], -backbone.projection.sum(0))


def test_the_toy_gives_the_same_bits_in_any_batch() -> None:
    backbone = Toy(ToySettings(grid=3, channels=7))
    images = torch.rand(33, 2, 3, 3, 3)
    together = backbone.encode(images)["grid"]
    for size in (1, 2, 5, 32):
        assert torch.equal(torch.cat([backbone.encode(part)["grid"] for part in images.split(size)]), together)


def test_the_delay_of_the_toy_counts_time_steps() -> None:
    backbone = Toy(ToySettings(delay_ms=10))
    began = time.perf_counter()
    backbone.encode(torch.zeros(4, 2, 3, 4, 4))
    assert time.perf_counter() - began >= 0.04


def test_the_names_of_backbones_can_be_listed_without_torch_or_transformers() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        "from vla.featurize.backbones.registry import BACKBONES; assert 'efficientnet' in BACKBONES"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
