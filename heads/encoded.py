"""Heads over whatever features the stores hold, read by an observation encoder: `dp`, `fm`, `mlp`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.heads.batch import HeadIO
from vla.heads.encoders import EncoderConfig, ObservationEncoder, ProjectionReader
from vla.heads.model import HeadConfig, HeadModel
from vla.heads.normalize import Normalizer
from vla.stores.errors import UsageError

if TYPE_CHECKING:
    from vla.heads.data import HeadData

PROJECTION_BATCH = 64


class EncodedConfig(HeadConfig):
    """Settings of a head with an observation encoder.

    `encoder`: see `EncoderConfig`. `freeze_encoder`: what turns features into numbers keeps its weights, which then
    have to come from somewhere: another run (`--from`) or `encoder.student`. What mixes its output with state and task
    trains all the same.
    """

    encoder: EncoderConfig = EncoderConfig()
    freeze_encoder: bool = False


class EncodedHead(HeadModel):
    """A head that reads every feature it is given, the state and the task. `tokens`: as tokens, not one vector a frame.

    Raises `UsageError` where there is nothing to read.
    """

    config: EncodedConfig

    def __init__(self, config: EncodedConfig, io: HeadIO, *, tokens: bool = False) -> None:
        super().__init__(config, io)
        self.encoder = ObservationEncoder(config.encoder, io, config.n_obs, tokens=tokens)
        if config.freeze_encoder:
            self.encoder.readers.requires_grad_(False)
            if self.encoder.fusion is not None:
                self.encoder.fusion.requires_grad_(False)

    @property
    def reads(self) -> dict[str, int]:
        """See `HeadModel.reads`."""
        return dict.fromkeys(self.encoder.names, self.config.n_obs)

    @property
    def columns(self) -> tuple[int, ...]:
        """See `HeadModel.columns`."""
        return self.encoder.columns

    @property
    def meaning(self) -> dict[str, Any]:
        """See `HeadModel.meaning`."""
        return super().meaning | {"encoder.state_columns": list(self.columns)}

    @property
    def state(self) -> Normalizer | None:
        """See `HeadModel.state`."""
        return self.encoder.state

    def prepare(self, data: HeadData) -> None:
        """Fit normalisers, feature scales and projections; take a student's weights. Raises `UsageError` where an
        encoder is to be frozen whose weights would be random."""
        if self.config.freeze_encoder and self.config.encoder.student is None:
            raise UsageError(
                "model.freeze_encoder of an encoder with random weights",
                expected="one that was trained",
                fix="--from RUN of `vla train-head`, or --set model.encoder.student=RUN of `vla distill rgb2pc`",
            )
        if self.config.encoder.student is not None and self.encoder.fusion is not None:
            self.encoder.fusion.load_student(Path(self.config.encoder.student))
        super().prepare(data)
        fit_encoders(self, data)

    def projections(self) -> dict[str, ProjectionReader]:
        """Return `{feature: reader}` of the projections that have to be fitted before training."""
        return projections(self.encoder)


def projections(encoder: ObservationEncoder) -> dict[str, ProjectionReader]:
    """Return `{feature: reader}` of an encoder's projections."""
    return {name: reader for name, reader in encoder.named_readers().items() if isinstance(reader, ProjectionReader)}


def fit_encoders(model: HeadModel, data: HeadData) -> None:
    """Fit the feature scales and the projections of every observation encoder in a head, on the training split."""
    for encoder in (module for module in model.modules() if isinstance(module, ObservationEncoder)):
        for name, each in encoder.named_readers().items():
            each.scaler.fit(*data.channel_statistics(name))
        for name, reader in projections(encoder).items():
            window = model.config.window.model_copy(update={"n_obs": 1})
            batches = data.batches(data.training, window, PROJECTION_BATCH, pin=False, reads={name: 1})
            # Shuffled, so that a large store is sampled from end to end.
            count = -(-len(batches.batches.index) // PROJECTION_BATCH)
            frames = itertools.islice(batches.shuffled(seed=0), count)
            reader.projection.fit(reader.scaler(batch.feature(name)[:, 0].float()).flatten(1, -2) for batch in frames)
