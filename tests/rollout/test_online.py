"""Training with the backbones in the loop sees what the stores hold, or the same pictures augmented anew."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.backbones.registry import BACKBONES
from vla.featurize.backbones.toy import Toy
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.batch import Batch
from vla.heads.checkpoint import build_head, load_head
from vla.heads.data import open_data
from vla.heads.model import HeadModel
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.online import OnlineFeatures, OnlineTrainConfig, train_online
from vla.stores.errors import SourceError, UsageError
from vla.training.config import TrainConfig

SOURCE = "synthetic:episodes=3,length=[4,6],cameras=2"
REAL = {"dino-siglip": {"size": 112, "fine": 4}, "siglip-prefix": {}}


class LookingBack(Toy):
    """A toy whose feature is the mean over three frames: it shows which frames it was given."""

    def spec(self) -> BackboneSpec:
        spec = super().spec()
        return replace(spec, name="looking-back", context=2, identity={**spec.identity, "network": "looking-back"})

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.tensor([0.5, 0.3, 0.2])[:, None, None, None, None]
        return super().encode((images * weights).sum(dim=1))


@pytest.fixture
def looking_back(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backbone with a context of two frames."""
    entry = BACKBONES["toy"]._replace(target=f"{__name__}:LookingBack")
    monkeypatch.setitem(BACKBONES, "looking-back", entry)
    monkeypatch.setattr(
        "vla.featurize.backbones.registry.load_backbone_class",
        lambda name: {"looking-back": LookingBack, "toy": Toy}[name],
    )
    return "looking-back"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the toy backbone."""
    return make_store(tmp_path_factory.mktemp("online") / "toy")


def make_store(root: Path, backbone: str = "toy", source: str = SOURCE, **values: Any) -> Path:
    weights = "random" if backbone in REAL else None
    config = {"source": source, "backbone": backbone, "weights": weights, "batch_size": 3, **values}
    run(prepare(FeaturizeConfig.build(config)), root)
    return root


def config_of(*stores: Path, **values: Any) -> OnlineTrainConfig:
    given: dict[str, Any] = {
        "head": "mlp",
        "data": {"stores": list(map(str, stores)), "validation": 0.34, "random_weights": True},
        "model": {"n_obs": 2, "horizon": 2, "n_action": 1, "encoder": {"dim": 8, "queries": 2}, "hidden": 8},
        "train": {"steps": 2, "batch_size": 4, "device": "cpu", "log_every": 1, "checkpoint_every": 1},
    }
    return OnlineTrainConfig.build({**given, **values})


def cached(config: OnlineTrainConfig) -> HeadTrainConfig:
    return HeadTrainConfig.build(config.model_dump(exclude_unset=True, exclude={"online"}))


def streams(config: OnlineTrainConfig, count: int = 3, first: int = 0) -> tuple[HeadModel, list[Batch], list[Batch]]:
    """Return a head, and the first batches of its training as cached and as computed online."""
    data, train = open_data(config.data), config.train
    model = build_head(config.head, config.model, data.io)
    window, size = model.config.window, train.batch_size
    supplier = OnlineFeatures(config.online, seed=train.seed, device="cpu")
    supplier.open(data, model)
    stored = data.batches(data.training, window, size, pin=False, reads=model.reads).shuffled(train.seed, first)
    bare = data.batches(data.training, window, size, pin=False, reads={})
    online = supplier.supply(bare, first, 1)
    read = [
        replace(batch, features={name: values.clone() for name, values in batch.features.items()})
        for batch in itertools.islice(stored, count)
    ]
    made = list(itertools.islice(online, count))
    online.close()  # type: ignore[attr-defined]
    return model, read, made


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first.features[name], second.features[name]) for name in first.features)


def test_batches_online_are_the_cached_ones_with_two_observed_frames(toy: Path) -> None:
    _, stored, online = streams(config_of(toy))
    for ours, theirs in zip(stored, online, strict=True):
        assert ours.features["grid"].shape == (4, 2, 2, 4, 4, 8)
        assert equal(ours, theirs)
        assert theirs.action is not None
        assert ours.action is not None
        assert torch.equal(ours.action, theirs.action)
        assert torch.equal(ours.obs_valid, theirs.obs_valid)


@pytest.mark.parametrize("name", REAL)
def test_batches_online_are_the_cached_ones_to_the_rounding_of_the_store(name: str, tmp_path: Path) -> None:
    model, stored, online = streams(config_of(make_store(tmp_path / name, name, options=REAL[name])), count=2)
    assert list(model.reads)
    for ours, theirs in zip(stored, online, strict=True):
        for feature, wanted in ours.features.items():
            found = theirs.features[feature]
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            apart = (found.float() - wanted.float()).abs().max()
            assert float(apart) <= 2 * np.spacing(np.float16(wanted.abs().max()))
            assert float(wanted.float().std()) > 0


def test_a_backbone_that_looks_back_is_shown_the_frames_before_each_observed_one(
    looking_back: str, tmp_path: Path
) -> None:
    _, stored, online = streams(config_of(make_store(tmp_path / "past", looking_back)), count=4)
    assert all(equal(ours, theirs) for ours, theirs in zip(stored, online, strict=True))


def test_several_stores_of_one_source_go_online_together(toy: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", "dino-siglip", options=REAL["dino-siglip"])
    model, stored, online = streams(config_of(toy, other), count=1)
    assert model.reads.keys() == {"grid", "coarse", "fine"}
    assert torch.equal(stored[0].features["grid"], online[0].features["grid"])


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["toy", "siglip-prefix"])
def test_two_training_steps_online_lose_as_much_as_two_cached_ones(name: str, tmp_path: Path) -> None:
    config = config_of(make_store(tmp_path / "store", name))
    told: list[str] = []
    train_online(config, tmp_path / "online", begun=lambda model: told.append(str(sorted(model.parameter_counts()))))
    train_head(cached(config), tmp_path / "cached")
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cached"), rel=1e-3)
    assert len(losses(tmp_path / "online")) == 2
    assert told == ["['encoder', 'net']"]
    assert load_head(tmp_path / "online").artefact.online["backbone"] == "in the loop, frozen"
    assert load_head(tmp_path / "cached").artefact.online == {}


def augmented(toy: Path, copies: int = 50, **how: Any) -> OnlineTrainConfig:
    return config_of(toy, online={"augment": {"copies": copies, **how}})


def test_pictures_are_augmented_anew_in_every_batch_as_the_seed_and_its_number_say(toy: Path) -> None:
    _, plain, first = streams(augmented(toy), count=4)
    _, _, again = streams(augmented(toy), count=4)
    _, _, later = streams(augmented(toy), count=2, first=2)
    assert all(equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    assert all(equal(ours, theirs) for ours, theirs in zip(first[2:], later, strict=True))
    assert not any(equal(ours, theirs) for ours, theirs in zip(plain, first, strict=True))


def test_a_window_that_comes_again_looks_otherwise(tmp_path: Path) -> None:
    """One window is all there is to train on, and so it is at the same place of every batch."""
    store = make_store(tmp_path / "one", source="synthetic:episodes=2,length=[1,1],cameras=1")
    train = {"steps": 2, "batch_size": 1, "device": "cpu"}
    config = config_of(store, online={"augment": {"copies": 50}}, train=train)
    _, plain, shown = streams(config, count=4)
    grids = [batch.features["grid"] for batch in (plain[0], *shown)]
    assert torch.equal(plain[0].features["grid"], plain[3].features["grid"])
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(grids, 2))


def test_the_frames_of_a_window_share_what_was_drawn_for_it(toy: Path) -> None:
    """At an episode's beginning the first frame is observed twice: with one draw for both, it looks the same twice."""
    shared, single = 0, 0
    for per in ("episode", "frame"):
        _, _, shown = streams(augmented(toy, per=per), count=6)
        for batch in shown:
            for at in torch.nonzero(~batch.obs_valid[:, 0]).flatten().tolist():
                same = torch.equal(batch.features["grid"][at, 0], batch.features["grid"][at, 1])
                shared += same and per == "episode"
                single += per == "episode"
    assert shared == single > 0


