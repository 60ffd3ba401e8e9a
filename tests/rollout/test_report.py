"""The pictures of a run are drawn whole, upright, from the public functions alone."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.evaluate import ActionError
from vla.rollout.report import feature_overlay, loss_curve, predicted_against_true, rollout_strip
from vla.rollout.video_writer import VideoFile
from vla.stores.errors import MachineError

SOURCE = "synthetic:episodes=2,length=[6,6],cameras=2"


def _pixels(file: Path) -> NDArray[np.int64]:
    with Pillow.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def _rows_like(pixels: NDArray[np.int64], colour: tuple[int, int, int]) -> NDArray[np.int64]:
    return np.nonzero((np.abs(pixels - colour) < 40).all(axis=2))[0]


def _write_metrics(file: Path) -> Path:
    lines = [{"step": step, "loss": 1 / step} for step in (50, 100)] + [{"step": 100, "action_mae": 0.2}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_video_is_drawn_upright(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :, 0], picture[32:, :, 2] = 255, 255  # red above, blue below
    video = VideoFile(tmp_path / "v.mp4", fps=Fraction(20), height=64, width=64)
    video.append([picture] * 4)
    video.close()
    rollout_strip(tmp_path / "v.mp4", tmp_path / "strip.png", frames=2)
    pixels = _pixels(tmp_path / "strip.png")
    red, blue = _rows_like(pixels, (255, 0, 0)), _rows_like(pixels, (0, 0, 255))
    assert len(red) > 1000
    assert len(blue) > 1000
    assert red.max() <= blue.min() + 3


def test_features_are_drawn_in_colour_beside_the_pictures(tmp_path: Path) -> None:
    run(prepare(FeaturizeConfig(source=SOURCE, backbone="toy")), tmp_path / "toy")
    feature_overlay(tmp_path / "toy", SOURCE, tmp_path / "one.png", frames=1)
    feature_overlay(tmp_path / "toy", SOURCE, tmp_path / "four.png", frames=4)
    one, four = _pixels(tmp_path / "one.png"), _pixels(tmp_path / "four.png")
    assert four.size > 2 * one.size
    assert (np.ptp(one, axis=2) > 100).mean() > 0.02


def test_the_loss_is_drawn_with_the_action_error_in_another_colour(tmp_path: Path) -> None:
    loss_curve(_write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "loss.png")
    pixels = _pixels(tmp_path / "loss.png")
    assert len(_rows_like(pixels, (0x00, 0x72, 0xB2))) > 50
    assert len(_rows_like(pixels, (0xD5, 0x5E, 0x00))) > 50


def test_each_action_dimension_has_its_panel(tmp_path: Path) -> None:
    heights = []
    for dims in (1, 3):
        values, zeros = np.random.default_rng(0).normal(size=(9, dims)).astype(np.float32), np.zeros(dims)
        error = ActionError(
            tuple("xyz"[:dims]),
            zeros,
            zeros,
            zeros,
            zeros,
            9,
            9,
            values,
            -values,
            entries=zeros,
            executed_entries=zeros,
        )
        predicted_against_true(error, tmp_path / f"{dims}.png")
        heights.append(len(_pixels(tmp_path / f"{dims}.png")))
    assert heights[1] > 2 * heights[0]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = _write_metrics(tmp_path / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MachineError, match=r"\[sim\]"):
        loss_curve(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
