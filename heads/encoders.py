"""From a window's observation to what a head is conditioned on. Grids keep their layout; nothing is pooled globally.

Ways to read a grid or a set of tokens:
- `keypoints`: spatial softmax (Levine et al. 2016): each learned heat map's expected position and value; grids only.
  What it learns about a thing it knows at every place, and so it is the default for grids;
- `attention`: learned queries attend to the projected cells with their positions;
- `projection`: a fixed whitening projection (principal components of the channels, then of the whole grid), fitted on
  the training episodes before the first step: the fastest to train.
Vectors of several backbones can also be fused (fusion.py): `fusion`, each by its adapter, then a weighted mean.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.fusion import MeanFusion
from vla.heads.normalize import ChannelScaler, Normalizer
from vla.heads.projection import WhiteningProjection
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import PlainText, UserGiven

IDENTITY_STD = 0.02
"""Initial scale of learned embeddings that are added to tokens: small beside the tokens, as in ViT."""


class EncoderConfig(Settings):
    """How observations are read.

    `kind`: see the module; "auto" takes keypoints for grids, attention for tokens, the projection for vectors.
    `dim`: width of what each observed frame becomes. `components` and `channel_components`: sizes of the projection's
    two stages. `queries`: attention queries or heat maps a view. `noise`: standard deviation of Gaussian noise on the
    standardised features while training (an augmentation that a cache allows; 0.3 suits the projection). `dropout`: on
    the encoded frame. `use_features`, `use_state`, `use_task`: which inputs are read; the instruction is read where
    there is more than one. `state_columns`: columns of the state by name or index (None: all). `fusion_dim`: width of
    the fused vector, and `student`: a run of `vla distill rgb2pc` whose adapters and weights the fusion starts from.
    """

    kind: Literal["auto", "keypoints", "attention", "projection", "fusion"] = "auto"
    dim: int = Field(512, ge=8)
    components: int = Field(512, ge=1)
    channel_components: int = Field(16, ge=1)
    queries: int = Field(32, ge=1)
    noise: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    use_features: bool = True
    use_state: bool = True
    use_task: bool = True
    state_columns: Annotated[tuple[int | str, ...] | None, PlainText()] = None
    fusion_dim: int = Field(1280, ge=1)
    student: Annotated[str | None, UserGiven(training_only=True)] = None

    @model_validator(mode="after")
    def _a_student_is_for_a_fusion(self) -> EncoderConfig:
        if self.student is not None and self.kind != "fusion":
            raise ValueError(f"a student, and encoder.kind {self.kind!r}: it is for 'fusion'")
        return self


class ObservationEncoder(nn.Module):
    """Window -> `frames` [B, N, dim], one vector per observed frame; or, if made with `tokens`, `tokens` [B, L, dim].

    Only the layers of one of the two exist: data-parallel training refuses parameters that get no gradient.
    """

    def __init__(self, config: EncoderConfig, io: HeadIO, n_obs: int, *, tokens: bool = False) -> None:
        super().__init__()
        self.config, self.n_obs = config, n_obs
        self.columns = io.state_columns(config.state_columns) if config.use_state and io.state_dim else ()
        self.names = tuple(io.features) if config.use_features else ()
        if not self.names and not self.columns:
            unread = io.state_dim > 0 and not config.use_state
            raise UsageError(
                f"the head has no input{': there is no feature, and no state is read here' if unread else ''}",
                expected="a feature" if unread else "features, a state, or both",
                fix="--set model.encoder.use_features=true"
                if io.features
                else "--features NAME, or a --store with some",
            )
        self.state = Normalizer(io.state_dim) if self.columns else None
        fused = [name for name in self.names if config.kind == "fusion" and not io.features[name].layout]
        self.fusion = (
            MeanFusion({name: io.features[name] for name in fused}, config.fusion_dim)
            if config.kind == "fusion"
            else None
        )
        self._keys = {name: module_key(name) for name in self.names if name not in fused}
        self.readers = nn.ModuleDict({key: _reader(config, io.features[name]) for name, key in self._keys.items()})
        self.task = nn.Embedding(len(io.tasks), config.dim) if config.use_task and len(io.tasks) > 1 else None
        if tokens:
            self.to_token = nn.ModuleDict(
                {key: nn.Linear(reader.token_width, config.dim) for key, reader in self.readers.items()}  # type: ignore[arg-type]
            )
            self.fused_token = nn.Linear(config.fusion_dim, config.dim) if self.fusion is not None else None
            self.state_token = nn.Linear(len(self.columns), config.dim) if self.columns else None
            # Which frame and which of its tokens: without it two heat maps that peak at one place are the same.
            per_frame = sum(reader.tokens for reader in self.readers.values()) + bool(self.columns)  # type: ignore[misc]
            per_frame += 0 if self.fusion is None else self.fusion.views
            self.identity = nn.Parameter(torch.randn(n_obs, per_frame, config.dim) * IDENTITY_STD)
            self.token_dropout = nn.Dropout(config.dropout)
        else:
            width = sum(reader.width for reader in self.readers.values()) + len(self.columns)  # type: ignore[misc]
            width += 0 if self.fusion is None else self.fusion.views * config.fusion_dim
            self.mix = nn.Sequential(nn.Linear(width, config.dim), nn.SiLU(), nn.Dropout(config.dropout))

    def named_readers(self) -> dict[str, _Standardised]:
        """Return what reads each feature, by its name; fused features have none."""
        return {name: self.readers[key] for name, key in self._keys.items()}  # type: ignore[misc]

    def frames(self, batch: Batch) -> Tensor:
        """Return [B, N, dim]."""
        parts = [self._read(name, batch).flatten(2) for name in self._keys]
        if self.fusion is not None:
            parts.append(self._fused(batch).flatten(2))
        if self.columns:
            parts.append(self._state(batch))
        encoded: Tensor = self.mix(torch.cat(parts, dim=-1))
        return encoded if self.task is None else encoded + self.task(batch.task)[:, None]

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return tokens [B, L, dim] of all frames, state and task among them, and which are real, bool [B, L]."""
        B, N = batch.obs_valid.shape
        parts = [self.to_token[key](self._read(name, batch)) for name, key in self._keys.items()]
        if self.fused_token is not None:
            parts.append(self.fused_token(self._fused(batch)))
        if self.state_token is not None:
            parts.append(self.state_token(self._state(batch))[:, :, None])
        sequence = self.token_dropout(torch.cat(parts, dim=2) + self.identity).flatten(1, 2)
        valid = batch.obs_valid[:, :, None].expand(B, N, sequence.shape[1] // N).flatten(1)
        if self.task is not None:
            sequence = torch.cat([sequence, self.task(batch.task)[:, None]], dim=1)
            valid = torch.cat([valid, valid.new_ones(B, 1)], dim=1)
        return sequence, valid

    def _read(self, name: str, batch: Batch) -> Tensor:
        read: Tensor = self.readers[self._keys[name]](batch.feature(name), batch.feature_valid.get(name))
        return read

    def _fused(self, batch: Batch) -> Tensor:
        assert self.fusion is not None
        fused: Tensor = self.fusion({name: batch.feature(name) for name in self.fusion.names})
        return fused

    def _state(self, batch: Batch) -> Tensor:
        assert self.state is not None
        assert batch.state is not None  # check_batch saw to it
        normalised: Tensor = self.state(batch.state)
        return normalised[..., list(self.columns)]


class _Standardised(nn.Module):
    """Base of the readers: standardised channels, with noise while training.

    `forward(feature [B, N, V, *layout, C], valid [B, N, V, P] bool or None)` -> [B, N, tokens, token_width].
    """

    tokens: int
    token_width: int

    @property
    def width(self) -> int:
        """Numbers a frame becomes."""
        return self.tokens * self.token_width

    def __init__(self, config: EncoderConfig, io: FeatureIO) -> None:
        super().__init__()
        self.scaler = ChannelScaler(io.channels)
        self.noise = config.noise

    def standardise(self, feature: Tensor) -> Tensor:
        x: Tensor = self.scaler(feature)
        return x.add_(torch.randn_like(x), alpha=self.noise) if self.training and self.noise else x

    def refuse_mask(self, valid: Tensor | None) -> None:
        """Raise `DataError` where cells are marked as padding: only attention can leave some of them out."""
        if valid is not None:
            raise DataError(
                "a feature with a varying number of tokens",
                expected="the same number in every frame",
                fix="--set model.encoder.kind=attention",
            )


class ProjectionReader(_Standardised):
    """[B, N, V, *layout, C] -> [B, N, 1, components], whitened."""

    def __init__(self, config: EncoderConfig, io: FeatureIO) -> None:
        super().__init__(config, io)
        cells = io.views * math.prod(io.layout)
        self.projection = WhiteningProjection(cells, io.channels, config.channel_components, config.components)
        self.tokens, self.token_width = 1, self.projection.components

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        self.refuse_mask(valid)
        x: Tensor = self.projection(self.scaler(feature).flatten(2, -2))[:, :, None]
        # The noise is in the whitened space: there every direction has unit variance.
        return x + self.noise * torch.randn_like(x) if self.training and self.noise else x


class AttentionReader(_Standardised):
    """[B, N, V, *layout, C] -> [B, N, V * queries, width of a token]: learned queries over cells with positions.

    Cells are W x + b + position, for keys and values. All that is linear: queries are carried back through W to score
    the raw channels, and W is applied after pooling, to `queries` vectors a view instead of to every cell.
    """

    def __init__(self, config: EncoderConfig, io: FeatureIO) -> None:
        super().__init__(config, io)
        self.tokens, self.token_width = io.views * config.queries, 64
        self.cell = nn.Linear(io.channels, self.token_width)
        # Positions start as large as the cells' content, and scores of about unit size: with positions of 0.02 and flat
        # scores, the head starts from the grid's mean and does not find its way out (tests/heads/test_learning.py).
        self.position = nn.Parameter(torch.randn(io.views, math.prod(io.layout), self.token_width) * 0.5)
        self.queries = nn.Parameter(torch.randn(io.views, config.queries, self.token_width))
        self.key = nn.Linear(self.token_width, self.token_width, bias=False)  # softmax cancels what a bias adds
        nn.init.normal_(self.key.weight, std=1 / math.sqrt(self.token_width))

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.standardise(feature).flatten(3, -2)
        query = self.queries @ self.key.weight / math.sqrt(self.token_width)  # [V, Q, token_width]
        scores = _scores(x, query @ self.cell.weight) + query @ self.position.transpose(1, 2)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, :, :, None], torch.finfo(scores.dtype).min)
        where = scores.softmax(-1)
        pooled: Tensor = self.cell(where @ x) + where @ self.position
        return pooled.flatten(2, 3)


