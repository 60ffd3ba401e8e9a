"""Pictures of a run: features over the camera's view, the loss, predicted against true actions, a rollout."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources.registry import open_source
from vla.heads.evaluate import ActionError
from vla.stores.errors import DataError, MachineError
from vla.stores.store import open_store

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
"""Of the palette of Okabe and Ito (2008), which colour-blind readers tell apart."""


def feature_overlay(store: Path, source: str, out: Path, frames: int = 4) -> None:
    """Draw pictures of the first episode beside their grid feature, its three principal components as RGB.

    One basis for all frames and views, so that colours mean the same everywhere. Raises `DataError` where the store
    has no grid.
    """
    opened = open_store(store)
    grids = [name for name, info in opened.manifest.features.items() if info.dims[-3:] == ("y", "x", "channel")]
    if not grids:
        raise DataError(f"{store} has no grid feature", expected="dims y, x, channel")
    name, length = grids[0], int(opened.episodes.length[0])
    chosen = np.linspace(0, length - 1, min(frames, length)).round().astype(np.int64)
    values = opened.read(name, chosen + int(opened.episodes.row_start[0])).astype(np.float32)
    colours = _principal_colours(values)
    views = list(open_source(source).frames(0, 0, length))
    count = len(opened.manifest.cameras)
    figure, axes = _subplots(2 * count, len(chosen), (2.1 * len(chosen), 2.2 * 2 * count))
    for column, frame in enumerate(chosen.tolist()):
        for view in range(count):
            camera = opened.manifest.cameras[view].rsplit(".", 1)[-1]
            axes[2 * view, column].imshow(views[frame][view])
            axes[2 * view, column].set_title(f"{camera}, frame {frame}", fontsize=9)
            axes[2 * view + 1, column].imshow(colours[column, view], interpolation="nearest")
            axes[2 * view + 1, column].set_title(f"{name} {values.shape[2]}x{values.shape[3]}", fontsize=9, color=GREY)
    for axis in axes.flat:
        axis.set_axis_off()
    _save(figure, out)


def loss_curve(metrics: Path, out: Path) -> None:
    """Draw training loss (log scale) and, where it was measured, the held-out action error, over steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = _subplots(1, 1, (7, 3.6))
    loss = axes[0, 0]
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    loss.plot(*zip(*trained, strict=True), color=BLUE)
    loss.set_yscale("log")
    loss.set_xlabel("optimiser step")
    loss.set_ylabel("training loss", color=BLUE)
    held_out = [(line["step"], line["action_mae"]) for line in lines if "action_mae" in line]
    if held_out:
        error = loss.twinx()
        error.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o")
        error.set_ylabel("action error, held-out episodes", color=ORANGE)
        error.set_ylim(bottom=0)
    _save(figure, out)


def predicted_against_true(error: ActionError, out: Path, windows: int = 200) -> None:
    """Draw the first action of each window, predicted and demonstrated, one panel a dimension."""
    count = len(error.names)
    figure, axes = _subplots(count, 1, (8, 1.5 * count + 0.6))
    for dimension, name in enumerate(error.names):
        axis = axes[dimension, 0]
        axis.plot(error.true[:windows, dimension], color=GREY, linewidth=1.6, label="demonstrated")
        axis.plot(error.predicted[:windows, dimension], color=ORANGE, linewidth=1.0, label="predicted")
        axis.set_ylabel(name)
        axis.margins(x=0.01)
    axes[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes[-1, 0].set_xlabel("frame of the held-out episodes, end to end")
    _save(figure, out)


def rollout_strip(video: Path, out: Path, frames: int = 6) -> None:
    """Draw frames of a rollout's video, evenly spaced."""
    with av.open(str(video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = np.linspace(0, len(pictures) - 1, min(frames, len(pictures))).round().astype(int)
    figure, axes = _subplots(len(chosen) // 2 + len(chosen) % 2, 2, (8, 2.1 * (len(chosen) // 2 + len(chosen) % 2)))
    for axis, number in zip(axes.flat, chosen.tolist(), strict=False):
        axis.imshow(pictures[number])
        axis.set_title(f"frame {number}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    _save(figure, out)


def _principal_colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first three principal components of [N, V, y, x, C] as RGB in [0, 1], clipped at 1 % and 99 %."""
    flat = values.reshape(-1, values.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, _, basis = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ basis[:3].T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
    low, high = np.percentile(parts, (1, 99), axis=0)
    scaled: NDArray[np.float32] = ((parts - low) / np.maximum(high - low, 1e-6)).clip(0, 1).astype(np.float32)
    return scaled.reshape(*values.shape[:-1], 3)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, NDArray[Any]]:
    """Return a figure and its axes [rows, columns]. Raises `MachineError` where matplotlib is missing."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise MachineError("matplotlib is not installed", fix="pip install 'vla-feature-cache[sim]'") from None
    figure = figures.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
