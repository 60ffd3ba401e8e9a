"""pi0.5 with geometry from end to end: two stores, a few steps, evaluation, and a policy that sees the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import load_head
from vla.heads.data import open_data
from vla.heads.evaluate import evaluate_head
from vla.heads.pi0 import Pi0Head, export_prefix
from vla.heads.pi0_weights import check_geometry_model
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import CheckpointError, UsageError

pytest.importorskip("depth_anything_3", reason="depth-anything-3 is not installed (pip install --no-deps)")

SOURCE = "synthetic:episodes=3,length=[4,5],cameras=2"
RAYS = {"model": "tiny", "size": 56, "views": 2, "target_hw": [4, 4]}


def paligemma(folder: Path, seed: int) -> Path:
    """Save a tiny PaliGemma with random weights: 4 tokens a picture, as wide as the tiny networks."""
    torch.manual_seed(seed)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"model_type": "siglip_vision_model", **vision},
        projection_dim=64,
        image_token_id=299,
    )
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores `images` (of the PaliGemma in `weights`) and `rays`."""
    root = tmp_path_factory.mktemp("pi0")
    paligemma(root / "weights", 0)
    images = FeaturizeConfig(source=SOURCE, backbone="siglip-prefix", weights=str(root / "weights"))
    run(prepare(images), root / "images")
    rays = FeaturizeConfig(source=SOURCE, backbone="da3", weights="random", options=RAYS)
    run(prepare(rays), root / "rays")
    return root


def config_of(root: Path, head: str = "pi05", stores: tuple[str, ...] = ("images", "rays"), **model: Any) -> Any:
    own = {"weights": str(root / "weights"), "tokenizer": "random", "expert_width": 32, "expert_mlp": 64}
    own |= {"horizon": 4, "n_action": 2, "geom_target_hw": [2, 2], "geom_model_id": "tiny", "sample_steps": 2}
    own |= {"use_geom_prefix": "rays" in stores, "geom_alpha_warmup": 3}
    values = {
        "head": head,
        "data": {"stores": [str(root / s) for s in stores], "validation": 0.34, "random_weights": True},
        "model": {**own, **model},
        "train": {
            "steps": 4,
            "batch_size": 2,
            "device": "cpu",
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
            "lr": 0.02,
        },
    }
    return HeadTrainConfig.build(values)


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """A run of `pi05` with geometry, with a checkpoint after 2 and after 4 steps."""
    train_head(config_of(root), root / "run")
    return root / "run"


def own(run_dir: Path) -> dict[str, Any]:
    """Return the weights that the user names to load a run: its checkpoints never choose them."""
    return {"weights": str(run_dir.parent / "weights")}


def observations(episode: int) -> list[Observation]:
    source = prepare(FeaturizeConfig(source=SOURCE, backbone="toy")).source
    steps, cameras = source.steps(episode), source.index().cameras
    return [
        Observation(dict(zip(cameras, views, strict=True)), steps["state"][i].astype(np.float32), np.zeros(1, "f4"))
        for i, views in enumerate(source.frames(episode, 0, len(steps["action"])))
    ]


def test_the_checkpoint_holds_what_trains_and_names_the_rest_by_digest(trained: Path) -> None:
    head = load_head(trained, settings=own(trained))
    weights = load_file(head.folder / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"action", "_state", "net", "geometry"}
    assert head.artefact.frozen == {"language": head.model.frozen["language"].digest}


