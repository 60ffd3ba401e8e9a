"""`vla evaluate`: of which stores, against which baseline, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.backbones.registry import BACKBONES
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.batch import Batch
from vla.heads.checkpoint import TrainedHead, load_head
from vla.heads.data import open_data
from vla.heads.evaluate import evaluate_head
from vla.heads.tensor_batches import TensorBatches
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.errors import DataError, UsageError

Folders = dict[str, Path]
SOURCES = {
    "": "synthetic:episodes=5,length=[5,6],cameras=1",
    "other-": "synthetic:episodes=3,length=[7,9],cameras=1,seed=5",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, colour_backbone: type) -> Iterator[Folders]:
    """Two stores of some demonstrations and two of others, and heads that read the features of both."""
    root = tmp_path_factory.mktemp("evaluate")
    module: Any = type(sys)("colour_module")
    module.Colour = colour_backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "colour_module", module)
        patch.setitem(BACKBONES, "colour", BACKBONES["toy"]._replace(target="colour_module:Colour"))
        for prefix, source in SOURCES.items():
            for backbone in ("toy", "colour"):
                run(prepare(FeaturizeConfig(source=source, backbone=backbone)), root / f"{prefix}{backbone}")
        yield _train(root)


def _train(root: Path) -> Folders:
    for name, validation in (("run", 0.25), ("all", 0.0)):
        values: dict[str, Any] = {
            "head": "mlp",
            "data": {"stores": [str(root / "toy"), str(root / "colour")], "validation": validation},
            "model": {"horizon": 4, "n_action": 2, "encoder": {"components": 8, "dim": 16}, "hidden": 16},
            "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
        }
        train_head(HeadTrainConfig.build(values), root / name)
    return {path.name: path for path in root.iterdir()}


def given(folders: Folders, *names: str) -> tuple[str, ...]:
    return tuple(str(folders[name]) for name in names)


def test_a_store_that_lacks_features_is_refused_naming_them(folders: Folders) -> None:
    head = load_head(folders["run"])
    lacking = ", ".join(head.artefact.stores[1].features)
    with pytest.raises(UsageError, match=rf"toy: no {lacking}, which the head reads; expected .*colour in training"):
        evaluate_head(head, given(folders, "toy"))


def test_stores_are_given_in_any_order(folders: Folders) -> None:
    errors = [
        evaluate_head(load_head(folders["run"]), given(folders, *names))
        for names in (("other-toy", "other-colour"), ("other-colour", "other-toy"))
    ]
    np.testing.assert_allclose(errors[0].mae, errors[1].mae, rtol=1e-6)


def mean_error(head: TrainedHead, places: tuple[str, ...], action: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return how far one action [A] is from those that would be executed."""
    data = open_data(head.artefact.data.model_copy(update={"stores": places, "validation": 0.0}))
    batch = next(data.batches(data.training, head.config.window, 999, pin=False, reads=head.model.reads).in_order())
    assert batch.action is not None
    assert batch.action_valid is not None
    near = slice(0, head.config.n_action)
    wanted = batch.action[:, near][batch.action_valid[:, near]].numpy()
    mean: np.ndarray[Any, Any] = np.abs(wanted - action).mean(axis=0)
    return mean


def test_the_baseline_is_the_mean_action_of_the_training_wherever_it_is_evaluated(folders: Folders) -> None:
    head, others = load_head(folders["run"]), given(folders, "other-toy", "other-colour")
    data = open_data(head.artefact.data)
    mean = data.actions(data.training).mean(axis=0)
    np.testing.assert_allclose(head.artefact.action_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(evaluate_head(head, others).baseline_mae, mean_error(head, others, mean), rtol=1e-5)


def test_a_checkpoint_that_knows_no_mean_action_claims_none_of_other_stores(folders: Folders) -> None:
    """One that was made before it was kept; of its own stores it is still computed."""
    head = load_head(folders["run"])
    old = replace(head, artefact=head.artefact.model_copy(update={"action_mean": ()}))
    facts = evaluate_head(old, given(folders, "other-toy", "other-colour")).to_json()
    assert "baseline_mae" not in facts
    assert facts["per_dimension"].keys() == {"mae", "mse", "executed_mae"}
    np.testing.assert_allclose(evaluate_head(old).baseline_mae, evaluate_head(head).baseline_mae, rtol=1e-5)


def test_a_run_without_held_out_episodes_is_told_to_evaluate_on_others(folders: Folders) -> None:
    with pytest.raises(DataError, match=r"held no episode out.* Try: --store"):
        evaluate_head(load_head(folders["all"]))


def test_what_stands_in_padded_steps_is_never_counted(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    head = load_head(folders["run"])
    wanted, act = evaluate_head(head), head.model.act

    def act_with_nan(batch: Batch, generator: torch.Generator | None = None) -> torch.Tensor:
        assert batch.action_valid is not None
        chunk = act(batch, generator).clone()
        return chunk.masked_fill(~batch.action_valid[..., None], torch.nan)

    monkeypatch.setattr(head.model, "act", act_with_nan)
    np.testing.assert_array_equal(evaluate_head(head).mae, wanted.mae)


def test_a_dimension_without_entries_does_not_lower_the_mean_error(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_head(folders["run"])
    whole, in_order = evaluate_head(head), TensorBatches.in_order
    real = torch.ones(len(whole.mae), dtype=torch.bool)
    real[1] = False

    def padded(batches: TensorBatches) -> Iterator[Batch]:
        return (replace(batch, action_dims=real.expand(len(batch), -1)) for batch in in_order(batches))

    monkeypatch.setattr(TensorBatches, "in_order", padded)
    found = evaluate_head(head)
    assert found.metrics()["horizon_mae"] == pytest.approx(found.mae[real.numpy()].mean(), rel=1e-6)
    assert found.names[1] not in found.to_json()["per_dimension"]["mae"]


def test_every_task_stands_in_the_plain_report(folders: Folders) -> None:
    error = evaluate_head(load_head(folders["run"]), given(folders, "toy", "colour"))
    told = CliRunner().invoke(app, ["evaluate", str(folders["run"]), "--store", *_repeat(folders)]).stdout
    assert len(error.per_task) > 1
    for task, value in error.per_task.items():
        assert task in told
        assert f"{value:.4f}" in told


def _repeat(folders: Folders) -> tuple[str, ...]:
    return str(folders["toy"]), "--store", str(folders["colour"])
