"""From stores and a teacher to a trained student, through the one training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vla import __version__
from vla.featurize.distill.checkpoint import STUDENT, StoreRecord, StudentArtefact
from vla.featurize.distill.data import DistillData, DistillSource, StepBatch, open_distill
from vla.featurize.distill.loss import TAU, agreement, embedding_mse, info_nce, similarities
from vla.featurize.distill.student import Student, StudentConfig
from vla.stores.errors import UsageError
from vla.stores.fingerprint import digest
from vla.stores.owned import refuse_overlap
from vla.stores.settings import Settings, nearest
from vla.training.config import TrainConfig
from vla.training.loop import FitReport, Progress, fit, seed_everything
from vla.training.run_folder import require_given_places, saved_settings

TRAIN_DEFAULTS: dict[str, Any] = {
    "steps": 5000,
    "batch_size": 32,
    "lr": 3e-4,
    "betas": (0.9, 0.999),
    "weight_decay": 1e-2,
    "ema": False,
    "best_metric": "val_infonce",
}
"""AdamW as torch has it, cosine over 5000 steps: the published settings of RGB2PC, but for its batch of 8, which
leaves InfoNCE seven negatives."""


class LossConfig(Settings):
    """`tau`: InfoNCE's temperature. `mse`: weight of the embeddings' squared difference beside it."""

    tau: float = Field(TAU, gt=0, allow_inf_nan=False)
    mse: float = Field(0.0, ge=0, allow_inf_nan=False)


class DistillConfig(Settings):
    """Everything that `vla distill` can be told. `model` holds settings of `StudentConfig` but for what data decide."""

    student: str = STUDENT
    data: DistillData
    model: dict[str, Any] = {}
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig.build(TRAIN_DEFAULTS)

    @classmethod
    def from_saved(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        """See `Settings.from_saved`."""
        return saved_settings(values, file)

    @classmethod
    def require_given(cls, saved: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
        """See `Settings.require_given`."""
        require_given_places(saved, given, file)


class DistilledStudent(Student):
    """The student with its loss, as the loop trains it."""

    def __init__(self, config: StudentConfig, loss: LossConfig) -> None:
        super().__init__(config)
        self.loss_config = loss

    def loss(self, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over views of InfoNCE + mse * MSE, and the metrics.

        InfoNCE is defined over its batch: with `train.accumulate` or several processes the negatives of a step are
        those of its own micro-batch, and the step is the mean over micro-batches, which are equally large.
        Negatives are the other steps of the batch in the same view: two views of one step are never negatives, nor is
        a step that the batch holds twice.
        """
        same = batch.row[:, None] == batch.row
        views = next(iter(batch.features.values())).shape[1]
        figures = []
        for view in range(views):
            projected = self(batch.grids(view))[1]
            wanted = batch.teacher[:, view if batch.teacher.shape[1] > 1 else 0]
            cosine = similarities(projected, wanted)
            one = {"infonce": info_nce(cosine, same, self.loss_config.tau), "mse": embedding_mse(projected, wanted)}
            figures.append(one | agreement(cosine.detach(), same))
        mean = {name: torch.stack([one[name] for one in figures]).mean() for name in figures[0]}
        return mean["infonce"] + self.loss_config.mse * mean["mse"], {k: v.detach() for k, v in mean.items()}


@dataclass(frozen=True)
class DistillJob:
    """A prepared run: nothing is written yet."""

    config: DistillConfig
    source: DistillSource
    student: DistilledStudent
    artefact: StudentArtefact

    def to_json(self) -> dict[str, Any]:
        """Return the plan."""
        return {
            "student": self.config.student,
            "inputs": {name: list(shape) for name, shape in self.source.inputs.items()},
            "grid": list(self.student.config.common),
            "dim": self.student.config.width,
            "teacher": self.artefact.teacher | {"dim": self.source.teacher_dim},
            "pairing": self.artefact.pairing,
            "training_steps": len(self.source.training),
            "validation_steps": len(self.source.validation) if self.source.validation is not None else 0,
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
        }


