"""A new run that starts from the weights of another: stage 2 after stage 1, fine-tuning after training.

Weights alone: the optimiser, its schedule and the moving average begin anew. Normalisers, scales and projections come
with them, so that numbers mean what they meant.
"""

from __future__ import annotations

from pathlib import Path

from vla.heads.checkpoint import Artefact
from vla.heads.model import HeadModel
from vla.pretrained.weights import require_fit
from vla.stores.errors import UsageError
from vla.stores.fingerprint import require_equal
from vla.training.checkpoint import load_checkpoint


def start_from(run: Path, model: HeadModel, artefact: Artefact) -> None:
    """Load the newest checkpoint of a run (its averaged weights, where it has them) into a new head.

    `artefact` is the new head's. Raises `UsageError` for another kind of head, `FingerprintError` naming what differs
    in actions, state, features, tasks or the backbones' settings, and `DataError` for weights of another size or name.
    The demonstrations may be others.
    """
    found = load_checkpoint(run)
    theirs = Artefact.build(found.artefact, where=f"{found.folder / 'artefact.json'}")
    if theirs.head != artefact.head:
        raise UsageError(f"{run} is a run of head {theirs.head!r}", expected=f"one of {artefact.head!r}")
    fix = "the data and settings of that run, or no --from"
    ours, others = (kept.io.model_dump(mode="json") for kept in (artefact, theirs))
    require_equal(ours, others, what=f"the data, beside those of {run},", fix=fix)
    for mine, store in zip(artefact.stores, theirs.stores, strict=False):
        pair = [{k: v for k, v in record.fingerprint.items() if k != "source"} for record in (mine, store)]
        require_equal(*pair, what=f"{mine.path}, beside {store.path},", fix=fix)
    require_equal(artefact.frozen, theirs.frozen, what="the networks that are run frozen", fix=fix)
    require_fit(model, found.weights, found.folder)
    model.load_state_dict(found.weights)
