"""From OpenTrackVLA's files to a trained planner: features, waypoints, figures, checkpoints, and what may be driven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads import track
from vla.heads.checkpoint import load_head
from vla.heads.data import open_data
from vla.heads.evaluate import evaluate_head
from vla.heads.train import HeadTrainConfig, train_head
from vla.pretrained.language import TINY, build_language
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import CheckpointError, SourceError, UsageError
from vla.stores.windows import WindowSpec

LENGTHS = (7, 9, 6)
FIGURES = {
    "L_nav",
    "mse_total",
    "mse_x",
    "mse_y",
    "mse_theta",
    "mask_cov",
    "final_EPE_mean",
    "final_EPE_median",
    "hit_rate",
    "episode_follow",
}


def write_episodes(root: Path) -> None:
    rng = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        folder = root / f"seed_100/scene/{episode}"
        folder.mkdir(parents=True)
        steps = [{"step": n + 1, "base_velocity": rng.normal(size=3).tolist()} for n in range(length)]
        folder.with_name(f"{episode}_info.json").write_text(json.dumps(steps))
        status = {"instruction": f"follow person {episode}", "success": True}
        folder.with_name(f"{episode}.json").write_text(json.dumps(status))
        for frame in range(length):
            picture = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"frame_{frame + 1:05d}.png")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Coarse and fine tokens of three short episodes, and their instructions."""
    root = tmp_path_factory.mktemp("track")
    write_episodes(root / "raw")
    source = {"source": f"trackvla:{root / 'raw'}", "weights": "random"}
    small = {"backbone": "dino-siglip", "options": {"size": 112, "grid": 7, "fine": 4}}
    for name, values in (("ds", small), ("text", {"backbone": "text", "options": {"length": 20}})):
        run(prepare(FeaturizeConfig.build({**source, **values})), root / name)
    return [str(root / "ds"), str(root / "text")]


VARIANTS: dict[str, dict[str, Any]] = {
    "light": {"width": 32, "token_width": 4},
    "llm": {"variant": "llm", "llm_weights": "random", "max_time": 8},
    "lora": {"variant": "llm", "llm_weights": "random", "max_time": 8, "llm": "lora"},
}


def config_of(stores: list[str], variant: str, steps: int = 2, target: str = "waypoints") -> HeadTrainConfig:
    data = {"stores": stores, "validation": 0.34, "target": target, "random_weights": True}
    model = {"n_obs": 4, **VARIANTS[variant], **({} if target == "waypoints" else {"horizon": 4})}
    train = {"steps": steps, "batch_size": 4, "device": "cpu", "checkpoint_every": 1, "schedule": "constant"}
    train |= {"warmup_steps": 0, "precision": "no"}
    return HeadTrainConfig.build({"head": "track", "data": data, "model": model, "train": train})


@pytest.mark.parametrize(
    ("head", "model", "says"),
    [
        ("dp", {"n_obs": 2, "horizon": 8, "n_action": 7}, r"actions from 1 steps before.*Try: --set model\.n_obs=1"),
        ("fm", {"horizon": 4}, r"a horizon of 4.*Try: --set model\.horizon=8"),
    ],
)
def test_waypoints_of_another_window_are_refused_with_what_mends_it(
    head: str, model: dict[str, Any], says: str, stores: list[str], tmp_path: Path
) -> None:
    settings = config_of(stores, "light").model_dump(mode="json") | {"head": head, "model": model}
    with pytest.raises(UsageError, match=says):
        train_head(HeadTrainConfig.build(settings), tmp_path / "run")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_gaps_4_and_5_training_validates_saves_and_resumes_to_the_bit(
    variant: str, stores: list[str], tmp_path: Path
) -> None:
    """Runs of fewer than 100 steps too; what was trained is loaded strictly, by evaluation as by a resumed run."""
    report = train_head(config_of(stores, variant), tmp_path / "whole")
    assert report.metrics.keys() >= FIGURES
    assert 0 < report.metrics["mask_cov"] < 1, "gap 3: horizons that the episode's end cuts are marked"
    train_head(config_of(stores, variant, steps=1), tmp_path / "parts")
    resumed = train_head(config_of(stores, variant), tmp_path / "parts", resume=True)
    assert resumed.resumed_from is not None
    whole, parts = (load_head(tmp_path / name) for name in ("whole", "parts"))
    assert whole.step == parts.step == 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    figures = evaluate_head(whole).extra
    assert figures == pytest.approx({name: report.metrics[name] for name in FIGURES})
    assert whole.artefact.frozen.keys() == ({"llm"} if variant != "light" else set())


