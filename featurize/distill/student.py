"""The RGB2PC student: cached grids of frozen backbones in, one vector a view out, drawn to a point-cloud teacher's.

Letters: M backbones, y x C the grid of one, K = tokens of the common grid, D the fused width, E the teacher's.
All grids are pooled to one common grid first, so that token k is the same place of the picture in every backbone.
Backbones are known by their features' names: in whatever order they are given, the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vla.featurize.distill.fusion import MixtureFusion, WeightedFusion
from vla.stores.settings import Settings
from vla.stores.user_given import PlainText


class StudentConfig(Settings):
    """Everything that the student's network depends on; resolved, it is kept in the checkpoint.

    `inputs`: {feature: (y, x, C)}, the grid of each backbone for one view. `grid`: the common one (None: the smallest
    y and the smallest x among the inputs: nothing is made up by interpolation). `teacher_dim`: E. `dim`: D (None: E).
    `fusion`: "weighted" or "moe", which has `gate_hidden` and `top_k`. `layers`, `heads`, `dropout`: of the context
    encoder. `tokens`: places drawn in each training step, the same in every backbone; None: all of them. Without
    training it is always all of them.
    """

    inputs: Annotated[dict[str, tuple[int, int, int]], PlainText()] = Field(min_length=1)
    teacher_dim: int = Field(ge=1)
    dim: int | None = Field(None, ge=2)
    grid: tuple[int, int] | None = None
    fusion: Literal["weighted", "moe"] = "weighted"
    gate_hidden: int = Field(1280, ge=1)
    top_k: int = Field(2, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    tokens: int | None = Field(None, ge=1)

    @field_validator("inputs")
    @classmethod
    def _are_grids(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        if min(min(shape) for shape in value.values()) < 1:
            raise ValueError("a grid has no places or no channels")
        return dict(sorted(value.items()))

    @model_validator(mode="after")
    def _resolve(self) -> StudentConfig:
        given = {"dim": self.dim or self.teacher_dim, "grid": self.grid or self._smallest()}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if self.width % 2 or self.width % self.heads:
            raise ValueError(f"dim {self.width} is not even, or not a multiple of heads {self.heads}")
        if min(self.common) < 1:
            raise ValueError(f"a common grid of {self.common}")
        if self.tokens is not None and self.tokens > self.places:
            raise ValueError(f"tokens {self.tokens} of {self.places} places")
        return self

    def _smallest(self) -> tuple[int, int]:
        return min(y for y, _, _ in self.inputs.values()), min(x for _, x, _ in self.inputs.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The features, sorted."""
        return tuple(self.inputs)

    @property
    def width(self) -> int:
        """D."""
        assert self.dim is not None
        return self.dim

    @property
    def common(self) -> tuple[int, int]:
        """The common grid (y, x)."""
        assert self.grid is not None
        return self.grid

    @property
    def places(self) -> int:
        """K of the whole common grid."""
        return self.common[0] * self.common[1]


class Student(nn.Module):
    """Adapters by name, fusion, context encoder over places, mean; and the projection that the teacher is met in."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.adapters = nn.ModuleDict(
            {module_key(name): bottleneck(shape[2], D) for name, shape in config.inputs.items()}
        )
        self.fusion: nn.Module = WeightedFusion(len(config.names))
        if config.fusion == "moe":
            top_k = min(config.top_k, len(config.names))
            self.fusion = MixtureFusion(len(config.names), D, config.gate_hidden, top_k)
        self.register_buffer("places", sinusoids(config.places, D), persistent=False)
        layer = nn.TransformerEncoderLayer(D, config.heads, 4 * D, config.dropout, activation="relu", batch_first=True)
        self.context = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.projection = bottleneck(D, config.teacher_dim, hidden=2 * D)

    def fuse(self, tokens: Mapping[str, Tensor], chosen: Tensor | None = None) -> Tensor:
        """Turn {name: [N, K, C]}, tokens of the common grid, into [N, D]; `chosen` int64 [k]: these places alone."""
        at = slice(None) if chosen is None else chosen
        adapted = [self.adapters[module_key(name)](tokens[name][:, at]) for name in self.config.names]
        fused = self.fusion(torch.stack(adapted, dim=-2))
        places: Any = self.places
        mean: Tensor = self.context(fused + places[at]).mean(dim=1)
        return mean

    def project(self, fused: Tensor) -> Tensor:
        """Turn [N, D] into what is compared with the teacher's embedding, [N, E]."""
        projected: Tensor = self.projection(fused)
        return projected

    def forward(self, grids: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Turn {name: [N, y, x, C]} into (fused [N, D], projected [N, E]).

        In training `config.tokens` places are drawn, the same for all backbones and all N, from torch's generator.
        """
        tokens = {name: pool_grid(grids[name], self.config.common) for name in self.config.names}
        chosen = None
        if self.training and self.config.tokens is not None:
            drawn = torch.randperm(self.config.places)[: self.config.tokens]
            chosen = drawn.sort().values.to(next(iter(tokens.values())).device)
        fused = self.fuse(tokens, chosen)
        return fused, self.project(fused)


def pool_grid(grid: Tensor, common: tuple[int, int]) -> Tensor:
    """Turn [..., y, x, C] into the tokens [..., K, C] float32 of a common grid, row by row, by averaging over areas."""
    values = grid.float()
    if grid.shape[-3:-1] != common:
        flat = values.reshape(-1, *values.shape[-3:]).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(flat, common).permute(0, 2, 3, 1)
        values = pooled.reshape(*values.shape[:-3], *pooled.shape[1:])
    return values.flatten(-3, -2)


def bottleneck(inside: int, outside: int, hidden: int | None = None) -> nn.Sequential:
    """Linear, GELU, Linear, LayerNorm; `hidden` is twice the output's width where nothing is said."""
    hidden = hidden or 2 * outside
    return nn.Sequential(nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside), nn.LayerNorm(outside))


def sinusoids(count: int, dim: int) -> Tensor:
    """Return the position encoding of Vaswani et al. (2017, arXiv:1706.03762, section 3.5), float32 [count, dim]."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angle = torch.arange(count)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def module_key(name: str) -> str:
    """Return a feature's name as a key of ModuleDict, which takes neither dots nor the names of its own methods."""
    return "of_" + name.replace("%", "%25").replace(".", "%2E")
