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

from vla.stores.errors import CheckpointError, DataError
from vla.stores.norm_stats import NormStats

Mode = Literal["limits", "quantile", "zscore", "none"]
RANGE_EPS = 1e-4
"""Below this range a dimension counts as constant: the value that Diffusion Policy's normaliser uses."""
OPENPI_EPS = 1e-6
"""What openpi adds to a standard deviation and to a range (`Normalize` of its transforms.py)."""
MAX_MAGNITUDE = 1e37
"""Differences of two values this large still fit float32 (3.4e38)."""


class Normalizer(nn.Module):
    """`y = (x - centre) / scale` for each of D dimensions, and its inverse with the same numbers.

    Buffers `centre`, `scale` [D] float32 and `constant` [D] bool. Constant dimensions get their mean as centre and
    scale 1: they normalise to 0 and come back as they were.
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
        range_eps: float = RANGE_EPS,
    ) -> None:
        """Set the statistics from values [N, D] of the training split, any real dtype, N >= 1.

        `limits`: minimum and maximum to [-1, 1]. `quantile`: the 1st and 99th percentile to [-1, 1]; where the two
        coincide (a gripper that rarely moves) the dimension's limits instead. `zscore`: mean 0, standard deviation 1.
        `none`: unchanged. `valid` [N, D] marks values to count (padded dimensions left out).
        Raises `DataError` for a wrong shape and for NaN, infinite or overflowing values, naming the dimension.
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
            if len(column) and mode != "none":
                centre[d], scale[d], constant[d] = _fit_dimension(column, mode, range_eps)
        self.set(centre, scale, constant)

    def fit_from(self, stats: NormStats, mode: Mode, where: str) -> None:
        """Set from openpi's statistics with its formulas, instead of from values.

        `zscore`: (x - mean) / (std + 1e-6). `quantile`: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1. Components whose std
        (q99 - q01) is below `RANGE_EPS` count as constant, as in `fit`. Raises `DataError` naming `where` for another
        number of components, other modes, and a `quantile` of a file without quantiles.
        """
        if len(stats.mean) != len(self.centre):
            raise DataError(f"{where} has {len(stats.mean)} components", expected=f"{len(self.centre)}")
        if mode == "zscore":
            centre, scale, spread = stats.mean, stats.std + OPENPI_EPS, stats.std
        elif mode == "quantile" and stats.q01 is not None and stats.q99 is not None:
            spread = stats.q99 - stats.q01
            scale = (spread + OPENPI_EPS) / 2
            centre = stats.q01 + scale
        else:
            raise DataError(
                f"{where} does not give what the normalisation {mode!r} needs",
                expected="zscore, or quantile where it has q01 and q99",
                fix="--set model.action_norm=zscore --set model.state_norm=zscore",
            )
        constant = spread < RANGE_EPS
        self.set(np.where(constant, stats.mean, centre), np.where(constant, 1.0, scale), constant)

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
        return (x.to(self.centre.dtype) - self.centre) / self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """Bring normalised [..., D] back to the data's units."""
        self._check(y)
        return y * self.scale + self.centre

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != len(self.centre):
            raise DataError(f"{x.shape[-1]} dimensions to normalise", expected=f"{len(self.centre)}")
        if not self._checked:
            if not bool(torch.isfinite(self.centre).all() and (self.scale > 0).all()):
                raise CheckpointError(
                    "normalisation statistics are missing", expected="a fitted model", fix="train the head again"
                )
            self._checked = True


def _fit_dimension(column: NDArray[np.float64], mode: Mode, range_eps: float) -> tuple[float, float, bool]:
    low, high = float(column.min()), float(column.max())
    if high - low < range_eps:
        return float(column.mean()), 1.0, True
    if mode == "zscore":
        return float(column.mean()), float(column.std()), False
    if mode == "quantile":
        q01, q99 = (float(q) for q in np.quantile(column, (0.01, 0.99)))
        if q99 - q01 >= range_eps:
            low, high = q01, q99
    return (low + high) / 2, (high - low) / 2, False


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

    def fit(self, mean: NDArray[Any], std: NDArray[Any]) -> None:
        """Set from the training set's mean and standard deviation [C]. Raises `DataError` where they do not fit."""
        mean, std = np.array(mean, np.float64), np.array(std, np.float64)  # own, writable memory for torch
        if mean.shape != self.mean.shape or std.shape != self.mean.shape:
            raise DataError(f"feature statistics of shape {mean.shape}", expected=f"{tuple(self.mean.shape)}")
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise DataError("feature statistics are not finite", fix="vla verify on the store")
        # 1e-4 of the mean is below float16's spacing (2^-11 relative), 1e-7 about its smallest number (2^-24).
        constant = std <= np.maximum(1e-4 * np.abs(mean), 1e-7)
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