def test_alpha_is_that_of_the_valid_waypoints_of_the_training_episodes(stores: list[str], tmp_path: Path) -> None:
    train_head(config_of(stores, "light", steps=1), tmp_path / "run")
    head = load_head(tmp_path / "run")
    data = open_data(head.artefact.data)
    store = data.stores.first
    rows = data.rows(data.training)
    walked = store.steps("waypoints")[rows][store.steps("waypoints_valid")[rows]]
    alpha = np.percentile(np.linalg.norm(walked[:, :2], axis=1), 95)
    assert len(data.training) == 2
    assert head.model.action.scale.tolist() == pytest.approx([alpha, alpha, 1.0])


def test_waypoints_are_no_actions_of_a_simulator(stores: list[str], tmp_path: Path) -> None:
    train_head(config_of(stores, "light", steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"plans 'waypoints'.*waypoint_velocities"):
        Policy.from_run(tmp_path / "run", device="cpu")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_gap_9_a_head_trained_on_actions_drives_as_it_was_trained_and_forgets_at_reset(
    variant: str, stores: list[str], tmp_path: Path
) -> None:
    """Live features through the policy, and the same instruction, decide as windows of the store do."""
    train_head(config_of(stores, variant, target="action", steps=1), tmp_path / "run")
    head = load_head(tmp_path / "run")
    data = open_data(head.artefact.data)
    batch = next(data.batches(np.array([1]), head.config.window, 64, pin=False, reads=head.model.reads).in_order())
    wanted = head.model.act(batch)[:, 0].numpy()
    source = prepare(FeaturizeConfig.build({"source": source_of(stores), "backbone": "toy"})).source
    policy = Policy(load_head(tmp_path / "run"), device="cpu", n_action=1)
    frames = list(source.frames(1, 0, LENGTHS[1]))
    for _ in range(2):
        policy.reset(seed=0, task="follow person 1")
        nothing = np.zeros(1, np.float32)
        driven = [policy.act(Observation({"rgb": views[0]}, nothing, nothing)) for views in frames[:4]]
        np.testing.assert_allclose(driven, wanted[:4], atol=1e-5)


def source_of(stores: list[str]) -> str:
    return f"trackvla:{Path(stores[0]).parent / 'raw'}"


def test_an_instruction_that_was_not_trained_on_is_refused_and_has_no_default(
    stores: list[str], tmp_path: Path
) -> None:
    """Gap 13: the published code falls back to one instruction in training and another in driving."""
    train_head(config_of(stores, "light", target="action", steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match="not trained on 'follow the person'"):
        Policy.from_run(tmp_path / "run", device="cpu").reset(seed=0, task="follow the person")
    write_episodes(tmp_path / "raw")
    for file in (tmp_path / "raw").rglob("[0-9].json"):
        file.write_text('{"success": true}')
    with pytest.raises(SourceError, match="has no instruction"):
        prepare(FeaturizeConfig.build({"source": f"trackvla:{tmp_path / 'raw'}", "backbone": "toy"}))


def test_a_frozen_language_model_of_other_weights_is_refused_at_loading(
    stores: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_head(config_of(stores, "llm", steps=1), tmp_path / "run")
    load_head(tmp_path / "run")
    monkeypatch.setattr(track, "load_language", lambda _: build_language(TINY))
    with pytest.raises(CheckpointError, match="the weights of llm are not those"):
        load_head(tmp_path / "run")


def test_gap_11_each_frame_is_stored_once_and_a_window_reads_31_of_them(stores: list[str]) -> None:
    """The published cache keeps two files a frame, and loads 32 of them for a sample."""
    config = config_of(stores, "light")
    data = open_data(config.data)
    batches = data.batches(
        data.training, WindowSpec(n_obs=32, horizon=8), 4, pin=False, reads={"coarse": 32, "fine": 1}
    )
    batch = next(batches.in_order())
    assert batch.feature("coarse").shape[:2] == (4, 32)
    assert batch.feature("fine").shape[:2] == (4, 1)
    assert batch.obs_valid.sum(1).tolist() == [1, 2, 3, 4]
    assert torch.equal(batch.feature("coarse")[2, :29], batch.feature("coarse")[2, 29:30].expand(29, -1, -1, -1))