def test_a_resumed_run_ends_in_the_same_bits_the_ramp_of_alpha_too(root: Path, trained: Path) -> None:
    wanted = load_file(load_head(trained, settings=own(trained)).folder / "model.safetensors")
    assert int(wanted["geometry.seen"]) == 4
    shutil.copytree(trained, root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000004")
    train_head(config_of(root), root / "resumed", resume=True)
    found = load_file(load_head(root / "resumed", settings=own(trained)).folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_policy_with_the_prefix_decides_what_the_head_decides_on_the_store(trained: Path) -> None:
    head = load_head(trained, settings=own(trained))
    data = open_data(head.artefact.data)
    batch = next(data.batches(np.array([1]), head.config.window, 64, pin=False).in_order())
    policy = Policy(head, device="cpu", n_action=1, backbones={"siglip-prefix": own(trained)})
    assert len(policy._backbones) == 2
    policy.reset(seed=3, task=data.io.tasks[int(batch.task[0])])
    live = policy.act(observations(1)[0])
    first = next(data.batches(np.array([1]), head.config.window, 1, pin=False).in_order())
    wanted = head.model.act(first, torch.Generator().manual_seed(3))[0, 0]
    np.testing.assert_allclose(live, wanted.numpy(), atol=1e-3)  # features rounded to float16, batch of another size


def test_evaluation_and_rollout_both_take_the_prefix_and_both_can_leave_it_out(trained: Path) -> None:
    """The origin's evaluation was not wired to the prefix at all. Without it, DA3 is not even loaded."""
    settings = {"use_geom_prefix": False}
    blind = load_head(trained, settings=settings | own(trained))
    seeing, without = evaluate_head(load_head(trained, settings=own(trained))), evaluate_head(blind)
    assert np.abs(seeing.predicted - without.predicted).max() > 1e-5
    policy = Policy.from_run(
        trained, device="cpu", settings=settings | own(trained), backbones={"siglip-prefix": own(trained)}
    )
    assert [store.recipe["name"] for _, store in policy._backbones] == ["siglip-prefix"]
    assert policy.act(observations(0)[0]).shape == (4,)


def test_the_command_line_leaves_the_prefix_out_too(trained: Path) -> None:
    def evaluated(*settings: str) -> Any:
        words = [word for setting in settings for word in ("--set", setting)]
        return CliRunner().invoke(
            app, ["evaluate", str(trained), "--json", "--set", f"model.weights={own(trained)['weights']}", *words]
        )

    errors = [json.loads(evaluated(*words).stdout)["action_mae"] for words in ((), ("model.use_geom_prefix=false",))]
    assert errors[0] != errors[1]
    assert isinstance(evaluated("train.lr=1").exception, UsageError)
    assert "decided in training" in str(evaluated("model.horizon=2").exception)


def test_the_prefix_of_a_trained_head_is_exported(trained: Path) -> None:
    head = load_head(trained, settings=own(trained))
    data = open_data(head.artefact.data)
    batch = next(data.batches(np.array([0]), head.config.window, 3, pin=False).in_order())
    tokens, pad, att = export_prefix(head, batch)
    assert tokens.shape == (3, 2 * 4, 64)
    assert (bool(pad.all()), bool(att.any())) == (True, False)
    assert isinstance(head.model, Pi0Head)


def test_rays_of_another_model_are_refused(root: Path) -> None:
    with pytest.raises(UsageError, match=r"rays of the store are of tiny; expected depth-anything/DA3-LARGE"):
        train_head(config_of(root, geom_model_id="depth-anything/DA3-LARGE"), root / "other")
    assert not (root / "other").exists()


@pytest.mark.parametrize(
    ("wanted", "network", "recipe", "same"),
    [
        ("depth-anything/DA3-LARGE", "da3-large", {"weights": None}, True),
        ("depth-anything/DA3-LARGE-1.1", "da3-large", {"weights": "weights/da3/here"}, True),
        ("depth-anything/DA3-BASE", "da3-large", {"weights": "weights/da3/here"}, False),
        ("depth-anything/DA3-LARGE", "da3-large", {"weights": "depth-anything/DA3-LARGE-1.1"}, False),
        ("depth-anything/DA3-LARGE", "da3-large", {"options": {"model": "DA3-LARGE-1.1"}}, False),
        ("depth-anything/DA3-LARGE-1.1", "da3-large", {"options": {"model": "DA3-LARGE-1.1"}}, True),
        ("da3-tiny", "da3-tiny", {"weights": "random", "options": {"model": "tiny"}}, True),
    ],
)
def test_geometry_models_are_compared_as_far_as_the_store_knows(
    wanted: str, network: str, recipe: dict[str, Any], same: bool
) -> None:
    try:
        check_geometry_model(wanted, {"name": "da3", "network": network}, recipe)
    except UsageError:
        assert not same
    else:
        assert same


def test_image_tokens_of_another_checkpoints_tower_are_refused(root: Path) -> None:
    """pi0 has trained its tower further: PaliGemma's tokens are not what its language model knows."""
    paligemma(root / "other-weights", 1)
    with pytest.raises(UsageError, match=r"image tokens are of another vision tower than that of .*other-weights"):
        train_head(config_of(root, "pi0", ("images",), weights=str(root / "other-weights")), root / "other")


def test_geometry_and_images_are_augmented_alike_or_not_at_all(root: Path) -> None:
    """The origin augmented what pi0.5 saw, and gave it the geometry of the plain picture."""
    values = {"source": SOURCE, "backbone": "siglip-prefix", "weights": str(root / "weights"), "augment": {"copies": 1}}
    run(prepare(FeaturizeConfig.build(values)), root / "augmented")
    config = config_of(root, stores=("augmented", "rays"))
    with pytest.raises(UsageError, match=r"only the image tokens have augmented copies; .* --set data.augment=false"):
        train_head(config, root / "unlike")
    plain = config.model_copy(update={"data": config.data.model_copy(update={"augment": False})})
    train_head(plain, root / "plain")


def test_a_language_model_that_was_exchanged_after_training_is_refused(root: Path) -> None:
    shutil.copytree(root / "weights", root / "exchanged")
    config = config_of(root, "pi0", ("images",), weights=str(root / "exchanged"), state_norm="zscore")
    train_head(config, root / "exchanged-run")
    load_head(root / "exchanged-run", settings={"weights": str(root / "exchanged")})
    shutil.rmtree(root / "exchanged")
    paligemma(root / "exchanged", 2)
    with pytest.raises(CheckpointError, match=r"the weights of language are not those that .* was trained with"):
        load_head(root / "exchanged-run", settings={"weights": str(root / "exchanged")})


def test_a_run_that_starts_from_another_reads_the_weights_that_it_names_itself(root: Path, trained: Path) -> None:
    folder = shutil.copytree(load_head(trained, settings=own(trained)).folder, root / "foreign")
    artefact = json.loads((folder / "artefact.json").read_text())
    artefact["config"]["weights"] = artefact["config"]["tokenizer"] = "/somewhere/else"
    data = json.dumps(artefact).encode()
    (folder / "artefact.json").write_bytes(data)
    complete = json.loads((folder / "complete.json").read_text())
    complete["files"]["artefact.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(complete))
    config = config_of(root).model_copy(update={"init_from": str(folder)})
    assert train_head(config, root / "continued").step == 4


def test_the_run_file_names_every_switch(trained: Path) -> None:
    """What the origin had as constants of a script is in the configuration, and so on the command line."""
    config = json.loads((load_head(trained, settings=own(trained)).folder / "artefact.json").read_text())["config"]
    switches = {"use_geom_prefix", "geom_model_id", "geom_target_hw", "geom_init_alpha", "freeze_geom_model"}
    assert switches <= config.keys()
