"""--overwrite, --out and --name: what a command may delete and where it may write."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla.cli import app
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.errors import StoreError, UsageError
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer
from vla.terminal.run_app import run_app
from vla.training.run_folder import prune

SOURCE = "synthetic:episodes=4,length=[6,7],image_size=56"
TRAIN = ["data.random_weights=true", "data.validation=0.25", "train.batch_size=2", "train.ema=false"]
TRAIN += ["train.checkpoint_every=2", "model.horizon=2", "model.n_action=1"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def vla(*words: object) -> None:
    assert run_app(app, [str(word) for word in words]) == 0


def featurize(out: Path, *more: object) -> None:
    vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", out, *more)


def train(store: Path, out: Path, *more: object) -> None:
    settings = [word for setting in TRAIN for word in ("--set", setting)]
    vla("train-head", "mlp", "--store", store, "--out", out, "--steps", 2, *settings, *more)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "a/b", "-x", "/tmp/x", "a\nb"])
def test_a_name_leads_nowhere_but_into_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        featurize(tmp_path / "deep" / "out", f"--name={name}")
    assert list(tmp_path.iterdir()) == []


def test_training_never_deletes_the_store_that_it_reads(tmp_path: Path) -> None:
    featurize(tmp_path)
    run = tmp_path / "run"
    train(tmp_path / "toy", run)
    (tmp_path / "toy").rename(run / "toy")
    with pytest.raises(UsageError, match="toy"):
        train(run / "toy", run, "--overwrite")
    assert verify_store(run / "toy").findings == []
    train(run / "toy", run, "--resume")


def test_training_replaces_its_run_and_refuses_anything_else_in_it_by_name(tmp_path: Path) -> None:
    featurize(tmp_path)
    run = tmp_path / "run"
    train(tmp_path / "toy", run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        train(tmp_path / "toy", run, "--overwrite")
    assert (run / "checkpoints/step-00000002/complete.json").is_file()
    (run / "notes.txt").unlink()
    train(tmp_path / "toy", run, "--overwrite", "--set", "train.seed=1")
    assert json.loads((run / "run.json").read_text())["train"]["seed"] == 1


def test_an_output_inside_an_input_is_refused_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurize(tmp_path)
    store = tmp_path / "toy"
    (tmp_path / "link").symlink_to(store)
    before = sorted(path.name for path in store.iterdir())
    monkeypatch.chdir(store / "commits")
    for out in (store / "run", tmp_path / "link" / "run", Path("../run"), Path("run")):
        with pytest.raises(UsageError, match="which is read"):
            train(store, out)
        with pytest.raises(UsageError, match="which is read"):
            vla("convert", store, out, "--format", "h5")
        with pytest.raises(UsageError, match="which is read"):
            vla("fit-fast", "--store", store, "--out", out, "--set", "horizon=2")
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in store.iterdir()) == before


def test_a_run_is_not_resumed_on_a_store_of_other_features_under_the_same_fingerprint(tmp_path: Path) -> None:
    featurize(tmp_path)
    run, store = tmp_path / "run", open_store(tmp_path / "toy")
    train(store.root, run)
    with open_writer(tmp_path / "other", store.manifest, store.episodes) as writer:
        for unit in writer.pending():
            buffer = writer.begin(unit)
            for name in buffer.steps:
                buffer.steps[name][: len(buffer.rows)] = store.steps(name)[buffer.rows.start : buffer.rows.stop]
            rows = store.read("grid", np.asarray(buffer.rows)).astype(np.float32)
            buffer.put(buffer.rows.start, {"grid": rows + 1})
            writer.commit(buffer)
    vla("convert", store.root, tmp_path / "same", "--format", "h5")
    store.root.rename(tmp_path / "old")
    (tmp_path / "other").rename(store.root)
    with pytest.raises(UsageError, match=r"artefact\.stores"):
        train(store.root, run, "--resume")
    train(tmp_path / "same", run, "--resume")  # another form of the same features
    begun = json.loads((run / "run.json").read_text())
    del begun["artefact"]["stores"][0]["content"]  # as earlier versions began runs
    (run / "run.json").write_text(json.dumps(begun))
    train(tmp_path / "same", run, "--resume")


def test_a_store_replaced_while_a_head_trains_on_it_ends_the_run_naming_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla.stores.reader.MAX_OPEN_FILES", 2)
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", SOURCE.replace("[6,7]", "[30,31]"))
    featurize(tmp_path, "--set", "store.unit_mb=0.001")
    featurize(tmp_path / "new", "--set", "store.unit_mb=0.001", "--set", "options.seed=9")
    assert open_store(tmp_path / "toy").manifest.units > 2

    def swap(step: int, total: int, metrics: object) -> None:
        if step == 100:  # after the first epoch: every row was verified
            (tmp_path / "toy").rename(tmp_path / "old")
            (tmp_path / "new/toy").rename(tmp_path / "toy")

    store = tmp_path / "toy"
    settings = [
        *TRAIN,
        "train.steps=200",
        "train.checkpoint_every=1000",
        "data.validation=0",
        f'data.stores=["{store}"]',
    ]
    config = HeadTrainConfig.from_sources(None, settings, head="mlp")
    with pytest.raises(StoreError, match="toy"):
        train_head(config, tmp_path / "run", progress=swap)


def test_a_run_is_not_replaced_by_one_that_starts_from_it(tmp_path: Path) -> None:
    featurize(tmp_path)
    train(tmp_path / "toy", tmp_path / "run")
    with pytest.raises(UsageError, match="which is read"):
        train(tmp_path / "toy", tmp_path / "run", "--from", tmp_path / "run", "--overwrite")
    assert (tmp_path / "run/checkpoints/step-00000002/complete.json").is_file()


def test_featurizing_refuses_foreign_content_before_the_backbone_runs(tmp_path: Path) -> None:
    featurize(tmp_path)
    train(tmp_path / "toy", tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "toy" / "run")
    with pytest.raises(UsageError, match="run"):
        featurize(tmp_path, "--overwrite")
    assert (tmp_path / "toy/run/run.json").is_file()
    assert verify_store(tmp_path / "toy").findings == []


def test_an_export_replaces_no_file_of_a_run(tmp_path: Path) -> None:
    featurize(tmp_path)
    train(tmp_path / "toy", tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(UsageError, match=r"run\.json"):
        vla("export", tmp_path / "run", "--out", tmp_path / "run/run.pt2", "--overwrite")
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_store_is_not_written_into_its_source(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[2] / "examples" / "push", tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for name in ("set", "link"):
        with pytest.raises(UsageError, match="set"):
            vla("featurize", "--backbone", "toy", "--source", tmp_path / "set", "--out", tmp_path / name / "data")
    assert not (tmp_path / "set/data/toy").exists()


def test_pruning_deletes_checkpoints_alone_and_walks_no_link(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (2, 4, 6, 8):
        folder = run / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
    (run / "checkpoints/step-00000002/notes.txt").write_text("mine")
    (run / "checkpoints/step-00000004").rename(other)
    (run / "checkpoints/step-00000004").symlink_to(other)
    prune(run, 1, 8, None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000008"]
    assert (run / "checkpoints/step-00000002/notes.txt").read_text() == "mine"
    assert (other / "complete.json").is_file()


def test_a_linked_folder_of_checkpoints_is_refused(tmp_path: Path) -> None:
    featurize(tmp_path)
    for name in ("run", "other"):
        train(tmp_path / "toy", tmp_path / name)
    for path in (tmp_path / "run/checkpoints/step-00000002").iterdir():
        path.unlink()
    (tmp_path / "run/checkpoints/step-00000002").rmdir()
    (tmp_path / "run/checkpoints").rmdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "other/checkpoints")
    with pytest.raises(UsageError, match="checkpoints"):
        train(tmp_path / "toy", tmp_path / "run", "--resume")
    train(tmp_path / "toy", tmp_path / "run", "--overwrite")
    assert (tmp_path / "other/checkpoints/step-00000002/complete.json").is_file()


def test_a_data_set_with_foreign_content_is_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from vla.rollout.lerobot_writer import refuse_existing

    (tmp_path / "set/meta").mkdir(parents=True)
    (tmp_path / "set/meta/info.json").write_text("{}")
    refuse_existing(tmp_path / "set", overwrite=True)
    (tmp_path / "set/demo.hdf5").write_text("mine")
    with pytest.raises(UsageError, match=r"demo\.hdf5"):
        refuse_existing(tmp_path / "set", overwrite=True)


def test_a_video_is_not_written_through_a_link(tmp_path: Path) -> None:
    from vla.stores.filesystem import refuse_file

    (tmp_path / "v.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    with pytest.raises(UsageError, match=r"v\.mp4"):
        refuse_file(tmp_path / "v.mp4", overwrite=True)
