"""Actions and states to a common range and back; features to zero mean and unit variance.

The statistics are buffers, so they travel inside the checkpoint. An unfitted normaliser holds NaN and refuses to
work: un-normalised numbers never reach a robot.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vla.stores.dtypes import SPACING, DtypeName
from vla.stores.errors import CheckpointError, DataError
from vla.stores.norm_stats import NormStats
from vla.stores.ranges import is_constant

Mode = Literal["limits", "quantile", "zscore", "none"]
OPENPI_EPS = 1e-6
"""What openpi adds to a standard deviation and to a range (`Normalize` of its transforms.py)."""
MAX_MAGNITUDE = 1e37
"""Differences of two values this large still fit float32 (3.4e38)."""


class Normalizer(nn.Module):
    """`y = (x - centre) / scale` for each of D dimensions, and its inverse with the same numbers.

    Buffers `centre`, `scale` [D] float32 and `constant` [D] bool. Constant dimensions get their value as centre and
    scale 1: every number normalises to 0, and `inverse` returns the value exactly, whatever a network predicts.
    What is constant is decided by float32's rounding (stores/ranges.py), not by a number in the data's units: Diffusion
    Policy's 1e-4 would make a constant of every action in micrometres. Above 1e-4 the formulas are the same.
    """

    centre: Tensor
    scale: Tensor
    constant: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.full((dim,), torch.nan))
        self.register_buffer("scale", torch.full((dim,), torch.nan))
        self.register_buffer("constant", torch.zeros(dim, dtype=torch.bool))
        _recheck_after_load(self)

    def fit(
        self,
        values: NDArray[Any],
        mode: Mode,
        *,
        valid: NDArray[np.bool_] | None = None,
    ) -> None:
        """Set the statistics from values [N, D] of the training split, any real dtype, N >= 1.

        `limits`: minimum and maximum to [-1, 1]. `quantile`: the 1st and 99th percentile to [-1, 1]; where the two
        coincide (a gripper that rarely moves) the dimension's limits instead. `zscore`: mean 0, standard deviation 1.
        `none`: unchanged, but for constant dimensions. `valid` [N, D] marks values to count (padded dimensions left
        out). Raises `DataError` for a wrong shape and for NaN, infinite or overflowing values, naming the dimension.
        """
        values = np.asarray(values)
        D = len(self.centre)
        if values.ndim != 2 or values.shape[1] != D or D == 0 or len(values) == 0:
            raise DataError(f"normalisation over values of shape {values.shape}", expected=f"[N >= 1, {D}]")
        values = values.astype(np.float64)
        use = np.ones(values.shape, bool) if valid is None else valid
        wrong = use & ~(np.abs(values) <= MAX_MAGNITUDE)  # also true for NaN
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(
                f"value {values[row, column]} in row {row}, dimension {column}",
                expected=f"finite values up to {MAX_MAGNITUDE:g}",
                fix="vla verify on the store",
            )
        centre, scale, constant = np.zeros(D), np.ones(D), np.zeros(D, bool)
        for d in range(D):
            column = values[use[:, d], d]
            if len(column):
                centre[d], scale[d], constant[d] = _fit_dimension(column, mode)
        self.set(centre, scale, constant)

    def fit_from(self, stats: NormStats, mode: Mode, where: str) -> None:
        """Set from openpi's statistics with its formulas, instead of from values.

        `zscore`: (x - mean) / (std + 1e-6). `quantile`: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1. Components whose std
        is zero but for rounding count as constant, as in `fit`; those that move and whose percentiles coincide keep
        scale 1. Raises `DataError` naming `where` for another number of components, other modes, and a `quantile` of a
        file without quantiles.
        """
        if len(stats.mean) != len(self.centre):
            raise DataError(f"{where} has {len(stats.mean)} components", expected=f"{len(self.centre)}")
        if mode == "zscore":
            centre, scale = stats.mean, stats.std + OPENPI_EPS
            still = is_constant(stats.mean, stats.mean + stats.std)
        elif mode == "quantile" and stats.q01 is not None and stats.q99 is not None:
            scale = (stats.q99 - stats.q01 + OPENPI_EPS) / 2
            centre = stats.q01 + scale
            still = is_constant(stats.q01, stats.q99)
        else:
            raise DataError(
                f"{where} does not give what the normalisation {mode!r} needs",
                expected="zscore, or quantile where it has q01 and q99",
                fix="--set model.action_norm=zscore --set model.state_norm=zscore",
            )
        constant = is_constant(stats.mean, stats.mean + stats.std)
        self.set(np.where(still, stats.mean, centre), np.where(still, 1.0, scale), constant)

    def set(self, centre: NDArray[Any], scale: NDArray[Any], constant: NDArray[np.bool_]) -> None:
        """Set the statistics directly, each [D]. Raises `DataError` where float32 does not hold them."""
        for buffer, value in ((self.centre, centre), (self.scale, scale), (self.constant, constant)):
            buffer.copy_(torch.as_tensor(value).to(buffer.dtype))
        wrong = torch.nonzero(~(self.centre.isfinite() & self.scale.isfinite())).flatten().tolist()
        if wrong:
            raise DataError(f"the statistics of dimension {wrong[0]} are not finite", expected="numbers within float32")
        self._checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D] in the data's units, any real dtype, to float32. Raises `DataError` for a wrong width."""
        self._check(x)
        normalised = (x.to(self.centre.dtype) - self.centre) / self.scale
        # A live state may leave its constant: no step has trained what the head would read, in the user's unit.
        return torch.where(self.constant, 0.0, normalised)

    def inverse(self, y: Tensor) -> Tensor:
        """Bring normalised [..., D] back to the data's units; constant dimensions are their constant exactly."""
        self._check(y)
        return torch.where(self.constant, self.centre, y * self.scale + self.centre)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != len(self.centre):
            raise DataError(f"{x.shape[-1]} dimensions to normalise", expected=f"{len(self.centre)}")
        if not self._checked:
            if not bool(torch.isfinite(self.centre).all() and (self.scale > 0).all()):
                raise CheckpointError(
                    "normalisation statistics are missing", expected="a fitted model", fix="train the head again"
                )
            self._checked = True


