"""The command line: exit codes, one line for an error, JSON alone on stdout, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from vla.cli import main

VLA = [sys.executable, "-c", "from vla.cli import main; main()"]
SOURCE = "synthetic:episodes=4,length=[6,9],cameras=1"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Done:
    """What a command wrote."""

    stdout: str
    stderr: str


def vla(*arguments: object, code: int = 0) -> Done:
    """Run a command in this process and check its exit code; an error that is no `VlaError` is raised."""
    out, err = io.StringIO(), io.StringIO()
    words = ["vla", *map(str, arguments)]
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),  # the variable is read once, at import
        mock.patch.object(sys, "argv", words),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == code, err.getvalue() + out.getvalue()
    return Done(out.getvalue(), err.getvalue())


def vla_process(*arguments: object, code: int = 0) -> Done:
    """Run a command in a process of its own: what a library prints below Python, and a traceback, show too."""
    command = [*VLA, *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, env=environment, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return Done(done.stdout, done.stderr)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "stores"
    vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", out)
    return out / "toy"


@pytest.fixture(scope="module")
def run(store: Path) -> Path:
    out = store.parent / "run"
    settings = ["model.encoder.components=8", "model.hidden=32", "model.encoder.dim=32", "train.batch_size=4"]
    vla("train-head", "mlp", "--store", store, "--out", out, "--steps", 3, *[x for s in settings for x in ("--set", s)])
    return out


def test_featurize_train_evaluate_end_to_end_with_json_alone_on_stdout(store: Path, run: Path) -> None:
    facts = json.loads(vla("inspect", store, "--json").stdout)
    assert facts["complete"]
    assert facts["episodes"] == "4 usable of 4"
    assert json.loads(vla("verify", store, "--json").stdout)["findings"] == []
    error = json.loads(vla_process("evaluate", run, "--json").stdout)
    assert len(error["per_dimension"]["mae"]) == 4
    assert error["step"] == 3


def test_augment_is_short_for_its_setting_and_shows_in_the_plan(tmp_path: Path) -> None:
    begin = ("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, "--dry-run", "--json")
    short = json.loads(vla(*begin, "--augment", 2).stdout)
    assert list(short["features"]) == ["grid", "grid.aug1", "grid.aug2"]
    spelt_out = json.loads(vla(*begin, "--set", "augment.copies=2").stdout)
    timed = {"frames_per_s", "hours"}
    assert {k: v for k, v in short.items() if k not in timed} == {k: v for k, v in spelt_out.items() if k not in timed}
    assert min(short[name] for name in timed) > 0
    plain = json.loads(vla(*begin).stdout)
    assert 2.5 * plain["bytes"] < short["bytes"] < 3 * plain["bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["featurize", "--backbone", "toy", "--source", SOURCE, "--augment", "-1"], 2, "augment.copies = -1"),
        (["featurize", "--backbone", "tyo", "--source", SOURCE], 2, "did you mean 'toy'"),
        (["featurize", "--backbone", "toy", "--source", "/nonexistent"], 3, "does not exist"),
        (
            ["featurize", "--backbone", "toy", "--source", SOURCE, "--set", "optoins.grid=2"],
            2,
            "did you mean 'options'",
        ),
        (["featurize", "--backbone", "toy", "--source", SOURCE, "--set", "options.gird=2"], 2, "did you mean 'grid'"),
        (["featurize", "--backbone", "toy", "--source", SOURCE, "--map", "action"], 2, "OURS=THEIRS"),
        (["featurize", "--backbone", "dino-siglip", "--source", SOURCE], 4, "--weights"),
        (["train-head", "diffusion", "--store", "x"], 2, "one of dp, fm"),
        (["train-head", "dp", "--store", "/nonexistent"], 3, "does not exist"),
        (["fit-fast", "--store", "/nonexistent", "--out", "/nonexistent/fast"], 3, "does not exist"),
        (["fit-fast", "--store", "x", "--out", "/nonexistent", "--set", "horzon=4"], 2, "did you mean 'horizon'"),
        (["inspect", "/"], 3, "no store"),
        (["verify", "/nonexistent"], 3, "does not exist"),
        (["evaluate", "/nonexistent"], 3, ""),
        (["rollout", "/nonexistent", "--env", "metaworld:push-v3"], 3, ""),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_the_right_exit_code(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "featurize" else []
    done = vla(*arguments, *out, code=code)
    assert says in done.stderr
    assert done.stdout == ""
    if code in (3, 4):
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_existing_store_is_refused_naming_the_flags(store: Path) -> None:
    done = vla_process("featurize", "--backbone", "toy", "--source", SOURCE, "--out", store.parent, code=2)
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr


def test_a_store_of_another_fingerprint_is_refused_by_field(store: Path) -> None:
    options = ["--resume", "--set", "options.seed=9"]
    done = vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", store.parent, *options, code=3)
    assert "backbone.seed: 0 here, 9 wanted" in done.stderr
    options[0] = "--dry-run"  # its plan would count units that were made otherwise as made
    done = vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", store.parent, *options, code=3)
    assert "backbone.seed: 0 here, 9 wanted" in done.stderr
    again = ("featurize", "--backbone", "toy", "--source", SOURCE, "--out", store.parent, "--dry-run", "--json")
    assert json.loads(vla(*again).stdout)["pending_units"] == 0
    assert json.loads(vla(*again, "--overwrite", "--set", "options.seed=9").stdout)["pending_units"] > 0


def test_an_existing_run_is_refused_naming_the_flags(store: Path, run: Path) -> None:
    done = vla("train-head", "mlp", "--store", store, "--out", run, code=2)
    assert "--resume" in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "stores"
    done = vla_process("featurize", "--backbone", "toy", "--source", SOURCE, "--out", out, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["episodes"] == 4
    assert plan["units"] >= 1
    assert not out.exists()


def test_features_that_name_nothing_are_refused(store: Path, tmp_path: Path) -> None:
    """They were all of the store's."""
    done = vla("train-head", "mlp", "--store", str(store), "--features", "", "--out", str(tmp_path / "run"), code=2)
    assert "no store has feature ''; expected one of" in done.stderr


