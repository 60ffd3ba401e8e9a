"""Diffusion Policy over RGB2PC in two stages: a student's adapters frozen, then trained on at a lower rate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.distill.checkpoint import load_student
from vla.featurize.distill.train import distill
from vla.heads.batch import Batch, FeatureIO, HeadIO
from vla.heads.checkpoint import build_head, load_head
from vla.heads.data import open_data
from vla.heads.fusion import MeanFusion, adapter_key
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.errors import CheckpointError, DataError, FingerprintError, UsageError
from vla.training.checkpoint import checkpoints

NAMES = ("mean_near", "mean_far")


@pytest.fixture(scope="module")
def students(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each kind of fusion, of width 16 over "far" and "near"."""
    root = tmp_path_factory.mktemp("students")
    for kind in ("weighted", "moe"):
        distill(world.job(model={"fusion": kind}), root / kind)
    return {kind: root / kind for kind in ("weighted", "moe")}


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> Path:
    """A store of each backbone's mean of two views, as `means=true` of the backbone rgb2pc makes them."""
    root = tmp_path_factory.mktemp("means") / "rgb2pc"
    features = {"mean_near": ((2, 3), "float32"), "mean_far": ((2, 5), "float32")}
    make_store(
        root,
        lengths=(8, 7, 9),
        features=features,
        fingerprint={"backbone": {"name": "rgb2pc"}, "context": 0},
        provenance={"random_weights": False, "backbone": {"name": "rgb2pc", "weights": None, "options": {}}},
    )
    return root


def config_of(store: Path, *, train: dict[str, Any] | None = None, **model: Any) -> HeadTrainConfig:
    encoder = {"kind": "fusion", "fusion_dim": 16, "dim": 16, **model.pop("encoder", {})}
    small = {"net": "mlp", "horizon": 4, "n_action": 2, "hidden": 16, "layers": 1, "encoder": encoder, **model}
    return HeadTrainConfig.build(
        {
            "head": "dp",
            "data": {"stores": [str(store)], "validation": 0.3},
            "model": small,
            "train": {"steps": 3, "batch_size": 4, "device": "cpu", "lr": 1e-2, "warmup_steps": 0, **(train or {})},
        }
    )


def starting(config: HeadTrainConfig, run: Path) -> HeadTrainConfig:
    return config.model_copy(update={"init_from": str(run)})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[0] / "model.safetensors")