class KeypointReader(_Standardised):
    """[B, N, V, y, x, C] -> [B, N, V * queries, 3]: expected x and y in [-1, 1] of each heat map, and its value."""

    def __init__(self, config: EncoderConfig, io: FeatureIO) -> None:
        super().__init__(config, io)
        self.tokens, self.token_width = io.views * config.queries, 3
        self.heat = nn.Parameter(torch.randn(io.views, config.queries, io.channels) / math.sqrt(io.channels))
        self.temperature = nn.Parameter(torch.ones(config.queries))
        rows, columns = io.layout
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("grid", torch.stack([x.flatten(), y.flatten()], dim=1), persistent=False)

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        self.refuse_mask(valid)
        grid: Tensor = self.get_buffer("grid")
        heat = _scores(self.standardise(feature).flatten(3, -2), self.heat)
        where = (heat * self.temperature.exp()[:, None]).softmax(-1)
        value = (where * heat).sum(-1, keepdim=True).tanh()
        return torch.cat([where @ grid, value], dim=-1).flatten(2, 3)


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    """Score cells [B, N, V, P, C] by each view's weights [V, Q, C]: [B, N, V, Q, P]."""
    return weight @ x.transpose(-1, -2)


def module_key(feature: str) -> str:
    """Return a feature's key in a ModuleDict, whose keys are attributes of a module: its name, unless that has a dot or
    is one that modules have already ("values", "type")."""
    if not hasattr(nn.ModuleDict(), feature) and "." not in feature and not feature.startswith("%"):
        return feature
    return "%" + feature.replace("%", "%25").replace(".", "%2E")


def _reader(config: EncoderConfig, io: FeatureIO) -> _Standardised:
    if config.kind == "keypoints" and len(io.layout) != 2:
        raise UsageError(
            f"keypoints need a grid (y, x, channel), and a feature has {io.dims}",
            fix="--set model.encoder.kind=attention",
        )
    auto = {0: "projection", 1: "attention", 2: "keypoints"}[min(len(io.layout), 2)]
    kinds = {"projection": ProjectionReader, "attention": AttentionReader, "keypoints": KeypointReader}
    reader: _Standardised = kinds[auto if config.kind in ("auto", "fusion") else config.kind](config, io)
    return reader
