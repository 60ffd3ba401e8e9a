"""Nothing in a checkpoint or a store chooses code, a file, a folder or an address: the user does, when it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from pydantic import BaseModel

from vla.cli import app
from vla.featurize.backbones.efficientnet import _published_file
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class
from vla.featurize.distill.student import StudentConfig
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.checkpoint import load_head
from vla.heads.data import DataConfig
from vla.heads.evaluate import evaluate_head
from vla.heads.registry import HEADS, head_class
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.online import OnlineTrainConfig, train_online
from vla.rollout.policy import Policy
from vla.stores.errors import DataError, FingerprintError, SourceError, StoreError, UsageError
from vla.stores.user_given import PlainText, UserGiven
from vla.terminal.run_app import run_app

SOURCE = "synthetic:episodes=4,length=[6,9],cameras=1,image_size=32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store `toy` and a run `run` of a head that was trained on it."""
    root = tmp_path_factory.mktemp("foreign")
    run(prepare(FeaturizeConfig(source=SOURCE, backbone="toy")), root / "toy")
    train_head(HeadTrainConfig.build(training(root / "toy")), root / "run")
    return root


def training(store: Path) -> dict[str, Any]:
    model = {"n_obs": 1, "horizon": 2, "n_action": 1, "encoder": {"dim": 8, "queries": 2}, "hidden": 8}
    data = {"stores": [str(store)], "validation": 0.25}
    return {"head": "mlp", "data": data, "model": model, "train": {"steps": 2, "batch_size": 4, "device": "cpu"}}