@pytest.fixture(scope="module")
def stages(means: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of both stages."""
    root = tmp_path_factory.mktemp("stages")
    first = config_of(means, freeze_encoder=True, encoder={"student": str(students["weighted"])})
    train_head(first, root / "one")
    second = config_of(means, freeze_encoder=False, train={"lr": 1e-3})
    train_head(starting(second, root / "one"), root / "two")
    return root / "one", root / "two"


def test_stage_one_keeps_the_students_weights_to_the_bit_and_trains_the_rest(
    stages: tuple[Path, Path], students: dict[str, Path]
) -> None:
    """The origin looks for keys that its checkpoints have not, and freezes random weights."""
    student = load_student(students["weighted"]).model.state_dict()
    trained = weights(stages[0])
    fused = {name.removeprefix("encoder.fusion."): v for name, v in trained.items() if ".fusion." in f".{name}"}
    taken = {name: value for name, value in student.items() if name.startswith(("adapters.", "fusion."))}
    assert fused.keys() == taken.keys()
    assert len([name for name in taken if name.endswith("0.weight")]) == 2  # an adapter for each backbone
    assert all(torch.equal(fused[name], taken[name]) for name in taken)
    counts = load_head(stages[0]).model.encoder.fusion.parameters()  # type: ignore[union-attr, operator]
    assert not any(parameter.requires_grad for parameter in counts)


def test_stage_two_starts_where_stage_one_ended_and_moves_the_adapters(stages: tuple[Path, Path]) -> None:
    one, two = load_head(stages[0]), load_head(stages[1])
    assert two.artefact.init_from == str(stages[0])
    fused = "encoder.fusion.adapters.of_near.0.weight"
    before, after = weights(stages[0]), weights(stages[1])
    assert not torch.equal(before[fused], after[fused])
    assert all(parameter.requires_grad for parameter in two.model.parameters())
    for name, values in one.model.action.state_dict().items():  # the normaliser is that of the run it started from
        assert torch.equal(values, two.model.action.state_dict()[name])


def test_a_run_starts_from_the_weights_alone(stages: tuple[Path, Path], means: Path, tmp_path: Path) -> None:
    """At a rate of nearly 0 the first step is stage one's averaged weights, and the optimiser is new."""
    config = config_of(means, train={"lr": 1e-30, "weight_decay": 0.0, "steps": 1})
    report = train_head(starting(config, stages[0]), tmp_path / "run")
    assert report.step == 1
    averaged = load_file(checkpoints(stages[0])[0] / "ema.safetensors")
    begun = weights(tmp_path / "run")
    assert all(torch.equal(begun[name], averaged[name]) for name in averaged)


def test_a_resumed_run_does_not_start_again(stages: tuple[Path, Path], means: Path, tmp_path: Path) -> None:
    """Not even the run that it started from has to be there any more."""
    shutil.copytree(stages[0], tmp_path / "begun")
    config = starting(config_of(means, train={"schedule": "constant", "steps": 2}), tmp_path / "begun")
    train_head(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "begun")
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    train_head(longer, tmp_path / "run", resume=True)
    whole = starting(config_of(means, train={"schedule": "constant", "steps": 4}), stages[0])
    train_head(whole, tmp_path / "whole")
    resumed, uninterrupted = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_a_frozen_encoder_of_random_weights_is_refused(means: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"freeze_encoder of an encoder with random weights.*--from RUN"):
        train_head(config_of(means, freeze_encoder=True), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"encoder": {"dim": 24}}, DataError, "does not fit"),
        ({"hidden": 24}, DataError, "does not fit"),
        ({"encoder": {"kind": "auto"}}, DataError, "does not fit: it lacks"),
    ],
)
def test_weights_of_another_size_are_refused(
    change: dict[str, Any],
    error: type[Exception],
    says: str,
    stages: tuple[Path, Path],
    means: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        train_head(starting(config_of(means, **change), stages[0]), tmp_path / "run")


def test_another_head_and_other_data_are_refused_by_name(
    stages: tuple[Path, Path], means: Path, tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    config = config_of(means)
    other = config.model_copy(update={"head": "mlp", "model": {"encoder": {"kind": "fusion", "fusion_dim": 16}}})
    with pytest.raises(UsageError, match="is a run of head 'dp'; expected one of 'mlp'"):
        train_head(starting(other, stages[0]), tmp_path / "run")
    make_store(
        tmp_path / "deeper",
        lengths=(8, 7, 9),
        features={"mean_near": ((2, 3), "float32"), "mean_far": ((2, 5), "float32")},
        fingerprint={"backbone": {"name": "rgb2pc", "layer": 3}, "context": 0},
        provenance={"random_weights": False, "backbone": {"name": "rgb2pc", "weights": None, "options": {}}},
    )
    with pytest.raises(FingerprintError, match=r"backbone\.layer: 3 here, <absent> wanted"):
        train_head(starting(config_of(tmp_path / "deeper"), stages[0]), tmp_path / "run")
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"features": ("mean_near",)})})
    with pytest.raises(FingerprintError, match=r"features\.mean_far"):
        train_head(starting(fewer, stages[0]), tmp_path / "run")


