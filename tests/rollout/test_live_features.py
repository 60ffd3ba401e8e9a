"""Networks see live what they saw when the cache was made: same pictures, same features, whatever the batch was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.store import open_store

SOURCE = "synthetic:episodes=2,length=[4,5],cameras=2"
OPTIONS: dict[str, dict[str, Any]] = {"dino-siglip": {"size": 112, "fine": 4}, "siglip-prefix": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_features_seen_live_equal_features_cached_to_the_rounding_of_the_store(name: str, tmp_path: Path) -> None:
    config = FeaturizeConfig(source=SOURCE, backbone=name, weights="random", options=OPTIONS[name], batch_size=3)
    job = prepare(config)
    run(job, tmp_path / "store")
    values = {
        "head": "mlp",
        "data": {"stores": [str(tmp_path / "store")], "validation": 0.5, "random_weights": True},
        "model": {"n_obs": 1, "horizon": 2, "n_action": 1, "encoder": {"dim": 8, "queries": 2}, "hidden": 8},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
    }
    train_head(HeadTrainConfig.build(values), tmp_path / "run")
    policy = Policy.from_run(tmp_path / "run", device="cpu")
    store, cameras = open_store(tmp_path / "store"), job.source.index().cameras
    for frame, views in enumerate(job.source.frames(0, 0, 4)):
        seen = Observation(dict(zip(cameras, views, strict=True)), np.zeros(0, np.float32), np.zeros(0, np.float32))
        live = policy._encode([policy._remember(seen)])
        assert live.keys() == job.backbone.spec().features.keys()
        for feature, tokens in live.items():
            cached = store.read(feature, np.array([frame]))[0]
            assert (tokens.numpy().shape, tokens.numpy().dtype) == (cached.shape, cached.dtype)
            # float32 sums in another order (batch 1, not 3) may round to the neighbouring float16.
            apart = np.abs(tokens.numpy().astype(np.float32) - cached.astype(np.float32))
            assert apart.max() <= 2 * np.spacing(np.abs(cached).max())
