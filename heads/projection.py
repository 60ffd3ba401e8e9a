"""A fixed whitening projection of a grid: principal components of its channels, then of all its cells together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vla.stores.errors import CheckpointError, DataError

MAX_FRAMES = 4096
"""Frames that the second stage is fitted on: its Gram matrix is [frames, frames], 64 MB at 4096."""


class WhiteningProjection(nn.Module):
    """[..., cells, C] -> [..., components], uncorrelated and of unit variance over the frames it was fitted on.

    Stage 1 keeps `channels` principal components of the C channels (one basis for every cell); stage 2 keeps
    `components` principal components of the cells * channels values and scales them to unit variance. Two stages
    because a basis of the raw grid would be 130 MB for a 28 x 28 x 40 grid of two views, and as slow to apply.
    Buffers, no parameters: nothing here is trained. Components beyond the frames' rank stay 0.
    """

    mean: Tensor
    channel_basis: Tensor
    basis: Tensor

    def __init__(self, cells: int, channels_in: int, channels: int, components: int) -> None:
        super().__init__()
        channels = min(channels, channels_in)
        self.components = min(components, cells * channels)
        self.register_buffer("channel_basis", torch.full((channels_in, channels), torch.nan))
        self.register_buffer("mean", torch.full((cells * channels,), torch.nan))
        self.register_buffer("basis", torch.full((cells * channels, self.components), torch.nan))
        self._fitted = False
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Project standardised cells. Raises `CheckpointError` where `fit` was never called."""
        if not self._fitted:
            if not bool(torch.isfinite(self.basis).all()):
                raise CheckpointError("the projection was never fitted", expected="a trained head")
            self._fitted = True
        reduced = (x @ self.channel_basis).flatten(-2)
        return (reduced - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, frames: Iterable[Tensor]) -> None:
        """Fit both stages on standardised frames, chunks [n, cells, C]; at most 4096 frames in all are used.

        Raises `DataError` where there are fewer than two frames.
        """
        chunks, count = [], 0
        for chunk in frames:
            chunks.append(chunk[: MAX_FRAMES - count].half())
            count += len(chunks[-1])
            if count >= MAX_FRAMES:
                break
        if count < 2:
            raise DataError(f"{count} frames to fit a projection on", expected="two or more")
        C = self.channel_basis.shape[0]
        covariance = torch.zeros(C, C, dtype=torch.float64)
        for chunk in chunks:
            cells = chunk.float().flatten(0, -2)
            covariance += (cells.T @ cells).double()
        self.channel_basis.copy_(_leading(covariance, self.channel_basis.shape[1])[1])
        reduced = torch.cat([(chunk.float() @ self.channel_basis).flatten(1) for chunk in chunks])
        self.mean.copy_(reduced.mean(dim=0))
        reduced -= self.mean
        # The Gram matrix has the same leading spectrum as the covariance and is far smaller: frames << cells.
        values, vectors = _leading((reduced @ reduced.T).double(), min(self.components, count))
        # Below 1e-6 of the largest, a component is rounding; whitening would blow it up to unit variance.
        kept = values > 1e-6 * values[0].clamp(min=1e-12)
        scale = torch.where(kept, 1.0 / (values.clamp(min=1e-12) / count**0.5), 0.0)
        self.basis.zero_()
        self.basis[:, : len(values)] = reduced.T @ (vectors * scale).float()
        self._fitted = False


def _forget(loaded: Any, _: object) -> None:
    """Look at the buffers again before the next use."""
    loaded._fitted = False


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest eigenvalues [count], descending, and their vectors [n, count], signs fixed."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # An eigenvector's sign is arbitrary and may differ between machines: make its largest entry positive.
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return values, vectors * signs