def test_verify_of_a_damaged_store_exits_with_1_and_names_the_file(store: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "toy"
    shutil.copytree(store, copy)
    (shard,) = (copy / "frames" / "grid").glob("c.0*")
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    done = vla("verify", copy, "--json", code=1)
    assert str(shard) in json.loads(done.stdout)["findings"][0]


def test_a_repaired_store_resumes_to_the_same_bytes(
    store: Path, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    import shutil

    copy = tmp_path / "toy"
    shutil.copytree(store, copy)
    (shard,) = (copy / "frames" / "grid").glob("c.0*")
    shard.write_bytes(shard.read_bytes()[:-1])
    said = vla("verify", copy, "--repair").stderr
    assert str(shard) in said
    assert f"removed {shard.relative_to(copy)}" in said
    assert "dropped units 0; free of damage; units 0 are missing" in said
    report = json.loads(vla("verify", copy, "--repair", "--json").stdout)
    assert (report["dropped"], report["pending"]) == ([], [0])
    vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, "--resume")
    assert files_of(copy) == files_of(store)


def test_a_store_named_like_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text("")
    done = vla("featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, code=2)
    assert "shadow" in done.stderr


def test_an_episode_shorter_than_the_window_trains(tmp_path: Path) -> None:
    source = "synthetic:episodes=3,length=[1,2],cameras=1"
    vla("featurize", "--backbone", "toy", "--source", source, "--out", tmp_path)
    small = [
        "model.encoder.components=4",
        "model.hidden=32",
        "train.batch_size=2",
        "model.horizon=8",
        "data.validation=0",
    ]
    sets = [x for s in small for x in ("--set", s)]
    vla("train-head", "mlp", "--store", tmp_path / "toy", "--out", tmp_path / "run", "--steps", 2, *sets)


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_exits_with_130_and_the_run_resumes(tmp_path: Path) -> None:
    options = ["--set", "store.unit_rows=4", "--set", "batch_size=2"]
    command = ["featurize", "--backbone", "toy", "--source", SOURCE, "--out", tmp_path, *options]
    slowly = [*VLA, *map(str, command), "--set", "options.delay_ms=400"]  # half a minute or more
    process = subprocess.Popen(slowly, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    deadline = time.monotonic() + 40
    while not list(tmp_path.glob("toy/commits/unit-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    vla(*command, "--resume")
    assert json.loads(vla("inspect", tmp_path / "toy", "--json").stdout)["complete"]


def test_inspect_of_raw_demonstrations_lists_findings_with_exit_code_1(tmp_path: Path) -> None:
    sound = json.loads(vla("inspect", "--source", SOURCE, "--json", "--norm-stats", tmp_path / "raw.json").stdout)
    assert (sound["episodes"], sound["findings"]) == (4, [])
    (tmp_path / "demo.hdf5").write_bytes(b"not HDF5")
    done = vla("inspect", "--source", tmp_path / "demo.hdf5", "--json", code=1)
    assert [finding["check"] for finding in json.loads(done.stdout)["findings"]] == ["layout"]
    assert "layout: " in vla("inspect", "--source", tmp_path / "demo.hdf5", code=1).stderr
    vla("inspect", code=2)


def test_norm_stats_of_a_store_are_those_of_its_source(store: Path, tmp_path: Path) -> None:
    vla("inspect", store, "--json", "--norm-stats", tmp_path / "store.json")
    vla("inspect", "--source", SOURCE, "--json", "--norm-stats", tmp_path / "raw.json")
    assert json.loads((tmp_path / "store.json").read_text()) == json.loads((tmp_path / "raw.json").read_text())
    vla("inspect", store, "--norm-stats", tmp_path / "raw.json", code=2)
