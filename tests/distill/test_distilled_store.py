"""From stores to a student to a store of its features, and the same features live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.featurize.distill.train import DistillConfig, distill
from vla.featurize.distill.train import prepare as prepare_distill
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.synthetic import SyntheticSource
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import FingerprintError
from vla.stores.join import join_stores
from vla.stores.store import open_store

SPEC = "synthetic:episodes=3,length=[7,7],cameras=2,image_size=16"


def make(root: Path, backbone: str, source: str = SPEC, **more: Any) -> Path:
    values = {"source": source, "backbone": backbone, "store": {"unit_rows": 5}, "batch_size": 4, "device": "cpu"}
    run(prepare(FeaturizeConfig.build({**values, **more})), root)
    return root


def config_of(toy: Path, shade: Path, teacher: Path) -> DistillConfig:
    return DistillConfig.build(
        {
            "data": {"stores": [str(toy), str(shade)], "teacher": str(teacher), "validation": 0.3},
            "model": {"dim": 16, "heads": 2, "layers": 1, "fusion": "moe", "gate_hidden": 8, "tokens": 6},
            "train": {"steps": 3, "batch_size": 4, "device": "cpu"},
        }
    )


@pytest.fixture
def made(shade: None, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """Stores toy and shade, a run of a student on them, and the store that it makes."""
    toy, other = make(tmp_path / "toy", "toy"), make(tmp_path / "shade", "shade", options={"grid": 6, "channels": 5})
    (tmp_path / "teacher").mkdir()
    for episode in range(3):
        values = np.random.default_rng(episode).normal(size=(7, 8))
        np.save(tmp_path / "teacher" / f"episode{episode}.npy", values)
    distill(prepare_distill(config_of(toy, other, tmp_path / "teacher")), tmp_path / "run")
    options = {"projected": True, "means": True}
    weights, source = str(tmp_path / "run"), {"join": [str(other)]}
    fused = make(tmp_path / "fused", "rgb2pc", str(toy), weights=weights, source_options=source, options=options)
    return toy, other, tmp_path / "run", fused


def test_features_seen_live_equal_features_cached(made: tuple[Path, Path, Path, Path]) -> None:
    store = open_store(made[3])
    recipe, identity = store.manifest.provenance["backbone"], store.manifest.fingerprint["backbone"]
    live = rebuild_backbone(recipe, identity, {"rgb2pc": {"weights": str(made[2])}})
    assert live.spec().inputs == ("image",)
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    for frame, views in enumerate(source.frames(1, 0, 7)):
        seen = live.encode(torch.stack([live.preprocess(view) for view in views])[None])
        for name in ("fused", "projected", "mean_grid", "mean_shade"):
            cached = store.read(name, np.array([7 + frame]))[0].astype(np.float32)
            # One step of float16, where batches of another size round differently: 2^-10 of the value.
            np.testing.assert_allclose(seen[name][0].numpy(), cached, rtol=2**-10, atol=1e-4)


def test_a_policy_sees_live_what_its_head_was_trained_on(made: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    values = {
        "head": "mlp",
        "data": {"stores": [str(made[3])], "features": ["fused"], "validation": 0.3},
        "model": {"encoder": {"components": 4, "dim": 8}, "hidden": 8, "layers": 1},
        "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
    }
    train_head(HeadTrainConfig.build(values), tmp_path / "head")
    own = {"rgb2pc": {"weights": str(made[2])}}
    policy, store = Policy.from_run(tmp_path / "head", device="cpu", backbones=own), open_store(made[3])
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    state = source.steps(2)["state"].astype(np.float32)
    for frame, views in enumerate(source.frames(2, 0, 7)):
        images = dict(zip(source.index().cameras, views, strict=True))
        seen = policy._encode([policy._remember(Observation(images, state[frame], np.zeros(1, np.float32)))])["fused"]
        assert seen.dtype == torch.float16
        cached = store.read("fused", np.array([14 + frame]))[0].astype(np.float32)
        np.testing.assert_allclose(seen.float().numpy(), cached, rtol=2**-10, atol=1e-4)


def test_the_store_joins_with_those_it_was_made_from(made: tuple[Path, Path, Path, Path]) -> None:
    joined = join_stores([open_store(path) for path in (made[3], made[0], made[1])])
    assert set(joined.owner) == {"fused", "projected", "mean_grid", "mean_shade", "grid", "shade"}
    wanted = joined.stores[1].read("grid", np.arange(21)).astype(np.float32).mean(axis=(2, 3))
    np.testing.assert_allclose(joined.stores[0].read("mean_grid", np.arange(21)), wanted, atol=2e-3)
    assert not joined.stores[0].manifest.random_weights


def test_features_other_than_those_the_student_was_trained_on_are_refused(
    made: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    toy, other, run_dir, _ = made
    changed = make(tmp_path / "changed", "shade", options={"grid": 6, "channels": 5, "seed": 4})
    with pytest.raises(FingerprintError, match=r"input 'shade' of backbone 'rgb2pc'.*backbone\.seed: 4 here, 0 wanted"):
        make(tmp_path / "no", "rgb2pc", str(toy), weights=str(run_dir), source_options={"join": [str(changed)]})
    assert other.exists()


def test_a_student_trained_further_is_another_backbone(made: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    toy, other, run_dir, fused = made
    config = config_of(toy, other, tmp_path / "teacher")
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    distill(prepare_distill(longer), run_dir, overwrite=True)
    manifest, own = open_store(fused).manifest, {"rgb2pc": {"weights": str(run_dir)}}
    with pytest.raises(FingerprintError, match="weights_sha256"):
        rebuild_backbone(manifest.provenance["backbone"], manifest.fingerprint["backbone"], own)
