"""LLaVA-3D's position-aware tokens: patch features plus an encoding of where each patch is, averaged in voxels.

Written after the paper (Zhu et al., "LLaVA-3D: A Simple yet Effective Pathway to Empowering LMMs with 3D-awareness",
2024, sections 3.1 and 3.2) and compared with its code in tests/parity. A voxel is a cell of one world-anchored grid,
round(position / size), so the views of a time step share it. What the original draws at random, the subset of voxels
that fits, is drawn from a digest of the voxels here: the same frame always gives the same tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def make_position_encoder(width: int) -> nn.Sequential:
    """Return the untrained encoder [..., 3] metres -> [..., width]: linear, layer norm, ReLU, linear."""
    encoder = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return encoder


def make_projector(width: int, out: int) -> nn.Sequential:
    """Return LLaVA's untrained projector of vision tokens into its language model's width ("mlp2x_gelu")."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


@dataclass(frozen=True)
class Tokens:
    """Tokens of the V views of one time step: `values` [V, N, C], `positions` [V, N, 3] metres, `mask` [V, N].

    Where `mask` is 0 there is no token, and the rest is 0.
    """

    values: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def keep_patches(values: torch.Tensor, positions: torch.Tensor, known: torch.Tensor) -> Tokens:
    """Return one token a patch: [V, P, C], [V, P, 3]; those whose position is not `known` bool [V, P] are left out."""
    mask = known.to(values)
    return Tokens(values * mask[..., None], positions.to(values) * mask[..., None], mask)


def pool_voxels(
    values: torch.Tensor,
    positions: torch.Tensor,
    known: torch.Tensor,
    *,
    size: float,
    count: int,
    across_views: bool,
) -> Tokens:
    """Average the patches of each voxel of `size` metres; return at most `count` voxels a view, padded with zeros.

    `values` [V, P, C] of one time step, `positions` [V, P, 3] in the world, `known` bool [V, P]. With `across_views`
    a voxel is averaged over all views and stands in the row of the first view that sees it, so that the rows together
    are the scene, each voxel once; without, each view has voxels of its own. Rows are in the order of the cells.
    """
    views, patches, _ = values.shape
    at = positions.reshape(-1, 3).cpu()
    seen = known.reshape(-1).cpu().nonzero()[:, 0]
    cells = torch.round(at[seen] / size).long()
    view = seen // patches
    key = cells if across_views else torch.cat([view[:, None], cells], dim=1)
    distinct, voxel = torch.unique(key, dim=0, return_inverse=True)
    owner = torch.full((len(distinct),), views).scatter_reduce(0, voxel, view, "amin")
    # A product with a matrix of weights: on a GPU, adding at indices is not reproducible.
    weights = torch.zeros(len(distinct), views * patches)
    weights[voxel, seen] = 1 / torch.bincount(voxel, minlength=len(distinct)).float()[voxel]
    mean = weights.to(values) @ values.flatten(0, 1)
    centre = weights.to(values) @ at.to(values)
    made = Tokens(*(values.new_zeros(views, count, *rest) for rest in (values.shape[2:], (3,), ())))
    for number in range(views):
        own = (owner == number).nonzero()[:, 0]
        own = own[torch.from_numpy(choose(distinct[own, -3:].numpy(), count))]
        made.values[number, : len(own)] = mean[own.to(values.device)]
        made.positions[number, : len(own)] = centre[own.to(values.device)]
        made.mask[number, : len(own)] = 1
    return made


def choose(cells: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the indices, ascending, of at most `count` of distinct voxels [n, 3]: all of them, or a uniform subset.

    The subset depends on the voxels of the view alone, through SHA-256: on no generator, batch, episode or platform.
    """
    if len(cells) <= count:
        return np.arange(len(cells))
    rows = [row.tobytes() for row in cells.astype("<i8")]
    frame = hashlib.sha256(b"".join(rows)).digest()
    ranks = sorted(range(len(rows)), key=lambda index: hashlib.sha256(frame + rows[index]).digest())
    return np.sort(np.array(ranks[:count], np.int64))
