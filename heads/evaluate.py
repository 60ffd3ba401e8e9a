"""How far a head's actions are from the demonstrated ones: sampled, not the training loss, in the data's units."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.heads.checkpoint import HeadSettings, TrainedHead
from vla.heads.data import HeadData, open_data
from vla.heads.model import HeadModel
from vla.stores.errors import DataError, FingerprintError, UsageError
from vla.stores.fingerprint import digest, require_equal
from vla.stores.remote.options import RemoteOptions, is_url
from vla.stores.settings import Settings
from vla.stores.store import open_store
from vla.stores.user_given import set_flag

BATCH = 64


class EvaluatedData(Settings):
    """`stores`: where the stores of the training are now; None: where they were. `remote`: see `RemoteOptions`."""

    stores: tuple[str, ...] | None = None
    remote: RemoteOptions = RemoteOptions()


@dataclasses.dataclass(frozen=True)
class ActionError:
    """Errors over the valid steps and real dimensions of all windows, from the present on.

    `mae`, `mse` per dimension [A], in the data's units; `executed_mae` [A] over the `n_action` steps that a robot would
    execute; `baseline_mae` [A] of always predicting the training actions' mean over the same steps, NaN where a
    checkpoint does not know it. `entries` and `executed_entries` [A] count the numbers that `mae` and `executed_mae`
    are over. `windows` and `steps` count what was compared; `extra` is what the head itself measures
    (`HeadModel.measure`), `per_task` the executed MAE of each instruction over its real dimensions, where there are
    several. `predicted` and `true` [W, A] are the first action of every window, in order. `acted`: whether the head
    predicts actions; all errors are NaN where it does not.
    """

    names: tuple[str, ...]
    mae: NDArray[np.float64]
    mse: NDArray[np.float64]
    executed_mae: NDArray[np.float64]
    baseline_mae: NDArray[np.float64]
    windows: int
    steps: int
    predicted: NDArray[np.float32]
    true: NDArray[np.float32]
    entries: NDArray[np.float64] = dataclasses.field(kw_only=True)
    executed_entries: NDArray[np.float64] = dataclasses.field(kw_only=True)
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    per_task: dict[str, float] = dataclasses.field(default_factory=dict)
    acted: bool = True

    def metrics(self) -> dict[str, float]:
        """Return the means over all entries; of a head that makes no actions, what it measures itself alone.

        Dimensions count by their entries: one that tasks pad weighs less, one that nothing has weighs nothing.
        """
        if not self.acted:
            return dict(self.extra)
        executed = self.executed_entries
        baseline = {"baseline_mae": _mean(self.baseline_mae, executed)} if self._has_baseline else {}
        return {
            "action_mae": _mean(self.executed_mae, executed),
            "horizon_mae": _mean(self.mae, self.entries),
            "horizon_mse": _mean(self.mse, self.entries),
            **baseline,
            **self.extra,
        }

    @property
    def _has_baseline(self) -> bool:
        return not np.isnan(self.baseline_mae).any()

    def to_json(self) -> dict[str, Any]:
        """Return everything but the predictions as JSON-able values, per dimension by name."""
        columns = {
            "mae": self.mae,
            "mse": self.mse,
            "executed_mae": self.executed_mae,
        } | ({"baseline_mae": self.baseline_mae} if self._has_baseline else {})
        there = [(place, name) for place, name in enumerate(self.names) if self.entries[place]]
        table = {
            key: {name: float(values[place]) for place, name in there} for key, values in columns.items() if self.acted
        }
        tasks = {"per_task": self.per_task} if self.per_task and self.acted else {}
        return {**self.metrics(), "windows": self.windows, "steps": self.steps, "per_dimension": table, **tasks}


def action_error(
    model: HeadModel,
    data: HeadData,
    episodes: NDArray[np.int64],
    *,
    device: torch.device,
    seed: int = 0,
    tasks: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    mean: NDArray[np.float64] | None = None,
) -> ActionError:
    """Sample a chunk for every window of `episodes` and compare it with the demonstrated one. Seeded.

    `tasks` int64 takes the data's numbers of instructions to the head's; None: they are the same. `labels` likewise,
    only that with `tasks` and without `labels` the head is told none. `mean` [A]: what the baseline predicts; None: the
    mean of the data's training actions.
    """
    if not len(episodes):
        raise DataError("no episode to evaluate on", expected="at least one")
    generator = torch.Generator(device).manual_seed(seed)
    A, start = data.io.action_dim, -model.config.action_offset
    always = torch.from_numpy(mean_action(data) if mean is None else mean)
    sums = {key: torch.zeros(A, dtype=torch.float64) for key in ("mae", "mse", "executed_mae", "baseline_mae")}
    count, executed = torch.zeros(A, dtype=torch.float64), torch.zeros(A, dtype=torch.float64)
    steps, measured = 0, collections.defaultdict(list)
    by_task = torch.zeros(2, len(model.io.tasks) or 1, dtype=torch.float64)
    predicted, true = [], []
    for batch in data.batches(episodes, model.config.window, BATCH, pin=False, reads=model.reads).in_order():
        if tasks is not None:
            label = None if labels is None or batch.label is None else labels[batch.label]
            batch = dataclasses.replace(batch, task=tasks[batch.task], label=label)
        there = batch.to(device)
        assert batch.action is not None
        assert batch.action_valid is not None
        assert there.action is not None
        # A head without actions is measured by its own figures alone.
        chunk = model.act(there, generator) if model.acts else there.action[:, start:] * math.nan
        for name, numbers in model.measure(there, chunk).items():
            measured[name].append(numbers.cpu())
        chunk = chunk.cpu()
        wanted, stepped = batch.action[:, start:], batch.action_valid[:, start:]
        real = torch.ones(len(batch), A, dtype=torch.bool) if batch.action_dims is None else batch.action_dims
        counted = stepped[..., None] & real[:, None]
        # Selected, not multiplied: whatever stands in padding, NaN too, is no error.
        error, valid = torch.where(counted, (chunk - wanted).abs().double(), 0.0), counted.double()
        near = slice(0, model.config.n_action)
        sums["mae"] += error.sum((0, 1))
        sums["mse"] += (error**2).sum((0, 1))
        sums["executed_mae"] += error[:, near].sum((0, 1))
        by_task.index_add_(1, batch.task, torch.stack([error[:, near].sum((1, 2)), valid[:, near].sum((1, 2))]))
        sums["baseline_mae"] += torch.where(counted, (always - wanted).abs(), 0.0)[:, near].sum((0, 1))
        count += valid.sum((0, 1))
        executed += valid[:, near].sum((0, 1))
        steps += int(stepped.sum())
        predicted.append(chunk[:, 0].numpy())
        true.append(wanted[:, 0].numpy().copy())
    if not model.acts:
        for name in ("mae", "mse", "executed_mae"):
            sums[name].fill_(math.nan)
    return ActionError(
        data.io.action_names or tuple(str(index) for index in range(A)),
        (sums["mae"] / count.clamp(min=1)).numpy(),
        (sums["mse"] / count.clamp(min=1)).numpy(),
        (sums["executed_mae"] / executed.clamp(min=1)).numpy(),
        (sums["baseline_mae"] / executed.clamp(min=1)).numpy(),
        sum(len(part) for part in predicted),
        steps,
        np.concatenate(predicted),
        np.concatenate(true),
        model.summarise({name: torch.cat(parts) for name, parts in measured.items()}),
        _per_task(model.io.tasks, *by_task.tolist()),
        acted=model.acts,
        entries=count.numpy(),
        executed_entries=executed.numpy(),
    )


def _mean(values: NDArray[np.float64], entries: NDArray[np.float64]) -> float:
    """Return the mean over all entries of means [A] over `entries` [A] each; 0 where there is no entry."""
    return float((values * entries).sum() / max(float(entries.sum()), 1.0))


def _per_task(tasks: tuple[str, ...], errors: list[float], counts: list[float]) -> dict[str, float]:
    """Return the mean of each instruction that was met, where the head knows several."""
    met = zip(tasks, errors, counts, strict=False)
    return {text: error / count for text, error, count in met if count} if len(tasks) > 1 else {}


class EvaluateSettings(HeadSettings):
    """What `vla evaluate --set` gives: `model` of the head; `data`, see `evaluate_head`."""

    data: EvaluatedData = EvaluatedData()


def evaluate_head(
    head: TrainedHead,
    stores: Sequence[str | Path] | None = None,
    *,
    seed: int = 0,
    data: Mapping[str, Any] | EvaluatedData | None = None,
) -> ActionError:
    """Evaluate a trained head on its held-out episodes, or on all episodes of other `stores` of the same recipe.

    `data`: where the training's own stores are now, and how stores on object stores are reached (`EvaluatedData`); a
    checkpoint never chooses an address or a cache folder. Folders that it names are read, once they prove to hold the
    stores of the training. Raises `UsageError` where the checkpoint names a URL and neither `stores` nor `data.stores`
    is given, or where the head reads features that no store has; `FingerprintError` naming the field where a store was
    made with other settings than the head's.
    """
    place = data if isinstance(data, EvaluatedData) else EvaluatedData.build(data or {}, where="data")
    chosen = _own_stores(head, place) if stores is None else tuple(map(str, stores))
    changed = {"stores": chosen, "remote": place.remote} | ({} if stores is None else {"validation": 0.0})
    found = open_data(head.artefact.data.model_copy(update=changed))
    _require_backbones(head, found, others=stores is not None)
    episodes = found.validation if stores is None else found.training
    if not len(episodes):
        missing = f"{head.folder}: its training held no episode out"
        raise DataError(missing, expected="other demonstrations", fix="--store STORE")
    known = head.artefact.action_mean or [math.nan] * found.io.action_dim
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = _task_numbers(found.io.tasks, head.artefact.io.tasks)
    labels = _label_numbers(found.io.labels, head.artefact.io.labels)
    model = head.model.to(device)
    mean = None if stores is None else np.array(known, np.float64)
    return action_error(model, found, episodes, device=device, seed=seed, tasks=tasks, labels=labels, mean=mean)


def _own_stores(head: TrainedHead, place: EvaluatedData) -> tuple[str, ...]:
    """Return where the stores of the training are.

    Raises `UsageError` where the checkpoint alone names a URL, and `FingerprintError` where a folder that the
    checkpoint names holds another store: its manifest is compared, and nothing else of it is read.
    """
    recorded = head.artefact.data.stores
    if place.stores is not None:
        return place.stores
    if urls := [store for store in recorded if is_url(store)]:
        raise UsageError(
            f"{head.folder} names the store {', '.join(urls)}, and no checkpoint chooses an address",
            expected="your own word",
            fix=f"{set_flag('data.stores', recorded)} for its held-out episodes, or --store URL for all episodes",
        )
    known = {record.sha256 for record in head.artefact.stores}
    for store in recorded:
        partial = head.artefact.data.allow_partial
        if digest(open_store(store, allow_partial=partial).manifest.fingerprint) not in known:
            raise FingerprintError(
                f"{store} is not the store that the checkpoint {head.folder} was trained on",
                fix="--set data.stores='[\"STORE\"]' where that lies now, or --store STORE for another",
            )
    return recorded


def mean_action(data: HeadData) -> NDArray[np.float64]:
    """Return the mean of the training actions over real dimensions [A]; 0 where no episode has one.

    To float32's precision: a resumed run compares it, and the last bit of a sum may be the machine's.
    """
    actions, dims = data.actions(data.training).astype(np.float64), data.action_dims(data.training)
    real = np.ones(actions.shape, bool) if dims is None else dims
    total, count = np.where(real, actions, 0.0).sum(axis=0), real.sum(axis=0)
    mean: NDArray[np.float64] = (total / np.maximum(count, 1)).astype(np.float32).astype(np.float64)
    return mean


def _require_backbones(head: TrainedHead, data: HeadData, *, others: bool) -> None:
    """Raise where features that the head reads are missing or were made otherwise than those of its training.

    `others`: the stores are not those of the training, and hold other demonstrations, in any order.
    """
    owner, records = data.stores.owner, head.artefact.stores
    lacking = [name for name in head.model.reads if name not in owner]
    if lacking:
        made = [record.path for record in records if record.features.keys() & lacking]
        raise UsageError(
            f"{', '.join(store.place for store in data.stores.stores)}: no {', '.join(lacking)}, which the head reads",
            expected=f"stores of all its features, as {', '.join(made)} in training",
            fix="--store once for each",
        )
    if others:
        held = [(owner[name], record) for record in records for name in record.features if name in owner]
        pairs = [(data.stores.stores[position], record) for position, record in dict(held).items()]
    else:
        pairs = list(zip(data.stores.stores, records, strict=False))  # the record of a text store stands last
    for store, record in pairs:
        ours, theirs = dict(store.manifest.fingerprint), dict(record.fingerprint)
        if others:
            ours.pop("source", None), theirs.pop("source", None)
        fix = "a store made with the settings that the head was trained with"
        require_equal(ours, theirs, what=store.place, fix=fix)


def _label_numbers(theirs: tuple[dict[str, str], ...], trained: tuple[dict[str, str], ...]) -> torch.Tensor | None:
    """Return, for each label of a data set, its number among those that the head was trained on; None where there
    is one that it was not trained on."""
    known = bool(theirs) and all(label in trained for label in theirs)
    return torch.tensor([trained.index(label) for label in theirs]) if known else None


def _task_numbers(theirs: tuple[str, ...], trained: tuple[str, ...]) -> torch.Tensor:
    """Return, for each instruction of a data set, its number among those that the head was trained on."""
    if len(trained) == 1:  # such a head reads no instruction
        return torch.zeros(len(theirs), dtype=torch.int64)
    unknown = [text for text in theirs if text not in trained]
    if unknown:
        raise DataError(f"the head was not trained on {unknown[0]!r}", expected=f"one of {'; '.join(trained)}")
    return torch.tensor([trained.index(text) for text in theirs])