def foreign_run(made: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of the run's checkpoint whose artefact was changed, its digests renewed."""
    checkpoint = load_head(made / "run").folder
    shutil.copytree(checkpoint, folder)
    artefact = json.loads((folder / "artefact.json").read_text())
    change(artefact)
    data = json.dumps(artefact).encode()
    (folder / "artefact.json").write_bytes(data)
    complete = json.loads((folder / "complete.json").read_text())
    complete["files"]["artefact.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(complete))
    return folder


def foreign_store(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a store that says something else of where it comes from."""
    job = prepare(FeaturizeConfig(source=SOURCE, backbone="toy"))
    change(job.plan.manifest.provenance)
    run(job, folder)
    return folder


def code(folder: Path, canary: Path) -> dict[str, Any]:
    """Return the recipe of a backbone whose checkout writes `canary` when it is imported."""
    for name in ("models/croco.py", "vggt/models/vggt.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    return {"name": "croco", "weights": "random", "options": {"checkout": str(folder), "any_commit": True}}


def test_a_checkpoint_whose_recipe_names_a_checkout_runs_no_code_of_it(made: Path, tmp_path: Path) -> None:
    recipe = code(tmp_path / "code", tmp_path / "canary")
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["stores"][0].update(recipe=recipe))
    with pytest.raises(UsageError, match=r"backbones\.croco\.checkout"):
        Policy.from_run(path, device="cpu")
    assert not (tmp_path / "canary").exists()


def test_the_refusal_names_every_value_to_type_ready_for_a_shell(made: Path, tmp_path: Path) -> None:
    recipe = code(tmp_path / "a; touch b", tmp_path / "canary")
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["stores"][0].update(recipe=recipe))
    with pytest.raises(UsageError) as refused:
        Policy.from_run(path, device="cpu")
    assert "--set backbones.croco.any_commit=true" in refused.value.fix
    assert f"--set 'backbones.croco.checkout={tmp_path}/a; touch b'" in refused.value.fix


def test_a_backbone_behind_another_is_held_to_the_same_rule(made: Path, tmp_path: Path) -> None:
    inner = {"backbone": code(tmp_path / "code", tmp_path / "canary"), "scales": None}
    recipe = {"name": "toy", "weights": None, "options": {}, "inputs": {"grid": inner}}
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["stores"][0].update(recipe=recipe))
    with pytest.raises((UsageError, DataError), match=r"croco|inputs"):
        Policy.from_run(path, device="cpu")
    assert not (tmp_path / "canary").exists()


def test_a_store_whose_recipe_names_a_checkout_runs_no_code_of_it(tmp_path: Path) -> None:
    recipe = code(tmp_path / "code", tmp_path / "canary")
    path = foreign_store(tmp_path / "store", lambda provenance: provenance["backbone"].update(recipe))
    with pytest.raises(UsageError, match=r"backbones\.croco\.checkout"):
        train_online(OnlineTrainConfig.build(training(path)), tmp_path / "out")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"name": "da3", "weights": "/somewhere", "options": {}}, "da3.weights"),
        ({"name": "da3", "weights": None, "options": {"weights": "owner/model"}}, "da3.weights"),
        ({"name": "siglip-prefix", "weights": "owner/model", "options": {}}, "siglip-prefix.weights"),
        ({"name": "dino-siglip", "weights": None, "options": {"siglip": "owner/model"}}, "dino-siglip.siglip"),
        ({"name": "spatial", "weights": "random", "options": {"mapanything": "/x", "dense": 2}}, "mapanything"),
        ({"name": "vggt", "weights": "random", "options": {"checkout": "/x"}}, "vggt.checkout"),
        ({"name": "rgb2pc", "weights": "/run", "options": {}}, "rgb2pc.weights"),
        ({"name": "efficientnet", "weights": "/x.pth", "options": {}}, "efficientnet.weights"),
        ({"name": "text", "weights": "/x", "options": {}}, "text.weights"),
    ],
)
def test_every_place_that_a_recipe_names_is_asked_for(
    recipe: dict[str, Any], key: str, made: Path, tmp_path: Path
) -> None:
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["stores"][0].update(recipe=recipe))
    with pytest.raises(UsageError, match=key):
        Policy.from_run(path, device="cpu")


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"name": 3},
        {"name": "toy", "options": []},
        {"name": "toy", "weights": {}},
        {"name": "toy", "options": {"name": "croco"}},
        {"name": "toy", "inputs": {"grid": 3}},
        {"name": "toy", "inputs": {"grid": {"backbone": {"name": "toy"}}}},
    ],
)
def test_a_recipe_of_another_shape_is_refused(recipe: dict[str, Any], made: Path, tmp_path: Path) -> None:
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["stores"][0].update(recipe=recipe))
    with pytest.raises((DataError, UsageError)):
        Policy.from_run(path, device="cpu")


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a run of a backbone whose weights are a file of the user."""
    root = tmp_path_factory.mktemp("weighed")
    pytest.importorskip("efficientnet_lite_pytorch")
    shutil.copy(_published_file(), root / "weights.pth")
    options = {"block": [1], "size": 64}
    config = FeaturizeConfig(source=SOURCE, backbone="efficientnet", weights=str(root / "weights.pth"), options=options)
    run(prepare(config), root / "store")
    train_head(HeadTrainConfig.build(training(root / "store")), root / "run")
    return root


def test_weights_that_the_user_names_again_act_and_others_are_refused(weighed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"backbones\.efficientnet\.weights"):
        Policy.from_run(weighed / "run", device="cpu")
    moved = shutil.copy(weighed / "weights.pth", tmp_path / "moved.pth")
    Policy.from_run(weighed / "run", device="cpu", backbones={"efficientnet": {"weights": str(moved)}})
    Policy.from_run(weighed / "run", device="cpu", backbones={"grid": {"weights": str(moved)}})
    with pytest.raises(FingerprintError):
        Policy.from_run(weighed / "run", device="cpu", backbones={"efficientnet": {"weights": "random"}})


def test_online_training_takes_the_weights_that_the_user_names(weighed: Path, tmp_path: Path) -> None:
    values = training(weighed / "store")
    with pytest.raises(UsageError, match=r"backbones\.efficientnet\.weights"):
        train_online(OnlineTrainConfig.build(values), tmp_path / "refused")
    given = {"efficientnet": {"weights": str(weighed / "weights.pth")}}
    assert train_online(OnlineTrainConfig.build({**values, "backbones": given}), tmp_path / "run").step == 2


@pytest.mark.parametrize(
    ("given", "key"),
    [({"efficientnets": {"weights": "x"}}, "efficientnets"), ({"efficientnet": {"size": 224}}, "size")],
)
def test_a_setting_of_a_backbone_that_the_user_cannot_choose_is_refused(
    given: dict[str, dict[str, Any]], key: str, weighed: Path
) -> None:
    with pytest.raises(UsageError, match=key):
        Policy.from_run(weighed / "run", device="cpu", backbones=given)


def test_rollout_hands_the_settings_of_backbones_on(weighed: Path) -> None:
    arguments = ["rollout", str(weighed / "run"), "--env", "nowhere:at-all"]
    with pytest.raises(UsageError, match=r"backbones\.efficientnet\.weights"):
        run_app(app, arguments)
    given = f"backbones.efficientnet.weights={weighed / 'weights.pth'}"
    with pytest.raises(UsageError, match="nowhere"):  # the policy was made
        run_app(app, [*arguments, "--set", given])


# ---- which settings are of that kind ----


def texts(annotation: object) -> bool:
    """Whether a type admits any text, so that a path fits."""
    if get_origin(annotation) is not None:
        return any(texts(inner) for inner in get_args(annotation) if not isinstance(inner, str))
    return annotation in (str, Path, Any, dict, object)


def undeclared(settings: type[BaseModel]) -> list[str]:
    found = []
    for name, field in settings.model_fields.items():
        if any(isinstance(mark, (UserGiven, PlainText)) for mark in field.metadata):
            continue
        nested = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        found += [f"{name}.{key}" for part in nested if issubclass(part, BaseModel) for key in undeclared(part)]
        if texts(field.annotation):
            found.append(name)
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_every_option_of_a_backbone_that_admits_a_path_says_what_it_is(name: str) -> None:
    settings = load_backbone_class(name).settings_type
    assert undeclared(settings) == []
    marks = {key: field.metadata for key, field in settings.model_fields.items() if key in ("checkout", "any_commit")}
    assert all(any(isinstance(mark, UserGiven) for mark in found) for found in marks.values())


@pytest.mark.parametrize("name", HEADS)
def test_every_setting_of_a_head_that_admits_a_path_says_what_it_is(name: str) -> None:
    assert undeclared(head_class(name).Config) == []


def test_every_setting_of_the_data_and_of_a_student_that_admits_a_path_says_what_it_is() -> None:
    assert undeclared(DataConfig) == undeclared(StudentConfig) == []


# ---- heads ----


@pytest.mark.parametrize(
    ("head", "config", "key"),
    [
        ("pi0", {"weights": "/somewhere"}, "model.weights"),
        ("pi05", {"weights": "owner/model"}, "model.weights"),
        ("pi0", {"weights": "random", "tokenizer": "/somewhere"}, "model.tokenizer"),
        ("hier", {"mode": "fast", "fast": "/somewhere"}, "model.fast"),
        ("hier", {"variant": "full", "weights": "/somewhere"}, "model.weights"),
        ("track", {"variant": "llm", "llm_weights": "/somewhere"}, "model.llm_weights"),
        ("track", {"variant": "llm", "planner": "/somewhere"}, "model.planner"),
    ],
)
def test_every_place_that_a_head_would_read_is_asked_for(
    head: str, config: dict[str, Any], key: str, made: Path, tmp_path: Path
) -> None:
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact.update(head=head, config=config))
    with pytest.raises(UsageError, match=key):
        load_head(path)


def test_what_training_alone_reads_is_not_asked_for(made: Path, tmp_path: Path) -> None:
    change = {"norm_stats": str(tmp_path / "norm_stats.json")}
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["config"].update(change))
    assert load_head(path).config.norm_stats == change["norm_stats"]


# ---- evaluation ----


def test_a_store_that_a_checkpoint_names_by_url_is_never_asked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla.stores.store.open_store", lambda *a, **b: pytest.fail("a store was opened"))
    cache = tmp_path / "cache"

    def change(artefact: dict[str, Any]) -> None:
        artefact["data"].update(stores=["s3://bucket/store"], remote={"cache": str(cache)})
        artefact["stores"][0]["path"] = "s3://bucket/store"

    path = foreign_run(made, tmp_path / "run", change)
    with pytest.raises(UsageError, match=r"data\.stores"):
        evaluate_head(load_head(path))
    with pytest.raises(UsageError, match=r"--store"):
        run_app(app, ["evaluate", str(path)])
    assert not cache.exists()


def test_the_cache_folder_of_a_checkpoint_is_not_used(made: Path, tmp_path: Path) -> None:
    path = foreign_run(made, tmp_path / "run", lambda artefact: artefact["data"]["remote"].update(cache="/elsewhere"))
    head = load_head(path)
    seen: list[DataConfig] = []
    import vla.heads.evaluate as module

    original = module.open_data
    try:
        module.open_data = lambda config: seen.append(config) or original(config)  # type: ignore[func-returns-value]
        evaluate_head(head)
    finally:
        module.open_data = original
    assert seen[0].remote.cache is None


def test_another_store_at_the_place_that_a_checkpoint_names_is_refused_before_it_is_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prepare(FeaturizeConfig(source="synthetic:episodes=3,cameras=1,image_size=32", backbone="toy")), tmp_path / "s")

    def change(artefact: dict[str, Any]) -> None:
        artefact["data"]["stores"] = [str(tmp_path / "s")]

    path = foreign_run(made, tmp_path / "run", change)
    monkeypatch.setattr("vla.heads.evaluate.open_data", lambda config: pytest.fail("the store was read"))
    with pytest.raises(StoreError, match="checkpoint"):
        evaluate_head(load_head(path))


