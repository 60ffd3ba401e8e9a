"""A new run that starts from the weights of another: stage 2 after stage 1, fine-tuning after training.

Weights alone: the optimiser, its schedule and the moving average begin anew. Normalisers, scales and projections come
with them, so that numbers mean what they meant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla.heads.checkpoint import Artefact, StoreRecord, described_head
from vla.heads.model import HeadModel
from vla.pretrained.weights import require_fit
from vla.stores.errors import UsageError
from vla.stores.fingerprint import require_equal
from vla.stores.user_given import resolve, user_given
from vla.training.checkpoint import load_checkpoint


def start_from(run: Path, model: HeadModel, artefact: Artefact) -> None:
    """Load the newest checkpoint of a run (its averaged weights, where it has them) into a new head.

    `artefact` is the new head's. Raises `UsageError` for another kind of head and for other settings of those that give
    its weights and statistics their meaning, `FingerprintError` naming what differs in actions, state, features, tasks
    or the backbones' settings, and `DataError` for weights of another size or name. The demonstrations may be others.
    """
    found = load_checkpoint(run)
    theirs = Artefact.build(found.artefact, where=f"{found.folder / 'artefact.json'}")
    if theirs.head != artefact.head:
        raise UsageError(f"{run} is a run of head {theirs.head!r}", expected=f"one of {artefact.head!r}")
    fix = "the data and settings of that run, or no --from"
    ours, others = (kept.io.model_dump(mode="json") for kept in (artefact, theirs))
    require_equal(ours, others, what=f"the data, beside those of {run},", fix=fix)
    for mine, store in zip(_by_features(artefact.stores), _by_features(theirs.stores), strict=False):
        pair = [{k: v for k, v in record.fingerprint.items() if k != "source"} for record in (mine, store)]
        require_equal(*pair, what=f"{mine.path}, beside {store.path},", fix=fix)
    require_equal(artefact.frozen, theirs.frozen, what="the networks that are run frozen", fix=fix)
    # Folders and addresses are those of the new run: what the other run records chooses nothing here.
    names = [name for name in user_given(type(model.config)) if name in artefact.config]
    own = {name: artefact.config[name] for name in names}
    config = resolve(type(model.config), theirs.config, own, artefact=str(run), prefix="model.")
    _require_same_meaning(run, model, described_head(theirs.model_copy(update={"config": config}), found.folder))
    require_fit(model, found.weights, found.folder)
    wanted = _read_statistics(model)
    model.load_state_dict(found.weights)
    for values, name, loaded in zip(wanted, ("action", "state"), _normalisers(model), strict=False):
        if any(not torch.equal(value, loaded[key]) for key, value in values.items()):
            raise UsageError(
                f"{model.config.norm_stats} holds other statistics of the {name} than {run} was trained with",
                expected="the file of that run, or its values",
                fix=f"--set model.norm_stats={theirs.config.get('norm_stats')}",
            )


def _require_same_meaning(run: Path, model: HeadModel, theirs: HeadModel) -> None:
    """Raise `UsageError` where weights or statistics of `theirs`, a head of the same kind, would mean something else.

    Sizes do not tell: a normaliser of deviations fits where one of limits was, and columns 2 and 3 where 0 and 1 were.
    """
    if list(model.reads) != list(theirs.reads):  # an encoder lays features side by side
        raise UsageError(
            f"the features come in the order {', '.join(model.reads)}",
            expected=f"{', '.join(theirs.reads)}, as in {run}",
            fix=f"--features {','.join(theirs.io.features)}",
        )
    ours, others = model.meaning, theirs.meaning
    differ = {name: others.get(name) for name in ours.keys() | others.keys() if ours.get(name) != others.get(name)}
    if (model.config.norm_stats is None) != (theirs.config.norm_stats is None):
        differ["norm_stats"] = theirs.config.norm_stats
    if differ:
        names = sorted(differ)
        shown = dict(ours, norm_stats=model.config.norm_stats)
        raise UsageError(
            "; ".join(f"model.{name} is {json.dumps(shown.get(name))}" for name in names),
            expected=f"what {run}, whose weights and statistics are taken, was trained with",
            fix=" ".join(f"--set model.{name}={_typed(differ[name])}" for name in names) + ", or no --from",
        )


def _typed(value: object) -> str:
    """Return a value as `--set` reads it back."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _read_statistics(model: HeadModel) -> list[dict[str, torch.Tensor]]:
    """Return what `norm_stats` of a head says, of action and state; nothing where statistics are fitted on data."""
    if model.config.norm_stats is None:
        return []
    S = 0 if model.state is None else len(model.state.centre)
    model.fit_normalisers(np.empty((0, model.io.action_dim)), np.empty((0, S)))
    return [{key: value.clone() for key, value in each.items()} for each in _normalisers(model)]


def _normalisers(model: HeadModel) -> list[dict[str, torch.Tensor]]:
    return [each.state_dict() for each in (model.action, model.state) if each is not None]


def _by_features(stores: Sequence[StoreRecord]) -> list[StoreRecord]:
    """Return stores in an order that what they hold decides, not the order in which they were named."""
    return sorted(stores, key=lambda store: (sorted(store.features), store.recipe.get("name", "")))
