"""Pictures of a run: what the backbone saw, how training went, what the head predicts, what the robot did.

matplotlib draws them through its Figure class alone: no window, no global state; it is imported when a picture is
drawn. Colours are those of Okabe & Ito (2008), told apart under every common colour blindness.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.registry import known_rate, open_source
from vla.stores.errors import DataError, MachineError, SourceError, UsageError, missing_extra
from vla.stores.filesystem import explaining, write_atomic
from vla.stores.store import Store, open_store

if TYPE_CHECKING:
    from vla.heads.evaluate import ActionError

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"
CLIP = (1.0, 99.0)
"""Percentiles of a component that become 0 and 1: one odd cell must not leave all others grey."""

DPI = 120
WIDEST = 6.0
"""Width over height above which a strip of frames is broken into rows."""


def feature_overlay(store_root: Path | str, source: Path | str, out: Path | str, frames: int = 4) -> None:
    """Draw pictures beside their features: a row a frame, spread over the first episode, and a pair a camera.

    `source`: what the store was made of, as `vla featurize --source` takes it. A feature grid is shown as RGB by its
    first three principal components over all drawn cells; the first feature that has a grid is drawn.
    Raises `SourceError` where the source has not the store's episode or cameras, `UsageError` where no feature is a
    grid [V, y, x, C] or a square number of tokens [V, P, C], `MachineError` without matplotlib.
    """
    out = Path(out)
    _save(_overlay_figure(open_store(store_root), source, frames), out)


def loss_curve(metrics_jsonl: Path | str, out: Path | str) -> None:
    """Draw a run's `metrics.jsonl`: the loss on a log scale, and the held-out action error on a second axis.

    Raises `DataError` where a line does not parse or no line has a loss, `MachineError` without matplotlib.
    """
    metrics_jsonl, out = Path(metrics_jsonl), Path(out)
    _save(_loss_figure(_read_metrics(metrics_jsonl), metrics_jsonl), out)


def predicted_against_true(error: ActionError, out: Path | str) -> None:
    """Draw the first action of every window, predicted and demonstrated: one panel a dimension, windows in order."""
    out = Path(out)
    _save(_actions_figure(error), out)


def rollout_strip(video: Path | str, out: Path | str, frames: int = 6) -> None:
    """Draw `frames` pictures of a video, spread over its length, with their times.

    Raises `DataError` where the file is no video that can be decoded, `MachineError` without matplotlib.
    """
    video, out = Path(video), Path(out)
    _save(_strip_figure(video, frames), out)


def to_grid(features: NDArray[Any]) -> NDArray[np.float64]:
    """Return features [n, V, y, x, C], or [n, V, P, C] with P square in row-major order, as float64 [n, V, y, x, C]."""
    if features.ndim == 4:
        side = math.isqrt(features.shape[2])
        if side * side == features.shape[2]:
            features = features.reshape(*features.shape[:2], side, side, features.shape[3])
    if features.ndim != 5:
        raise UsageError(f"features of shape {features.shape[1:]}", expected="[V, y, x, C] or [V, P, C] with square P")
    return features.astype(np.float64)


def principal_rgb(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first three principal components of features [..., C] as RGB [..., 3] in 0..1.

    The components are those of all cells together, each clipped at its 1st and 99th percentile. With fewer than three
    channels, or where a component is constant, the rest is 0.5.
    """
    cells = features.reshape(-1, features.shape[-1])
    centred = cells - cells.mean(axis=0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    # A singular vector's sign is arbitrary: the largest loading is made positive, so that equal features look equal.
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None]
    rgb = np.full((len(cells), 3), 0.5)
    rank = int((scale > 1e-9 * max(scale[0], 1e-12)).sum())  # beyond it, components are rounding
    for component in range(min(3, rank)):
        values = centred @ axes[component]
        low, high = np.percentile(values, CLIP)
        if high > low:
            rgb[:, component] = np.clip((values - low) / (high - low), 0, 1)
    return rgb.reshape(*features.shape[:-1], 3)


def _overlay_figure(store: Store, source: Path | str, frames: int) -> Any:
    usable = np.flatnonzero(store.usable)
    if not len(usable):
        raise DataError(f"{store.root} has no whole episode", expected="at least one")
    episode, cameras = int(usable[0]), store.manifest.cameras
    length = int(store.episodes.length[episode])
    chosen = _spread(length, frames)
    pictures = _pictures(source, store, episode, chosen)
    name = _gridded(store)
    rgb = principal_rgb(to_grid(store.read(name, int(store.episodes.row_start[episode]) + chosen)))
    figure = _figure(1.9 * 2 * len(cameras) + 0.5, 1.95 * len(chosen) + 0.8)
    axes = figure.subplots(len(chosen), 2 * len(cameras), squeeze=False)
    for row, frame in enumerate(chosen.tolist()):
        for view, camera in enumerate(cameras):
            picture, left, right = pictures[row][view], axes[row, 2 * view], axes[row, 2 * view + 1]
            height, width = picture.shape[:2]
            left.imshow(picture)
            right.imshow(rgb[row, view], interpolation="nearest", extent=(0, width, height, 0))
            for axis in (left, right):
                axis.set(xticks=[], yticks=[])
            if row == 0:
                left.set_title(camera.rpartition(".")[2], fontsize=10)
                right.set_title("{} x {} {}".format(*rgb.shape[2:4], name), fontsize=10)
        axes[row, 0].set_ylabel(f"{frame / store.manifest.fps:.2f} s", fontsize=10)
    backbone = store.manifest.fingerprint.get("backbone", {}).get("name", store.root.name)
    figure.suptitle(f"{backbone}: features, first 3 principal components as RGB", fontsize=11)
    return figure