def test_both_stages_run_from_configuration_files_that_extend_one_another(
    means: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    """As the design document writes them, in YAML: stage 2 is stage 1 with two settings changed."""
    base = config_of(means).model_dump(mode="json", exclude={"head", "init_from"}, exclude_unset=True)
    (tmp_path / "base.json").write_text(json.dumps(base))
    student = students["weighted"]
    stage_one = f"extends: base.json\nmodel:\n  freeze_encoder: true\n  encoder: {{student: {student}}}\n"
    (tmp_path / "one.yaml").write_text(stage_one)
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nmodel: {freeze_encoder: false}\ntrain: {lr: 1.0e-5}\n")
    runner = CliRunner()
    for name, more in (("one", []), ("two", ["--from", str(tmp_path / "run-one")])):
        out = ["--out", str(tmp_path / f"run-{name}"), "--json", *more]
        done = runner.invoke(app, ["train-head", "dp", "--config", str(tmp_path / f"{name}.yaml"), *out])
        assert done.exit_code == 0, (done.output, done.exception)
    kept = load_head(tmp_path / "run-two")
    assert kept.config.freeze_encoder is False  # type: ignore[attr-defined]
    assert kept.artefact.init_from == str(tmp_path / "run-one")
    evaluated = runner.invoke(app, ["evaluate", str(tmp_path / "run-two"), "--json"])
    assert json.loads(evaluated.stdout)["windows"] > 0


# The fusion itself.


def vectors(count: int = 2) -> dict[str, FeatureIO]:
    return {
        "mean_near": FeatureIO(shape=(count, 3), dims=("channel",)),
        "mean_far": FeatureIO(shape=(count, 5), dims=("channel",)),
    }


def test_the_fusion_is_the_students_own_on_one_place(students: dict[str, Path]) -> None:
    student = load_student(students["weighted"]).model
    ours = MeanFusion(vectors(), 16)
    ours.load_student(students["weighted"])
    given = {"mean_near": torch.randn(2, 1, 2, 3), "mean_far": torch.randn(2, 1, 2, 5)}
    tokens = {name: given[f"mean_{name}"] for name in ("far", "near")}
    adapted = [student.adapters[adapter_key(name)](tokens[name]) for name in ("far", "near")]
    torch.testing.assert_close(ours(given), student.fusion(torch.stack(adapted, dim=-2)))


def test_adapters_are_known_by_name_in_whatever_order_features_come() -> None:
    """Two backbones of equal width: by index they would be swapped in silence, as in the origin's yaml."""
    io = {name: FeatureIO(shape=(1, 4), dims=("channel",)) for name in ("mean_vggt", "mean_da3")}
    torch.manual_seed(0)
    one, other = MeanFusion(io, 8), MeanFusion(dict(reversed(io.items())), 8)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        one.fusion.logits.copy_(torch.tensor([0.0, 1.0]))
        other.fusion.logits.copy_(torch.tensor([0.0, 1.0]))
    given = {name: torch.randn(1, 1, 1, 4) for name in io}
    assert torch.equal(one(given), other(dict(reversed(given.items()))))
    swapped = {"mean_vggt": given["mean_da3"], "mean_da3": given["mean_vggt"]}
    assert not torch.allclose(one(given), one(swapped))


def test_every_backbone_reaches_the_action_and_gets_a_gradient() -> None:
    """The origin's encoder uses the first adapter alone."""
    io = HeadIO(action_dim=2, features=vectors())
    values = {"net": "mlp", "horizon": 4, "n_action": 2, "encoder": {"kind": "fusion", "fusion_dim": 16, "dim": 16}}
    model = build_head("dp", values, io)
    model.fit_normalisers(np.random.default_rng(0).normal(size=(20, 2)), np.zeros((20, 0)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = Batch(
        features={"mean_near": torch.randn(4, 2, 2, 3), "mean_far": torch.randn(4, 2, 2, 5)},
        state=None,
        task=torch.zeros(4, dtype=torch.int64),
        obs_valid=torch.ones(4, 2, dtype=torch.bool),
        action=torch.randn(4, 4, 2),
    )
    model.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.fusion.parameters())  # type: ignore[union-attr, operator]


def test_an_expert_takes_the_fused_vector_of_each_view_as_a_token() -> None:
    io = HeadIO(action_dim=2, features=vectors())
    encoder = {"kind": "fusion", "fusion_dim": 16, "dim": 16}
    model: Any = build_head("fm", {"net": "expert", "width": 16, "heads": 2, "layers": 1, "encoder": encoder}, io)
    batch = Batch(
        features={"mean_near": torch.randn(4, 1, 2, 3), "mean_far": torch.randn(4, 1, 2, 5)},
        state=None,
        task=torch.zeros(4, dtype=torch.int64),
        obs_valid=torch.ones(4, 1, dtype=torch.bool),
    )
    assert model.encoder.tokens(batch)[0].shape == (4, 2, 16)


def test_a_student_with_a_gate_or_of_other_backbones_or_another_run_is_refused(
    students: dict[str, Path], stages: tuple[Path, Path]
) -> None:
    with pytest.raises(UsageError, match="fuses by a gate"):
        MeanFusion(vectors(), 16).load_student(students["moe"])
    with pytest.raises(UsageError, match="the features are of near, the student of far, near"):
        MeanFusion({"mean_near": vectors()["mean_near"]}, 16).load_student(students["weighted"])
    with pytest.raises(CheckpointError, match="is no student"):
        MeanFusion(vectors(), 16).load_student(stages[0])
    with pytest.raises(DataError, match="does not fit"):
        MeanFusion(vectors(), 24).load_student(students["weighted"])


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ({"grid": FeatureIO(shape=(1, 2, 2, 3), dims=("y", "x", "channel"))}, "no vector among the features"),
        ({**vectors(2), "other": FeatureIO(shape=(1, 3), dims=("channel",))}, r"vectors of \[1, 2\] views"),
    ],
)
def test_features_that_cannot_be_fused_are_refused(features: dict[str, FeatureIO], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_head("dp", {"encoder": {"kind": "fusion"}}, HeadIO(action_dim=2, features=features))


def test_a_student_for_another_encoder_is_refused() -> None:
    with pytest.raises(UsageError, match="it is for 'fusion'"):
        build_head("dp", {"encoder": {"student": "runs/rgb2pc"}}, HeadIO(action_dim=2, features=vectors()))


def test_the_features_a_run_reads_are_the_unfused_ones(stages: tuple[Path, Path]) -> None:
    head = load_head(stages[0])
    assert set(head.model.reads) == set(NAMES)
    assert len(open_data(head.artefact.data).training) == 2
