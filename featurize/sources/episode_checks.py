"""Whether an episode of a LeRobot data set is what its metadata say: rows, times, finite numbers, whole videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.featurize.sources import parquet
from vla.featurize.sources.base import StepSpec
from vla.featurize.sources.video import TOLERANCE
from vla.stores.errors import SourceError

SKIP = "--skip-bad leaves the episode out"
BY_INDEX = f"--set source_options.align=index where row i saw frame i, or {SKIP}"
OTHER_CAMERA = f"""{SKIP}; --set 'source_options.cameras=["NAME"]' chooses other cameras"""

MAX_FILE_ROWS = 20_000_000
"""Some kilobytes of parquet may claim any number of equal rows, and be made to fill the memory. LeRobot cuts files at
100 MB (its `data_files_size_in_mb`)."""


def locate(data: Path, episode: int) -> dict[int, tuple[int, int]]:
    """Return {episode index: (first row, rows)} of a data file; without an index column all rows are `episode`'s.

    Rows of one episode that do not follow each other count up to the gap only, so that the length does not fit.
    """
    if "episode_index" not in parquet.schema(data).names:
        return {episode: (0, parquet.rows(data))}
    count = parquet.rows(data)
    if count > MAX_FILE_ROWS:
        raise SourceError(f"{data} claims {count} rows", expected=f"at most {MAX_FILE_ROWS} a file", fix=SKIP)
    where = f"{data}, column episode_index"
    indices = parquet.to_array(parquet.read_table(data, ["episode_index"]).column(0), where).reshape(-1)
    if not len(indices):
        return {}
    starts = np.flatnonzero(np.r_[True, indices[1:] != indices[:-1]])
    counts = np.diff(np.r_[starts, len(indices)])
    places: dict[int, tuple[int, int]] = {}
    for start, count in zip(starts, counts, strict=True):
        places.setdefault(int(indices[start]), (int(start), int(count)))
    return places


def fitted(values: NDArray[np.generic], spec: StepSpec, where: str) -> NDArray[np.generic]:
    """Return [T, *shape] in the declared type; a column [T] of one number and [T, 1] are the same."""
    if values[0].size != int(np.prod(spec.shape)):
        raise SourceError(f"{where} has {values[0].size} numbers a frame", expected=f"{int(np.prod(spec.shape))}")
    # Too large for float32 becomes infinite, which is refused where it matters; what is no integer is refused here.
    with np.errstate(over="ignore", invalid="ignore"):
        fit = values.reshape(len(values), *spec.shape).astype(spec.dtype)
    if fit.dtype.kind in "iub" and (fit != values.reshape(fit.shape)).any():
        raise SourceError(f"{where} holds {values.dtype} that are no {spec.dtype}", expected=f"{spec.dtype}", fix=SKIP)
    return fit


def require_finite(values: NDArray[np.generic], where: str) -> None:
    """Raise `SourceError` naming the first row of values [T, D] with a NaN or an infinity."""
    bad = ~np.isfinite(values.astype(np.float64)).reshape(len(values), -1).all(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise SourceError(f"{where}, frame {row} is NaN or infinite", expected="finite numbers", fix=SKIP)


def require_order(frames: NDArray[np.generic], times: NDArray[np.generic], where: str, *, timed: bool = True) -> None:
    """Raise `SourceError` where rows are shuffled, missing or doubled; without `timed` only by their numbers.

    Numbers may begin anywhere: the length of the episode and its videos say whether its first rows are there.
    """
    counted = np.arange(len(frames)) + frames[0]
    off = np.flatnonzero(frames != counted)
    if len(off):
        found = f"{where}: row {off[0]} has frame_index {frames[off[0]]}"
        raise SourceError(found, expected=f"{counted[off[0]]}", fix=SKIP)
    back = np.flatnonzero(~(np.diff(times.astype(np.float64)) > 0)) if timed else np.zeros(0, np.int64)
    if len(back) or not np.isfinite(times.astype(np.float64)).all():
        at = int(back[0]) + 1 if len(back) else 0
        raise SourceError(f"{where}: timestamp {times[at]} at row {at}", expected="increasing seconds", fix=BY_INDEX)


def require_grid(times: NDArray[np.float64], fps: float, where: str) -> None:
    """Raise `SourceError` where steps are not 1/fps apart: then no rule tells which frame a step saw."""
    off = np.abs((times - times[0]) * fps - np.arange(len(times)))
    if off.max() > TOLERANCE:
        row = int(np.flatnonzero(off > TOLERANCE)[0])
        raise SourceError(
            f"{where}: timestamp {times[row]:.4f} at row {row} is off",
            expected=f"{row}/{fps:g} s after row 0",
            fix=BY_INDEX,
        )
