"""Training through the common loop: it learns, repeats, resumes, and what it leaves loads strictly or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.distill.checkpoint import load_student
from vla.featurize.distill.train import DistilledStudent, distill, evaluate
from vla.stores.errors import CheckpointError, DataError, UsageError
from vla.training.checkpoint import checkpoints, newest_complete


def log_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fusion", ["weighted", "moe"])
def test_the_student_learns_a_teacher_that_is_a_function_of_the_features(
    world: Any, tmp_path: Path, fusion: str
) -> None:
    model = {"fusion": fusion, "grid": [1, 1]}
    train = {"steps": 80, "log_every": 80, "checkpoint_every": 80, "validate_every": 80}
    job = world.job(model=model, train=train)
    before = evaluate(job.student.eval(), job.source, 8)
    report = distill(job, tmp_path / "run")
    assert report.metrics["val_infonce"] < 0.8 * before["val_infonce"]
    assert report.metrics["val_sim_gap"] > before["val_sim_gap"] + 0.3
    assert {"pos_sim", "neg_sim", "sim_gap", "infonce", "mse", "loss"} <= report.metrics.keys()
    trained = load_student(tmp_path / "run")
    assert trained.step == 80
    assert trained.artefact.config == job.student.config
    assert trained.artefact.teacher["kind"] == "npy"
    assert [record.path for record in trained.artefact.stores] == [str(world.near), str(world.far)]


def test_a_resumed_run_ends_with_the_same_bits(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"model": {"fusion": "moe", "dropout": 0.1, "tokens": 7}, "loss": {"mse": 1.0}}
    distill(world.job(**changes), tmp_path / "whole")
    plain, calls = DistilledStudent.loss, []

    def breaks(self: DistilledStudent, batch: Any) -> Any:
        calls.append(0)
        if len(calls) == 5:
            raise DataError("the lights went out")
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DistilledStudent, "loss", breaks)
        with pytest.raises(DataError, match="lights"):
            distill(world.job(**changes), tmp_path / "broken")
    with pytest.raises(UsageError, match="--resume to go on"):
        distill(world.job(**changes), tmp_path / "broken")
    report = distill(world.job(**changes), tmp_path / "broken", resume=True)
    assert report.resumed_from is not None
    assert report.resumed_from.name == "step-00000003"
    one, other = (newest_complete(tmp_path / name) / "model.safetensors" for name in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UsageError, match="begun with other settings"):
        distill(world.job(loss={"tau": 0.5}), tmp_path / "broken", resume=True)


def test_bug_2_5_2_weights_load_to_the_last_key_or_are_refused(world: Any, tmp_path: Path) -> None:
    """The origin looked for keys that its checkpoints do not have, and went on with random weights."""
    job = world.job()
    distill(job, tmp_path / "run")
    folder = newest_complete(tmp_path / "run")
    trained = load_student(tmp_path / "run").model.state_dict()
    saved = load_file(folder / "model.safetensors")
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    lost = sorted(saved)[0]
    save_file({name: values for name, values in saved.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs"):
        load_student(folder)
    _reseal(folder)
    with pytest.raises(CheckpointError, match=f"does not fit its student: {lost}"):
        load_student(folder)


def _reseal(folder: Path) -> None:
    """Make `complete.json` agree with the files, as someone who edits checkpoints would."""
    import hashlib

    record = json.loads((folder / "complete.json").read_bytes())
    for name in record["files"]:
        data = (folder / name).read_bytes()
        record["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(record))


def test_a_run_of_something_else_is_no_student(world: Any, tmp_path: Path) -> None:
    distill(world.job(train={"steps": 1}), tmp_path / "run")
    folder = newest_complete(tmp_path / "run")
    artefact = json.loads((folder / "artefact.json").read_bytes())
    (folder / "artefact.json").write_text(json.dumps({**artefact, "student": "other"}))
    _reseal(folder)
    with pytest.raises(CheckpointError, match="is no student"):
        load_student(folder)


def test_the_order_of_stores_and_features_does_not_matter(world: Any) -> None:
    data = {"stores": [str(world.near), str(world.far)], "features": ["near", "far"]}
    one = world.job(data=data).student
    other = world.job(data={**data, "features": ["far", "near"]}).student
    assert one.config == other.config
    mine, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_batches_hold_the_grids_and_the_embedding_of_one_step(world: Any) -> None:
    source = world.job().source
    stores, teacher = source.stores, np.concatenate(list(world.embeddings.values()))
    batches = source.shuffled(source.training, 8, seed=3, start=2)
    batch, following = next(batches), None
    rows = batch.row.numpy().copy()
    np.testing.assert_array_equal(batch.teacher[:, 0].numpy(), teacher[rows])
    for name in ("near", "far"):
        stored = np.empty((8, *stores.feature_info(name).shape), np.float16)
        reader = stores.reader(name)
        reader.read(rows, stored)
        reader.close()
        np.testing.assert_array_equal(batch.grids(0)[name].numpy(), stored[:, 0].astype(np.float32))
    following = next(batches).row.clone()
    batches.close()
    again = source.shuffled(source.training, 8, seed=3, start=3)
    assert torch.equal(next(again).row, following), "batch k is a function of (seed, k)"
    again.close()


def test_unpaired_steps_are_never_trained_on(world: Any, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name, values in world.embeddings.items():
        np.save(teacher / f"{name}.npy", values[:-2])
    with pytest.raises(DataError, match="frame 7 of episode 'episode_000000' has no embedding"):
        world.job(data={"teacher": str(teacher)})
    job = world.job(data={"teacher": str(teacher), "skip_unpaired": True})
    assert job.artefact.pairing == {"paired": 22, "unpaired": 8, "surplus": 0, "unused": 0}
    table = job.source.stores.first.episodes
    ends = set((table.row_start + table.length - 1).tolist()) | set((table.row_start + table.length - 2).tolist())
    held_out = job.source.validation
    rows = set(job.source.training.row.tolist()) | set(held_out.row.tolist())
    assert len(rows) == 22
    assert not rows & ends


def test_views_share_an_embedding_and_are_no_negatives_of_each_other(world: Any) -> None:
    """Two equal views cost what one costs."""
    job = world.job()
    batches = job.source.shuffled(job.source.training, 8, seed=0)
    batch = next(batches)
    batches.close()
    twice = type(batch)({name: v.repeat(1, 2, 1, 1, 1) for name, v in batch.features.items()}, batch.teacher, batch.row)
    student = job.student.eval()
    assert torch.allclose(student.loss(batch)[0], student.loss(twice)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"batch_size": 1}}, "at least 2 different steps"),
        ({"train": {"batch_size": 999}}, "at least 2 different steps"),
        ({"data": {"stores": []}}, "no store given"),
        ({"data": {"features": ["nowhere"]}}, "no store has feature 'nowhere'"),
        ({"data": {"teacher_feature": "pc"}}, "is no store"),
        ({"model": {"teacher_dim": 3}}, "the data do not decide"),
        ({"model": {"fuison": "moe"}}, "did you mean 'fusion'"),
    ],
)
def test_runs_that_cannot_be_are_refused(world: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        world.job(**changes)


def test_features_that_are_no_grids_have_no_places_to_share(world: Any, tmp_path: Path, make_store: Any) -> None:
    made = make_store(tmp_path / "tokens", lengths=(3, 3), features={"tokens": ((1, 16, 3), "float16")})
    with pytest.raises(UsageError, match=r"'tokens' is float16 \(1, 16, 3\); expected a grid"):
        world.job(data={"stores": [str(made.root)]})


def test_random_weights_are_not_taken_unasked(world: Any, tmp_path: Path, make_store: Any) -> None:
    made = make_store(
        tmp_path / "store", features={"grid": ((1, 2, 2, 3), "float16")}, provenance={"random_weights": True}
    )
    with pytest.raises(DataError, match="made with random weights"):
        world.job(data={"stores": [str(made.root)]})


def test_the_command_plans_trains_and_reports(world: Any, tmp_path: Path) -> None:
    arguments = ["distill", "rgb2pc", "--store", str(world.near), "--store", str(world.far), "--json"]
    arguments += ["--teacher", str(world.teacher), "--out", str(tmp_path / "run"), "--steps", "2"]
    for key, value in {"dim": 16, "heads": 2, "layers": 1}.items():
        arguments += ["--set", f"model.{key}={value}"]
    arguments += ["--set", "train.batch_size=8", "--set", "train.device=cpu"]
    plan = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run"]).stdout)
    assert plan["inputs"] == {"far": [6, 6, 5], "near": [4, 4, 3]}
    assert (plan["grid"], plan["pairing"]["paired"]) == ([4, 4], 30)
    assert not (tmp_path / "run").exists()
    done = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert done["step"] == 2
    assert done["pairing"]["paired"] == 30
    assert "val_sim_gap" in done
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, UsageError)
    assert isinstance(CliRunner().invoke(app, ["distill", "rgb3pc", *arguments[2:]]).exception, UsageError)


def test_a_student_replays_and_resumes_by_its_folder_alone(world: Any, tmp_path: Path, files_of: Any) -> None:
    runner, run = CliRunner(), tmp_path / "run"
    arguments = ["distill", "rgb2pc", "--store", str(world.near), "--store", str(world.far), "--out", str(run)]
    settings = ["train.steps=4", "train.batch_size=4", "train.checkpoint_every=2", "train.schedule=constant"]
    arguments += ["--teacher", str(world.teacher), "--set", "data.validation=0.25"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    arguments += [
        word
        for key, value in {"dim": 16, "heads": 2, "layers": 1}.items()
        for word in ("--set", f"model.{key}={value}")
    ]
    assert runner.invoke(app, arguments).exit_code == 0
    wanted = files_of(checkpoints(run)[0])
    replayed = runner.invoke(app, ["distill", "--config", str(run), "--out", str(tmp_path / "again")])
    assert replayed.exit_code == 0, replayed.exception
    assert files_of(checkpoints(tmp_path / "again")[0]) == wanted
    shutil.rmtree(checkpoints(run)[0])
    resumed = runner.invoke(app, ["distill", "--resume", "--out", str(run)])
    assert resumed.exit_code == 0, resumed.exception
    assert files_of(checkpoints(run)[0]) == wanted
