"""How far a head's actions are from the demonstrated ones: sampled, not the training loss, in the data's units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.heads.checkpoint import TrainedHead
from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.model import HeadModel
from vla.stores.errors import DataError
from vla.stores.fingerprint import require_equal

BATCH = 64


@dataclass(frozen=True)
class ActionError:
    """Errors over the valid steps of all windows, from the present on.

    `mae`, `mse` per dimension [A], in the data's units; `executed_mae` [A] over the `n_action` steps that a robot would
    execute; `baseline_mae` [A] of always predicting the training actions' mean. `windows` and `steps` count what was
    compared. `predicted` and `true` [W, A] are the first action of every window, in order.
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

    def metrics(self) -> dict[str, float]:
        """Return the means over dimensions."""
        return {
            "action_mae": float(self.executed_mae.mean()),
            "horizon_mae": float(self.mae.mean()),
            "horizon_mse": float(self.mse.mean()),
            "baseline_mae": float(self.baseline_mae.mean()),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything but the predictions as JSON-able values, per dimension by name."""
        columns = {
            "mae": self.mae,
            "mse": self.mse,
            "executed_mae": self.executed_mae,
            "baseline_mae": self.baseline_mae,
        }
        table = {key: dict(zip(self.names, map(float, values), strict=True)) for key, values in columns.items()}
        return {**self.metrics(), "windows": self.windows, "steps": self.steps, "per_dimension": table}


def action_error(
    model: HeadModel, data: HeadData, episodes: NDArray[np.int64], *, device: torch.device, seed: int = 0
) -> ActionError:
    """Sample a chunk for every window of `episodes` and compare it with the demonstrated one. Seeded."""
    if not len(episodes):
        raise DataError("no episode to evaluate on", expected="at least one", fix="--set data.validation=0.1")
    generator = torch.Generator(device).manual_seed(seed)
    A, start = data.io.action_dim, -model.config.action_offset
    mean = torch.from_numpy(data.actions(data.training).mean(axis=0))
    sums = {key: torch.zeros(A, dtype=torch.float64) for key in ("mae", "mse", "executed_mae", "baseline_mae")}
    count, executed = 0.0, 0.0
    predicted, true = [], []
    for batch in data.batches(episodes, model.config.window, BATCH, pin=False).in_order():
        chunk = model.act(batch.to(device), generator).cpu()
        assert batch.action is not None
        assert batch.action_valid is not None
        wanted, valid = batch.action[:, start:], batch.action_valid[:, start:, None].double()
        error = (chunk - wanted).abs().double() * valid
        near = slice(0, model.config.n_action)
        sums["mae"] += error.sum((0, 1))
        sums["mse"] += (error**2).sum((0, 1))
        sums["executed_mae"] += error[:, near].sum((0, 1))
        sums["baseline_mae"] += ((mean - wanted).abs().double() * valid)[:, near].sum((0, 1))
        count += float(valid.sum())
        executed += float(valid[:, near].sum())
        predicted.append(chunk[:, 0].numpy())
        true.append(wanted[:, 0].numpy().copy())
    return ActionError(
        data.io.action_names or tuple(str(index) for index in range(A)),
        (sums["mae"] / count).numpy(),
        (sums["mse"] / count).numpy(),
        (sums["executed_mae"] / executed).numpy(),
        (sums["baseline_mae"] / executed).numpy(),
        sum(len(part) for part in predicted),
        int(count),
        np.concatenate(predicted),
        np.concatenate(true),
    )


def evaluate_head(head: TrainedHead, stores: tuple[str, ...] | None = None, *, seed: int = 0) -> ActionError:
    """Evaluate a trained head on its held-out episodes, or on all episodes of other `stores` of the same recipe.

    Raises `FingerprintError` naming the field where a store was made with other settings than the head's.
    """
    trained = head.artefact.data
    config = trained if stores is None else DataConfig(**{**trained.model_dump(), "stores": stores, "validation": 0.0})
    data = open_data(config)
    for store, record in zip(data.stores.stores, head.artefact.stores, strict=False):
        ours, theirs = dict(store.manifest.fingerprint), dict(record.fingerprint)
        if stores is not None:  # other demonstrations through the same backbone are what this is for
            ours.pop("source", None), theirs.pop("source", None)
        fix = "a store made with the settings that the head was trained with"
        require_equal(ours, theirs, what=store.place, fix=fix)
    episodes = data.validation if stores is None else data.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return action_error(head.model.to(device), data, episodes, device=device, seed=seed)
