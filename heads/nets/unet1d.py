"""The conditional 1-D U-Net of Diffusion Policy (Chi et al. 2023, https://arxiv.org/abs/2303.04137).

Modules are named as in the published implementation, so that its checkpoints of `ConditionalUnet1D` load here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vla.stores.errors import UsageError


class SinusoidalPosEmb(nn.Module):
    """Sines and cosines of a position [B] at `dim` / 2 frequencies, geometric from 1 to 1/10000: [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, position: Tensor) -> Tensor:
        half = self.dim // 2
        rate = torch.exp(torch.arange(half, device=position.device) * (-math.log(10000) / (half - 1)))
        angle = position[:, None].float() * rate[None]
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Conv1dBlock(nn.Module):
    """Conv1d, GroupNorm, Mish on [B, C, T]; the length is kept."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, outputs),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class ConditionalResidualBlock1D(nn.Module):
    """Two convolution blocks with a FiLM between them: scale and shift per channel from the condition [B, D]."""

    def __init__(self, inputs: int, outputs: int, cond_dim: int, kernel_size: int, n_groups: int, scale: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [Conv1dBlock(inputs, outputs, kernel_size, n_groups), Conv1dBlock(outputs, outputs, kernel_size, n_groups)]
        )
        self.scale, self.outputs = scale, outputs
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, outputs * (2 if scale else 1)))
        self.residual_conv = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out = self.blocks[0](x)
        film = self.cond_encoder(cond)[..., None]
        if self.scale:
            scale, shift = film.chunk(2, dim=1)
            out = scale * out + shift
        else:
            out = out + film
        result: Tensor = self.blocks[1](out) + self.residual_conv(x)
        return result


class Downsample1d(nn.Module):
    """Halve the length of [B, C, T]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample1d(nn.Module):
    """Double the length of [B, C, T]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, dim, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class ConditionalUnet1D(nn.Module):
    """Predict the noise in a chunk of actions: (sample [B, T, A], step [B], global_cond [B, D]) -> [B, T, A].

    T has to be divisible by 2^(len(down_dims) - 1) (`check_sizes`). `n_groups` divides every entry of `down_dims`.
    """

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int,
        diffusion_step_embed_dim: int = 256,
        down_dims: tuple[int, ...] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        cond_predict_scale: bool = True,
    ) -> None:
        super().__init__()
        dsed = diffusion_step_embed_dim
        dims = [input_dim, *down_dims]
        cond_dim = dsed + global_cond_dim
        pairs = list(itertools.pairwise(dims))

        def block(inputs: int, outputs: int) -> ConditionalResidualBlock1D:
            return ConditionalResidualBlock1D(inputs, outputs, cond_dim, kernel_size, n_groups, cond_predict_scale)

        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalPosEmb(dsed), nn.Linear(dsed, dsed * 4), nn.Mish(), nn.Linear(dsed * 4, dsed)
        )
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [
                    block(inputs, outputs),
                    block(outputs, outputs),
                    Downsample1d(outputs) if level < len(pairs) - 1 else nn.Identity(),
                ]
            )
            for level, (inputs, outputs) in enumerate(pairs)
        )
        # Every level but the finest is entered from below, with the skip of the same level beside it.
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(outputs * 2, inputs), block(inputs, inputs), Upsample1d(inputs)])
            for inputs, outputs in reversed(pairs[1:])
        )
        self.final_conv = nn.Sequential(
            Conv1dBlock(down_dims[0], down_dims[0], kernel_size, n_groups), nn.Conv1d(down_dims[0], input_dim, 1)
        )

    def forward(self, sample: Tensor, step: Tensor, global_cond: Tensor) -> Tensor:
        x = sample.transpose(1, 2)
        cond = torch.cat([self.diffusion_step_encoder(step), global_cond], dim=-1)
        skips = []
        for first, second, down in cast(Iterable[Any], self.down_modules):
            x = second(first(x, cond), cond)
            skips.append(x)
            x = down(x)
        for middle in self.mid_modules:
            x = middle(x, cond)
        for first, second, up in cast(Iterable[Any], self.up_modules):
            x = up(second(first(torch.cat([x, skips.pop()], dim=1), cond), cond))
        out: Tensor = self.final_conv(x)
        return out.transpose(1, 2)


def check_sizes(horizon: int, down_dims: tuple[int, ...], kernel_size: int, n_groups: int) -> None:
    """Raise `UsageError` where the U-Net cannot be built or cannot halve and double the horizon without remainder."""
    factor = 2 ** (len(down_dims) - 1)
    if horizon % factor:
        raise UsageError(f"horizon {horizon} with {len(down_dims)} levels", expected=f"a multiple of {factor}")
    if kernel_size % 2 == 0:  # padding of kernel_size // 2 keeps the length of odd kernels only
        raise UsageError(f"kernel_size {kernel_size}", expected="an odd number")
    if wrong := [dim for dim in down_dims if dim < 1 or dim % n_groups]:
        raise UsageError(f"down_dims has {wrong[0]}", expected=f"a multiple of n_groups = {n_groups}")
