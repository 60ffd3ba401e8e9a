"""Heads draw augmented copies in training, and in training alone."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads import data as heads_data
from vla.heads.batch import Batch
from vla.heads.data import DataConfig, HeadData, open_data
from vla.heads.evaluate import action_error
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.windows import WindowSpec
from vla.training.checkpoint import checkpoints, load_checkpoint

SOURCE = "synthetic:episodes=4,length=[6,9],cameras=2,image_size=16"
WINDOW = WindowSpec(n_obs=2, horizon=4)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A toy store with 0 and one with 2 augmented copies."""
    folder = tmp_path_factory.mktemp("augmented")
    for copies in (0, 2):
        values = {"source": SOURCE, "backbone": "toy", "augment": {"copies": copies}}
        run(prepare(FeaturizeConfig.build(values)), folder / str(copies))
    return {copies: folder / str(copies) for copies in (0, 2)}


def data_of(root: Path, **options: Any) -> HeadData:
    return open_data(DataConfig.build({"stores": [str(root)], "validation": 0.25, **options}))


def config_of(root: Path, steps: int = 2, every: int = 99, **data: Any) -> HeadTrainConfig:
    values = {
        "head": "mlp",
        "data": {"stores": [str(root)], "validation": 0.25, **data},
        "model": {"n_obs": 2, "horizon": 4, "n_action": 2, "encoder": {"components": 8, "dim": 16}, "hidden": 16},
        "train": {"steps": steps, "batch_size": 4, "device": "cpu", "checkpoint_every": every, "keep_checkpoints": 99},
    }
    return HeadTrainConfig.build(values)


def grids(data: HeadData, episodes: Any, *, augment: bool) -> list[torch.Tensor]:
    batches = data.batches(episodes, WINDOW, 4, pin=False, augment=augment)
    return [batch.feature("grid").clone() for batch in itertools.islice(batches.shuffled(seed=0), 12)]


def test_a_head_sees_the_features_without_their_copies(stores: dict[int, Path]) -> None:
    assert data_of(stores[2]).io == data_of(stores[0]).io
    assert (data_of(stores[2]).copies, data_of(stores[0]).copies, data_of(stores[2], augment=False).copies) == (2, 0, 0)


def test_batches_are_plain_unless_they_are_asked_to_be_augmented(stores: dict[int, Path]) -> None:
    plain = data_of(stores[0])
    wanted = grids(plain, plain.training, augment=True)
    for data, augment in ((data_of(stores[2]), False), (data_of(stores[2], augment=False), True)):
        for found, expected in zip(grids(data, data.training, augment=augment), wanted, strict=True):
            assert torch.equal(found, expected)
    drawn = grids(data_of(stores[2]), plain.training, augment=True)
    assert not all(torch.equal(found, expected) for found, expected in zip(drawn, wanted, strict=True))


def trained_on(monkeypatch: pytest.MonkeyPatch, root: Path, out: Path) -> dict[str, list[torch.Tensor]]:
    """Train, and return the features that training saw, and all that was read otherwise."""
    seen: dict[str, list[torch.Tensor]] = {"training": [], "other": []}
    plain = heads_data.TensorBatches._to_torch

    def spy(self: Any, batch: Any) -> Batch:
        made = plain(self, batch)
        seen["training" if self.batches._copies else "other"].append(made.feature("grid").clone())
        return made

    monkeypatch.setattr(heads_data.TensorBatches, "_to_torch", spy)
    train_head(config_of(root), out)
    monkeypatch.undo()
    return seen


def test_training_draws_and_fitting_and_validating_do_not(
    tmp_path: Path, stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trained_on(monkeypatch, stores[2], tmp_path / "drawn")
    other = trained_on(monkeypatch, stores[0], tmp_path / "plain")
    assert len(seen["training"]) >= 2
    assert not other["training"]
    rows = {tuple(frame.flatten().tolist()) for batch in other["other"] for frame in batch.flatten(0, 1)}
    assert seen["other"]
    for batch in seen["other"]:
        assert {tuple(frame.flatten().tolist()) for frame in batch.flatten(0, 1)} <= rows


def test_statistics_and_validation_are_those_of_the_plain_features(tmp_path: Path, stores: dict[int, Path]) -> None:
    train_head(config_of(stores[2]), tmp_path / "run")
    policy = Policy.from_run(tmp_path / "run", device="cpu")
    errors = [
        action_error(policy.head.model, data, data.validation, device=torch.device("cpu")).metrics()
        for data in (data_of(stores[2]), data_of(stores[0]))
    ]
    assert errors[0] == errors[1]
    train_head(config_of(stores[0]), tmp_path / "plain")
    fixed = [load_checkpoint(tmp_path / name).weights for name in ("run", "plain")]
    names = [name for name in fixed[0] if "scaler" in name or "projection" in name]
    assert names
    for name in names:
        assert torch.equal(fixed[0][name], fixed[1][name])
    assert any(not torch.equal(fixed[0][name], fixed[1][name]) for name in fixed[0])


def test_training_resumed_at_any_step_ends_in_the_same_weights(tmp_path: Path, stores: dict[int, Path]) -> None:
    config, whole = config_of(stores[2], steps=5, every=1), tmp_path / "whole"
    train_head(config, whole)
    wanted = load_checkpoint(whole).weights
    folders = sorted(checkpoints(whole))
    assert len(folders) == 5
    for kept in range(1, 5):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for folder in sorted(checkpoints(cut))[kept:]:
            shutil.rmtree(folder)
        train_head(config, cut, resume=True)
        for name, value in load_checkpoint(cut).weights.items():
            assert torch.equal(value, wanted[name]), (kept, name)


def test_the_memory_that_copies_take_decides_the_shuffle(
    stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_of(stores[0]).stores.first.manifest
    monkeypatch.setattr(heads_data, "memory_limit", lambda: 2 * manifest.rows * manifest.row_bytes)
    found = [data_of(stores[0]), data_of(stores[2]), data_of(stores[2], augment=False)]
    assert [data.config.shuffle for data in found] == ["global", "blocks", "global"]


def test_a_live_policy_sees_the_plain_features(tmp_path: Path, stores: dict[int, Path]) -> None:
    train_head(config_of(stores[2], steps=1), tmp_path / "run")
    policy = Policy.from_run(tmp_path / "run", device="cpu")
    source = prepare(FeaturizeConfig(source=SOURCE, backbone="toy")).source
    index, states = source.index(), source.steps(1)["state"]
    data = data_of(stores[2])
    first = int(data.stores.first.episodes.row_start[1])
    assert policy.head.artefact.stores[0].features.keys() == {"grid"}
    policy.reset(seed=0, task=index.episodes[1].task)
    for frame, views in enumerate(source.frames(1, 0, 4)):
        observation = Observation(dict(zip(index.cameras, views, strict=True)), states[frame], np.zeros(1, np.float32))
        live = policy._encode([policy._remember(observation)])["grid"]
        np.testing.assert_array_equal(live.numpy(), data.stores.first.read("grid", np.array([first + frame]))[0])