def _fit_dimension(column: NDArray[np.float64], mode: Mode) -> tuple[float, float, bool]:
    """Return (centre, scale, whether it is constant) of the numbers of one dimension [N], N >= 1."""
    low, high = column.min(), column.max()
    if is_constant(low, high):
        return float(column[0]), 1.0, True
    if mode == "none":
        return 0.0, 1.0, False
    if mode == "zscore":
        return float(column.mean()), float(column.std()), False
    if mode == "quantile":
        q01, q99 = np.quantile(column, (0.01, 0.99))
        if not is_constant(q01, q99):
            low, high = q01, q99
    # The centre as float32 has it: far from zero its rounding would push one limit beyond 1.
    centre = float(np.float32((low + high) / 2))
    return centre, float(max(high - centre, centre - low)), False


class ChannelScaler(nn.Module):
    """Zero mean and unit variance for each channel of a feature; channels that never vary give exactly 0.

    Buffers `mean`, `inv_std` [C] float32, `inv_std` 0 for constant channels.
    """

    mean: Tensor
    inv_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("inv_std", torch.full((channels,), torch.nan))
        _recheck_after_load(self)

    def fit(self, mean: NDArray[Any], std: NDArray[Any], dtype: DtypeName = "float16") -> None:
        """Set from the training set's mean and standard deviation [C]. Raises `DataError` where they do not fit.

        A channel that varies by less than the rounding of its stored `dtype` is constant.
        """
        mean, std = np.array(mean, np.float64), np.array(std, np.float64)  # own, writable memory for torch
        if mean.shape != self.mean.shape or std.shape != self.mean.shape:
            raise DataError(f"feature statistics of shape {mean.shape}", expected=f"{tuple(self.mean.shape)}")
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise DataError("feature statistics are not finite", fix="vla verify on the store")
        spacing, smallest = SPACING[dtype]
        # An eighth of a step: of the rows, at most 1.6 % are rounded to the neighbouring number.
        constant = std <= np.maximum(spacing / 8 * np.abs(mean), smallest)
        self.mean.copy_(torch.as_tensor(mean))
        self.inv_std.copy_(torch.as_tensor(np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))))
        self._checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Standardise [..., C], float16 or float32, into a new float32 tensor."""
        self.check()
        # In place on one copy: allocating arrays of this size costs more than the arithmetic.
        return x.to(self.mean.dtype, copy=True).sub_(self.mean).mul_(self.inv_std)

    def check(self) -> None:
        """Raise `CheckpointError` where `fit` was never called and no checkpoint was loaded."""
        if not self._checked:
            if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.inv_std).all()):
                raise CheckpointError("feature statistics are missing", expected="a fitted model")
            self._checked = True


def _recheck_after_load(module: Any) -> None:
    """Look at the buffers once after each load, not in every step: reading them waits for the device."""
    module._checked = False

    def forget(loaded: Any, _: object) -> None:
        loaded._checked = False

    module.register_load_state_dict_post_hook(forget)