def test_one_window_in_k_plus_one_sees_its_pictures_as_they_are(toy: Path) -> None:
    _, plain, shown = streams(augmented(toy, copies=1), count=10)
    same = [
        torch.equal(a.features["grid"][at], b.features["grid"][at])
        for a, b in zip(plain, shown, strict=True)
        for at in range(len(a))
    ]
    assert 10 <= sum(same) <= 30  # of 40 draws, half: the seed is fixed


def test_unfreezing_the_backbone_is_refused_with_the_reason(toy: Path) -> None:
    with pytest.raises(UsageError, match="the features that the stores hold"):
        config_of(toy, online={"freeze_backbone": False})


def test_a_cached_run_is_not_resumed_online_nor_an_online_one_cached(toy: Path, tmp_path: Path) -> None:
    config = config_of(toy)
    train_head(cached(config), tmp_path / "cached")
    with pytest.raises(UsageError, match="was begun from cached features"):
        train_online(config, tmp_path / "cached", resume=True)
    train_online(config, tmp_path / "online")
    with pytest.raises(UsageError, match="online"):
        train_head(cached(config), tmp_path / "online", resume=True)


def test_an_online_run_resumes_to_the_same_weights(toy: Path, tmp_path: Path) -> None:
    config = augmented(toy, copies=3)
    train = {**config.train.model_dump(exclude_unset=True), "schedule": "constant", "warmup_steps": 0}

    def until(steps: int) -> OnlineTrainConfig:
        return config.model_copy(update={"train": TrainConfig.build({**train, "steps": steps})})

    train_online(until(3), tmp_path / "whole")
    train_online(until(1), tmp_path / "parts")
    train_online(until(3), tmp_path / "parts", resume=True)
    resumed = load_head(tmp_path / "parts").model.state_dict()
    for name, values in load_head(tmp_path / "whole").model.state_dict().items():
        assert torch.equal(values, resumed[name])


def test_demonstrations_that_moved_are_named_and_others_are_refused(
    write_lerobot: Callable[..., Path], tmp_path: Path
) -> None:
    raw = write_lerobot(tmp_path / "raw", lengths=(5, 4, 6))
    store = make_store(tmp_path / "store", source=str(raw))
    with pytest.raises(UsageError, match=r"online\.source"):  # a store never chooses what is read
        streams(config_of(store))
    streams(config_of(store, online={"source": str(raw)}), count=1)
    moved = tmp_path / "moved"
    shutil.move(raw, moved)
    with pytest.raises(SourceError, match=r"online\.source"):
        streams(config_of(store, online={"source": str(raw)}))
    _, stored, online = streams(config_of(store, online={"source": str(moved)}), count=1)
    assert equal(stored[0], online[0])
    with pytest.raises(SourceError, match="other demonstrations"):
        streams(config_of(store, online={"source": SOURCE}))