def prepare(config: DistillConfig) -> DistillJob:
    """Open data and build the student. Raises what they raise, and `UsageError` for a batch without negatives."""
    if config.student != STUDENT:
        raise UsageError(f"no student {config.student!r}{nearest(config.student, [STUDENT])}", expected=STUDENT)
    explicit = config.train.model_dump(include=config.train.model_fields_set)
    config = config.model_copy(update={"train": TrainConfig.build({**TRAIN_DEFAULTS, **explicit}, where="train")})
    source = open_distill(config.data)
    size = config.train.batch_size
    if not 2 <= size <= len(source.training):
        found = f"train.batch_size {size}, and {len(source.training)} steps to train on"
        raise UsageError(found, expected="at least 2 different steps a batch", fix="--set train.batch_size=N")
    decided = {"inputs": source.inputs, "teacher_dim": source.teacher_dim}
    known = sorted(decided.keys() & config.model.keys())
    if known:
        raise UsageError(f"model.{known[0]} is given", expected="settings that the data do not decide")
    seed_everything(config.train.seed)
    student = DistilledStudent(StudentConfig.build({**config.model, **decided}, where="model"), config.loss)
    return DistillJob(config, source, student, _artefact(config, source, student.config))


def distill(
    job: DistillJob,
    run_dir: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda step, total, metrics: None,
) -> FitReport:
    """Train the student into `run_dir`. Raises what `fit` raises, and `UsageError` where `run_dir` holds the data."""
    run_dir = Path(run_dir)
    config, source = job.config, job.source
    if not resume:
        refuse_overlap(run_dir, [*config.data.stores, config.data.teacher])
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    held_out = source.validation

    def stream(first: int, stride: int) -> Iterator[StepBatch]:
        return source.shuffled(source.training, config.train.batch_size, config.train.seed, first, stride)

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, DistilledStudent)
        assert held_out is not None
        return evaluate(model, source, config.train.batch_size)

    return fit(
        job.student,
        stream,
        config.train,
        run_dir,
        artefact=job.artefact.model_dump(mode="json"),
        settings=config.model_dump(mode="json"),
        validate=validate if held_out is not None and len(held_out) > 1 else None,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def evaluate(model: DistilledStudent, source: DistillSource, batch_size: int) -> dict[str, float]:
    """Return the metrics over the held-out steps in full batches of one seeded order, all places of the grid read.

    Batches mix episodes: neighbours in time are alike, and as negatives would say little. Fewer steps than a batch
    holds make one batch; a rest of the last batch is left out. Names are those of training with `val_` before.
    """
    assert source.validation is not None
    size = min(batch_size, len(source.validation))
    device = next(model.parameters()).device
    batches = source.shuffled(source.validation, size, seed=0)
    totals: dict[str, float] = {}
    count = len(source.validation) // size
    try:
        for batch in itertools.islice(batches, count):
            for name, value in model.loss(batch.to(device))[1].items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + float(value) / count
    finally:
        batches.close()
    return totals


def _artefact(config: DistillConfig, source: DistillSource, student: StudentConfig) -> StudentArtefact:
    stores = source.stores
    made_with = {}
    for name in student.names:
        fingerprint = stores.stores[stores.owner[name]].manifest.fingerprint
        made_with[name] = {"backbone": fingerprint["backbone"], "context": fingerprint["context"]}
    return StudentArtefact(
        student=config.student,
        config=student,
        data=source.config.model_dump(mode="json"),
        loss=config.loss.model_dump(),
        inputs=made_with,
        stores=tuple(
            StoreRecord(
                path=str(store.root), sha256=digest(store.manifest.fingerprint), fingerprint=store.manifest.fingerprint
            )
            for store in stores.stores
        ),
        teacher=source.teacher_record,
        pairing=source.pairing.model_dump(),
        random_weights=source.random_weights,
        vla_version=__version__,
    )