def test_a_moved_store_of_the_training_is_evaluated_on_its_held_out_episodes(made: Path, tmp_path: Path) -> None:
    head = load_head(made / "run")
    shutil.copytree(made / "toy", tmp_path / "moved")
    wanted, moved = evaluate_head(head), evaluate_head(head, data={"stores": [str(tmp_path / "moved")]})
    assert moved.windows == wanted.windows
    np.testing.assert_array_equal(moved.mae, wanted.mae)
    arguments = ["evaluate", str(made / "run"), "--set", f'data.stores=["{tmp_path / "moved"}"]']
    assert run_app(app, arguments) == 0


# ---- demonstrations ----


def test_demonstrations_that_a_store_names_are_asked_for(tmp_path: Path) -> None:
    def change(provenance: dict[str, Any]) -> None:
        provenance["source"] = provenance["backbone"]["source"]["given"] = str(tmp_path / "elsewhere")

    path = foreign_store(tmp_path / "store", change)
    with pytest.raises((UsageError, SourceError), match=r"elsewhere") as refused:
        train_online(OnlineTrainConfig.build(training(path)), tmp_path / "out")
    assert f"--set online.source={tmp_path / 'elsewhere'}" in refused.value.fix


@pytest.mark.parametrize("change", [{"given": 3}, {"options": 3}, {"map": []}, {"options": {"nothing": 1}}])
def test_a_record_of_demonstrations_of_another_shape_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = foreign_store(tmp_path / "store", lambda provenance: provenance["backbone"]["source"].update(change))
    with pytest.raises((UsageError, SourceError)):
        train_online(OnlineTrainConfig.build(training(path)), tmp_path / "out")