def _gridded(store: Store) -> str:
    for name, info in store.manifest.features.items():
        if len(info.shape) == 4 or (len(info.shape) == 3 and math.isqrt(info.shape[1]) ** 2 == info.shape[1]):
            return name
    found = ", ".join(f"{name} {list(info.shape)}" for name, info in store.manifest.features.items())
    raise UsageError(f"{store.root} holds {found}", expected="[V, y, x, C] or [V, P, C] with square P")


def _pictures(source: Path | str, store: Store, at: int, chosen: NDArray[np.int64]) -> list[list[Image]]:
    """Return the chosen frames of the store's episode number `at`, a picture for each camera."""
    episode, length, cameras = store.episodes.ids[at], int(store.episodes.length[at]), store.manifest.cameras
    opened = open_source(source, **known_rate(source, store.manifest.fps))
    index = opened.index()
    missing = [camera for camera in cameras if camera not in index.cameras]
    if missing:
        raise SourceError(f"{source} has no camera {', '.join(missing)}", expected="the source that the store is of")
    position = next((i for i, known in enumerate(index.episodes) if known.id == episode), None)
    if position is None or index.episodes[position].length != length:
        raise SourceError(
            f"{source} has no episode {episode!r} of {length} frames", expected="the source that the store is of"
        )
    views = [index.cameras.index(camera) for camera in cameras]
    pictures = []
    for frame in chosen.tolist():
        (images,) = opened.frames(position, frame, frame + 1)
        pictures.append([images[view] for view in views])
    return pictures


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    with explaining(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # a run that is still writing
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise DataError(f"{path}, line {number} does not parse", expected="a JSON object a line") from None
    return lines


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of a figure; null, which stands for what was not finite, is a gap."""
    kept = [line for line in lines if name in line]
    return [line["step"] for line in kept], [math.nan if line[name] is None else float(line[name]) for line in kept]


def _loss_figure(lines: list[dict[str, Any]], path: Path) -> Any:
    steps, losses = _series(lines, "loss")
    if not steps:
        raise DataError(f"{path} has no loss", expected="a run of `vla train-head` after its first log line")
    figure = _figure(8, 4.2)
    left = figure.subplots()
    drawn = left.plot(steps, losses, color=BLUE, label="training loss (left)")
    left.set_yscale("log")
    left.set_xlabel("optimiser step")
    left.set_ylabel("training loss (log scale)", color=BLUE)
    left.grid(alpha=0.25, which="both")
    steps, errors = _series(lines, "action_mae")
    if steps:
        right = left.twinx()
        drawn += right.plot(steps, errors, color=VERMILLION, marker="o", ms=5, label="held-out action error (right)")
        at, baseline = _series(lines, "baseline_mae")
        if at:
            drawn += right.plot(at, baseline, color=GREY, ls="--", label="always the mean action (right)")
        right.set_ylim(bottom=0)
        right.set_ylabel("mean absolute action error,\nexecuted steps, data's units", color=VERMILLION)
    figure.legend(handles=drawn, loc="outside upper center", ncols=len(drawn), frameon=False, fontsize=9)
    return figure


def _actions_figure(error: ActionError) -> Any:
    dims = len(error.names)
    figure = _figure(9, 1.55 * dims + 1.0)
    panels = figure.subplots(dims, 1, sharex=True, squeeze=False)[:, 0]
    windows = np.arange(len(error.true))
    for dim, (name, panel) in enumerate(zip(error.names, panels, strict=True)):
        panel.plot(windows, error.true[:, dim], color=BLUE, lw=1.6, label="demonstrated")
        panel.plot(windows, error.predicted[:, dim], color=VERMILLION, lw=1.0, label="predicted")
        panel.set_ylabel(name)
        panel.grid(alpha=0.25)
        panel.margins(x=0.01)
        mae = float(np.abs(error.predicted[:, dim] - error.true[:, dim]).mean())
        panel.set_title(f"mean absolute error {mae:.3f}", loc="right", fontsize=9, pad=3)
    panels[-1].set_xlabel("window, in order (episodes end to end)")
    figure.align_ylabels(panels)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _strip_figure(video: Path, frames: int) -> Any:
    pictures, times = _video_frames(video, frames)
    height, width = pictures[0].shape[:2]
    columns, rows = len(pictures), 1
    while columns > 1 and columns * width > WIDEST * rows * height:
        rows += 1
        columns = -(-len(pictures) // rows)
    figure = _figure(10, 10 / columns * height / width * rows + 0.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, picture, time in zip(panels, pictures, times, strict=False):
        panel.imshow(picture)
        panel.set_title(f"{time:.2f} s", fontsize=10)
    return figure


def _video_frames(video: Path, frames: int) -> tuple[list[Image], list[float]]:
    """Return pictures spread over a video, and their times in seconds."""
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            wanted = set(_spread(stream.frames, frames).tolist())
            kept = [frame for number, frame in enumerate(container.decode(stream)) if number in wanted]
            if not kept:
                raise DataError(f"{video} has no frame")
            pictures = [cast(Image, frame.to_ndarray(format="rgb24")) for frame in kept]
            return pictures, [float(frame.time or 0) for frame in kept]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{video} cannot be decoded: {error}", expected="a video of `vla rollout --video`") from None


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """Return up to `count` positions from first to last, evenly."""
    return np.unique(np.linspace(0, max(length - 1, 0), min(count, max(length, 1))).round().astype(np.int64))


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of inches x inches whose parts make room for one another."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        found = "the package matplotlib is not installed"
        raise MachineError(found, fix=missing_extra("sim")) from None
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Any, out: Path) -> None:
    """Write a PNG whole or not at all. A figure without a window is drawn by Agg."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content.getvalue())
