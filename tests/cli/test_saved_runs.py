"""A saved run, and a store, replay and resume by themselves: what was typed need not be typed again."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.cli import app
from vla.featurize.backbones.toy import Toy
from vla.stores.errors import StoreError, UsageError
from vla.terminal.run_app import run_app
from vla.training.checkpoint import newest_complete
from vla.training.state import TrainState

pytestmark = pytest.mark.usefixtures("default_signals")

SOURCE = "synthetic:episodes=4,length=[9,9],cameras=1"
SETTINGS = ["model.encoder.components=4", "model.hidden=8", "model.horizon=4", "model.encoder.dim=8"]
SETTINGS += ["train.batch_size=2", "train.steps=6", "train.log_every=2", "train.lr=0.003", "data.validation=0"]

Files = Callable[[Path], dict[str, bytes]]


def vla(*words: object) -> int:
    return run_app(app, [str(word) for word in words])


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, call: int) -> None:
    inner, calls = getattr(cls, method), []

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return inner(self, *arguments)

    monkeypatch.setattr(cls, method, counted)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    options = sets("store.unit_rows=6", "batch_size=2", "options.channels=4")
    assert vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", out, *options) == 0
    return out / "toy"


@pytest.fixture(scope="module")
def whole(store: Path) -> Path:
    run = store.parent / "whole"
    assert vla("train-head", "mlp", "--store", store, "--out", run, *sets(*SETTINGS)) == 0
    return run


@pytest.mark.parametrize("file", ["run.json", ""])
def test_a_saved_run_is_a_configuration_and_gives_the_same_checkpoint(
    whole: Path, tmp_path: Path, file: str, files_of: Files
) -> None:
    assert vla("train-head", "--config", whole / file, "--out", tmp_path / "again") == 0
    assert files_of(newest_complete(tmp_path / "again")) == files_of(newest_complete(whole))
    replayed, saved = (json.loads((run / "run.json").read_bytes()) for run in (tmp_path / "again", whole))
    assert replayed == saved


def test_a_flag_beside_a_saved_run_counts_more(whole: Path, tmp_path: Path) -> None:
    assert vla("train-head", "--config", whole, "--out", tmp_path / "again", "--steps", 3) == 0
    assert newest_complete(tmp_path / "again").name == "step-00000003"


@pytest.mark.parametrize("head", [[], ["mlp"]])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_resumes_by_its_folder_alone(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: list[str],
    schedule: str,
    files_of: Files,
) -> None:
    command = ["train-head", "mlp", "--store", store, *sets(*SETTINGS, f"train.schedule={schedule}")]
    assert vla(*command, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, TrainState, "update", 3)
        assert vla(*command, "--out", tmp_path / "run") == 143
    assert vla("train-head", *head, "--resume", "--out", tmp_path / "run") == 0
    assert files_of(newest_complete(tmp_path / "run")) == files_of(newest_complete(tmp_path / "whole"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "whole")]
    assert logs == [3, 3]


def test_a_constant_run_is_given_more_steps_by_its_folder_and_one_flag(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert vla("train-head", "mlp", "--store", store, "--out", run, *sets(*SETTINGS, "train.schedule=constant")) == 0
    assert vla("train-head", "--resume", "--out", run, "--steps", 9) == 0
    assert newest_complete(run).name == "step-00000009"


def test_a_head_or_a_setting_that_is_not_the_saved_one_is_refused(whole: Path) -> None:
    with pytest.raises(UsageError, match="lr"):
        vla("train-head", "--resume", "--out", whole, "--set", "train.lr=1")
    with pytest.raises(UsageError, match="mlp"):
        vla("train-head", "fm", "--resume", "--out", whole)


def test_a_run_that_an_earlier_version_wrote_is_refused_with_what_to_type(whole: Path, tmp_path: Path) -> None:
    saved = json.loads((whole / "run.json").read_bytes())
    del saved["settings"]
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"settings"):
        vla("train-head", "--config", tmp_path, "--out", tmp_path / "again")
    with pytest.raises(UsageError, match=r"run\.json"):
        vla("train-head", "--resume", "--out", tmp_path / "nothing")


@pytest.mark.parametrize("place", ["folder of the store", "folder and name"])
def test_a_store_resumes_by_its_folder_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, files_of: Files
) -> None:
    options = sets("store.unit_rows=6", "batch_size=2", "options.channels=4")
    with monkeypatch.context() as patched:
        interrupt_at(patched, Toy, "encode", 12)
        code = vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, "--name", "x", *options)
        assert code == 143
    where = ["--out", tmp_path / "x"] if place == "folder of the store" else ["--out", tmp_path, "--name", "x"]
    assert vla("featurize", "--resume", *where) == 0
    assert files_of(tmp_path / "x") == files_of(store)


@pytest.mark.parametrize("file", ["zarr.json", ""])
def test_a_store_is_a_configuration_and_gives_the_same_bytes(
    store: Path, tmp_path: Path, file: str, files_of: Files
) -> None:
    assert vla("featurize", "--config", store / file, "--out", tmp_path) == 0
    assert files_of(tmp_path / "toy") == files_of(store)


@pytest.mark.parametrize("file", ["run.json", ""])
def test_a_saved_run_with_the_backbones_in_the_loop_is_replayed_with_them(
    store: Path, tmp_path: Path, file: str, files_of: Files
) -> None:
    saved, again = tmp_path / "saved", tmp_path / "again"
    assert vla("train-head", "mlp", "--store", store, "--online", "--out", saved, *sets(*SETTINGS)) == 0
    assert vla("train-head", "--config", saved / file, "--out", again) == 0
    assert files_of(newest_complete(again)) == files_of(newest_complete(saved))


def test_a_saved_run_replays_and_resumes_from_another_working_directory(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(store.parent)
    assert vla("train-head", "mlp", "--store", store.name, "--out", tmp_path / "run", *sets(*SETTINGS)) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path(store.name).mkdir()  # what is here counts more than where the run began
    with pytest.raises(StoreError, match=store.name):
        vla("train-head", "--config", "../run", "--out", "../again")
    Path(store.name).rmdir()
    assert vla("train-head", "--resume", "--out", "../run") == 0
    assert vla("train-head", "--config", "../run", "--out", "../again") == 0
    saved, again = (newest_complete(tmp_path / run) / "model.safetensors" for run in ("run", "again"))
    assert again.read_bytes() == saved.read_bytes()


def test_a_saved_run_with_the_backbone_in_the_loop_replays_with_the_backbone_in_the_loop(
    store: Path, tmp_path: Path
) -> None:
    settings = sets(*SETTINGS, "online.batch_size=3")
    assert vla("train-head", "mlp", "--store", store, "--online", "--out", tmp_path / "live", *settings) == 0
    assert vla("train-head", "--config", tmp_path / "live", "--out", tmp_path / "again") == 0
    replayed, saved = (json.loads((tmp_path / name / "run.json").read_bytes()) for name in ("again", "live"))
    assert replayed == saved
    assert replayed["settings"]["online"]["batch_size"] == 3


def test_a_run_from_cached_features_does_not_go_on_with_the_backbone_in_the_loop(whole: Path) -> None:
    with pytest.raises(UsageError, match="cached"):
        vla("train-head", "--resume", "--online", "--out", whole)


@pytest.mark.parametrize("saved", ["run", "store"])
def test_a_configuration_that_extends_a_saved_one_changes_its_settings(
    whole: Path, store: Path, tmp_path: Path, saved: str
) -> None:
    file = (whole if saved == "run" else store).parent / "more.toml"  # a file extends those of its own folder
    if saved == "run":
        file.write_text(f'extends = "{whole.name}/run.json"\n[train]\nsteps = 4\n')
        assert vla("train-head", "--config", file, "--out", tmp_path / "again") == 0
        assert newest_complete(tmp_path / "again").name == "step-00000004"
    else:
        file.write_text(f'extends = "{store.name}/zarr.json"\n[options]\nchannels = 5\n')
        assert vla("featurize", "--config", file, "--out", tmp_path) == 0
        assert json.loads((tmp_path / "toy/frames/grid/zarr.json").read_bytes())["shape"][-1] == 5


@pytest.mark.parametrize(
    ("command", "saved", "key"),
    [
        (["featurize"], "run", "train"),
        (["train-head"], "store", "attributes"),
        (["distill", "--dry-run"], "run", "head"),
        (["fit-fast", "--store", "x"], "run", "train"),
        (["action-dims"], "run", "train"),
    ],
)
def test_what_another_command_saved_is_refused_by_its_file(
    command: list[str], saved: str, key: str, whole: Path, store: Path, tmp_path: Path
) -> None:
    place = whole / "run.json" if saved == "run" else store / "zarr.json"
    with pytest.raises(UsageError, match=str(place)) as caught:
        vla(*command, "--config", place.parent, *(["--out", tmp_path / "x"] if "action-dims" not in command else []))
    assert key in str(caught.value)


@pytest.mark.parametrize("command", ["train-head", "distill", "featurize"])
def test_resuming_where_nothing_was_begun_names_the_folder_and_what_lies_in_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some/one").mkdir(parents=True)
    for name in ("run.json", "zarr.json"):
        (tmp_path / "some/one" / name).write_text("{}")
    for out, advice in ((tmp_path / "some", "--out .*some/one$"), (tmp_path / "nothing", "")):
        with pytest.raises(UsageError, match=f"{out}.*{advice}"):
            vla(command, "--resume", "--out", out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--out|stores"):
        vla(command, "--resume")
