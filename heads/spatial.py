"""`spatial`: SpatialVLA's trainable part: a connector MLP and a flow-matching action expert over cached 3-D tokens.

The tokens (feature `spatial` [V, L, E] with its mask, `vla featurize --backbone spatial`) are standardised, go through
Linear(E -> width), GELU, Linear(width -> width), and become the expert's context, beside one token of the robot's state
for each observed frame and one of the instruction where there is more than one. Flow matching is pi0's (flow.py).
Everything upstream of the tokens is frozen by being cached: nothing else than what `param_groups` lists can train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vla.heads.batch import Batch, HeadIO
from vla.heads.flow import TIME_SCALE, Sampler, TimeDistribution, flow_errors, flow_sample, velocity_mse
from vla.heads.model import MAX_LAYERS, HeadConfig, HeadModel
from vla.heads.needs import Need
from vla.heads.nets.action_expert import ActionExpert, Seen, check_width
from vla.heads.normalize import ChannelScaler, Mode, Normalizer
from vla.stores.errors import UsageError
from vla.stores.user_given import PlainText

if TYPE_CHECKING:
    from vla.heads.data import HeadData

TOKENS, POSITIONS = "spatial", "spatial_xyz"
IDENTITY_STD = 0.02
"""Initial scale of the learned embeddings added to tokens: small beside the tokens, as in ViT."""


class SpatialConfig(HeadConfig):
    """Settings of the spatial head.

    `width`: of the connector and of the expert; `layers`, `heads`, `dropout`: of the expert. `connector_lr`: the
    connector's learning rate (the expert's is `train.lr`; the schedule scales both alike). `use_positions`: add
    Linear(3 -> width) of each token's place in metres, where the stores hold `spatial_xyz` (the tokens of LLaVA-3D
    carry an encoding of it already). `use_state`: read the robot's state; `state_columns` of it by name or index (None:
    all). `use_task`: read which instruction it is, where there is more than one. `time`: "beta" draws t = 0.999
    Beta(1.5, 1) + 0.001 as pi0 does, "uniform" U(0, 1). `sampler`: Euler, or Heun (two evaluations a step);
    `sample_steps` of it. `action_norm`, `state_norm`, `norm_stats`: see `HeadConfig`; Gaussian by default.
    """

    width: int = Field(512, ge=8)
    layers: int = Field(4, ge=1, le=MAX_LAYERS)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    connector_lr: float = Field(1e-3, gt=0)
    use_positions: bool = True
    use_state: bool = True
    state_columns: Annotated[tuple[int | str, ...] | None, PlainText()] = None
    use_task: bool = True
    time: TimeDistribution = "beta"
    sampler: Sampler = "euler"
    sample_steps: int = Field(10, ge=1)
    action_norm: Mode = "zscore"
    state_norm: Mode = "zscore"


class SpatialHead(HeadModel):
    """Connector and expert; see the module. Raises `UsageError` for stores without the tokens and their mask."""

    Config: ClassVar[type[HeadConfig]] = SpatialConfig
    train_defaults: ClassVar[dict[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.999)}
    config: SpatialConfig

    def __init__(self, config: SpatialConfig, io: HeadIO) -> None:
        super().__init__(config, io)
        check_width(config.width, config.heads)
        tokens, width = io.features[TOKENS], config.width
        self.scaler = ChannelScaler(tokens.channels)
        self.connector = nn.Sequential(nn.Linear(tokens.channels, width), nn.GELU(), nn.Linear(width, width))
        self.positions = nn.Linear(3, width) if config.use_positions and POSITIONS in io.features else None
        if self.positions is not None and io.features[POSITIONS].shape != (*tokens.shape[:-1], 3):
            found = f"{POSITIONS} has shape {io.features[POSITIONS].shape}"
            raise UsageError(found, expected=f"{(*tokens.shape[:-1], 3)}, a place for each of the tokens")
        # Which frame and which view a token is from; its place in the view it has with it.
        self.identity = nn.Parameter(torch.randn(config.n_obs, tokens.views, 1, width) * IDENTITY_STD)
        self._columns = io.state_columns(config.state_columns) if config.use_state and io.state_dim else ()
        self._state = Normalizer(io.state_dim) if self._columns else None
        self.state_token = nn.Linear(len(self._columns), width) if self._columns else None
        self.frame = nn.Parameter(torch.randn(config.n_obs, width) * IDENTITY_STD) if self._columns else None
        self.task = nn.Embedding(len(io.tasks), width) if config.use_task and len(io.tasks) > 1 else None
        self.net = ActionExpert(
            config.horizon, io.action_dim, width, config.layers, config.heads, config.dropout, TIME_SCALE
        )

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """See `HeadModel.needs`."""
        return (Need(TOKENS, "spatial", masked=True),)

    @property
    def reads(self) -> dict[str, int]:
        """See `HeadModel.reads`."""
        return dict.fromkeys((TOKENS, POSITIONS) if self.positions is not None else (TOKENS,), self.config.n_obs)

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return self._columns

    @property
    def meaning(self) -> dict[str, Any]:
        """See `HeadModel.meaning`."""
        return super().meaning | {"state_columns": list(self._columns)}

    @property
    def state(self) -> Normalizer | None:
        """See `HeadModel.state`."""
        return self._state

    def prepare(self, data: HeadData) -> None:
        """Fit the normalisers and the scale of the tokens' channels (padded tokens count in it as zeros)."""
        super().prepare(data)
        self.scaler.fit(*data.channel_statistics(TOKENS))

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the connector at its own rate, and the expert with its state, place and task tokens at `lr`."""
        connector = list(self.connector.parameters())
        theirs = {id(parameter) for parameter in connector}
        expert = [parameter for parameter in self.parameters() if id(parameter) not in theirs]
        return [{"params": connector, "lr": self.config.connector_lr}, {"params": expert, "lr": lr}]

    def errors(self, batch: Batch, action: Tensor) -> Tensor:
        """Squared error of the velocity."""
        return flow_errors(lambda x, t: self.net(x, t, self._seen(batch)), batch, action, self.config.time)

    def sample(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Integrate from noise."""
        config, seen = self.config, self._seen(batch)
        shape = (len(batch), config.horizon, self.io.action_dim)
        how: Any = {"steps": config.sample_steps, "sampler": config.sampler}
        return flow_sample(lambda x, t: self.net(x, t, seen), batch, shape, self.action.centre, generator, **how)

    @torch.no_grad()
    def measure(self, batch: Batch, chunk: Tensor) -> dict[str, Tensor]:
        """Return the velocity's mean squared error on a fixed grid of times (`velocity_mse`)."""
        training = self.training
        try:
            self.eval()
            seen = self._seen(batch)
            return velocity_mse(lambda x, t: self.net(x, t, seen), batch, self.labels(batch))
        finally:
            self.train(training)

    def _seen(self, batch: Batch) -> Seen:
        return self.net.read(*self.context(batch))

    def context(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, L', width] that the expert attends to, and which of them are real, bool [B, L']."""
        valid = batch.feature_valid[TOKENS]
        there = valid[..., None]
        # Zeros where there is no token: what a store holds there must not even pass through the connector.
        tokens: Tensor = self.connector(torch.where(there, self.scaler(batch.feature(TOKENS)), 0.0)) + self.identity
        if self.positions is not None:
            tokens = tokens + self.positions(torch.where(there, batch.feature(POSITIONS).float(), 0.0))
        parts, masks = [tokens.flatten(1, 3)], [(valid & batch.obs_valid[:, :, None, None]).flatten(1)]
        if self.state_token is not None:
            assert self._state is not None
            assert self.frame is not None
            assert batch.state is not None  # check_batch saw to it
            parts.append(self.state_token(self._state(batch.state)[..., list(self._columns)]) + self.frame)
            masks.append(batch.obs_valid)
        if self.task is not None:
            parts.append(self.task(batch.task)[:, None])
            masks.append(batch.obs_valid.new_ones(len(batch), 1))
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)
