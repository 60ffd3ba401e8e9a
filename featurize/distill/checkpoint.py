"""A trained student from its checkpoint, with what its inputs were made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.featurize.distill.student import Student, StudentConfig
from vla.stores.errors import CheckpointError
from vla.stores.settings import Settings
from vla.training.checkpoint import load_checkpoint

STUDENT = "rgb2pc"


class StoreRecord(Settings):
    """A store that the student was trained on."""

    path: str
    sha256: str
    fingerprint: dict[str, Any]


class StudentArtefact(Settings):
    """What a checkpoint keeps beside the weights.

    `student` is its kind; `config` the resolved network; `data` and `loss` resolved settings; `inputs` {feature:
    {"backbone", "context"}}, what the stores say it was made with; `teacher` its kind, path and digest.
    """

    student: str
    config: StudentConfig
    data: dict[str, Any]
    loss: dict[str, float]
    inputs: dict[str, dict[str, Any]]
    stores: tuple[StoreRecord, ...]
    teacher: dict[str, Any]
    pairing: dict[str, int]
    random_weights: bool
    vla_version: str


@dataclass(frozen=True)
class TrainedStudent:
    """A student in evaluation mode. `step` is the checkpoint's."""

    model: Student
    artefact: StudentArtefact
    step: int
    folder: Path


def load_student(path: Path | str) -> TrainedStudent:
    """Load a run folder of `vla distill rgb2pc` (its newest checkpoint) or one checkpoint.

    Raises `CheckpointError` where it is of something else, and where weights and configuration do not fit to the last
    key: no parameter stays random.
    """
    path = Path(path)
    found = load_checkpoint(path)
    if found.artefact.get("student") != STUDENT:
        raise CheckpointError(f"{found.folder} is no student", expected=f"a run of `vla distill {STUDENT}`")
    artefact = StudentArtefact.build(found.artefact, where=f"{found.folder / 'artefact.json'}")
    model = Student(artefact.config)
    wanted = model.state_dict()
    wrong = sorted(wanted.keys() ^ found.weights.keys())
    wrong += [name for name in wanted.keys() & found.weights.keys() if wanted[name].shape != found.weights[name].shape]
    if wrong:
        raise CheckpointError(f"{found.folder} does not fit its student: {', '.join(wrong[:3])}")
    model.load_state_dict(found.weights)
    return TrainedStudent(model.eval(), artefact, found.step, found.folder)
