"""Stores and a head that each schema version wrote, kept in git: today's code opens, verifies and trains on them.

Where one of these fails, stores that users have would fail too: mend the code, never the golden files (make.py).
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vla.cli import app
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.heads.train import HeadTrainConfig, train_head
from vla.stores.errors import UsageError
from vla.stores.manifest import SCHEMA_VERSION
from vla.stores.store import Store, open_store
from vla.stores.verify import verify_store
from vla.training.storage import as_tensor

HERE = Path(__file__).parent
SCHEMAS = sorted(HERE.glob("schema-*"))
STORES = [path for schema in SCHEMAS for path in sorted(schema.iterdir()) if (path / "zarr.json").is_file()]
TOLERANCE = 1e-4
"""Of actions in -0.8..0.8. Sums of some hundred float32 terms in another order, by another BLAS, differ by some 1e-6; a
wrong statistic or weight by more than 1e-2."""


def _by_name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """The script beside this file."""
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=STORES, ids=_by_name)
def golden(request: pytest.FixtureRequest) -> Path:
    """Each golden store of each schema version."""
    path: Path = request.param
    return path


def expected_of(schema: Path) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads((schema / "expected.json").read_text())
    return expected


def floats(store: Store) -> np.ndarray[Any, Any]:
    """Return the feature of a golden store as numbers, float32 [rows, ...]."""
    rows = np.arange(store.manifest.rows)
    values = as_tensor(store.read("grid", rows), store.feature_info("grid").dtype).float().numpy()
    scales = store.scales("grid")
    if scales is not None:
        values = values * scales[rows // store.manifest.unit_rows].reshape(len(rows), 1, 1, 1, -1)
    return values


def test_this_schema_version_has_its_golden_folder_with_one_store_of_each_kind(maker: ModuleType) -> None:
    assert HERE / f"schema-{SCHEMA_VERSION}" in SCHEMAS
    for schema in SCHEMAS:
        kept = {path.name for path in schema.iterdir()}
        assert kept == {*maker.STORES, "head", "expected.json"}
    kinds = {name: open_store(HERE / f"schema-{SCHEMA_VERSION}" / name).manifest for name in maker.STORES}
    assert kinds["h5"].format == "h5"
    assert kinds["archive"].compression == "zstd"
    assert kinds["int8"].features["grid"].dtype == "int8"
    assert (kinds["zarr"].format, kinds["zarr"].compression) == ("zarr", "none")
    assert min(manifest.units for manifest in kinds.values()) > 1


@pytest.mark.parametrize("path", [*STORES, *(schema / "head" for schema in SCHEMAS)], ids=_by_name)
def test_golden_files_are_small_and_name_no_machine(path: Path) -> None:
    contents = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert sum(map(len, contents.values())) < 200_000
    for file, content in contents.items():
        assert b"/home/" not in content, file
        assert str(HERE.parents[1]).encode() not in content, file


def test_git_keeps_every_golden_file_as_it_is() -> None:
    """Neither ignored (a store's folder has names that build tools use too) nor converted at a checkout."""
    files = [str(file.relative_to(HERE)) for schema in SCHEMAS for file in schema.rglob("*") if file.is_file()]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, input="\n".join(files), capture_output=True, text=True, check=False)

    if shutil.which("git") is None or git("rev-parse").returncode:
        pytest.skip("not in a git checkout")
    ignored = git("check-ignore", "--stdin", "--no-index")
    assert (ignored.stdout, ignored.returncode) == ("", 1)
    attributes = git("check-attr", "text", "--stdin").stdout.splitlines()
    assert len(attributes) == len(files)
    assert all(line.endswith("text: unset") for line in attributes)


def test_a_golden_store_is_sound(golden: Path) -> None:
    report = verify_store(golden)
    assert report.findings == []
    assert report.committed == report.units == 3


def test_a_golden_store_reads_as_it_did_when_it_was_written(golden: Path, maker: ModuleType) -> None:
    assert maker.digests_of(open_store(golden)) == expected_of(golden.parent)["stores"][golden.name]


def test_golden_stores_of_one_schema_hold_the_same_numbers() -> None:
    for schema in SCHEMAS:
        plain = floats(open_store(schema / "zarr"))
        assert np.abs(plain).max() > 0.1
        for name in ("h5", "archive"):
            np.testing.assert_array_equal(floats(open_store(schema / name)), plain)
        store = open_store(schema / "int8")
        scales = store.scales("grid")
        assert scales is not None
        # Half a step of the largest scale, and float16's own rounding of values below 2.
        assert np.abs(floats(store) - plain).max() <= scales.max() / 2 + 2**-11


def test_a_head_trains_two_steps_on_a_golden_store(golden: Path, maker: ModuleType, tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in maker.SMALL.items()]
    stores = json.dumps([str(golden)])
    config = HeadTrainConfig.from_sources(None, [*settings, "train.steps=2", f"data.stores={stores}"], head="mlp")
    report = train_head(config, tmp_path / "run")
    assert report.step == 2
    assert np.isfinite(report.metrics["loss"])


def test_the_command_that_made_a_golden_store_finds_it_complete(
    golden: Path, maker: ModuleType, tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    """A fingerprint that changed without a new schema version would refuse --resume on every store that users have."""
    if golden.parent.name != f"schema-{SCHEMA_VERSION}":
        pytest.skip("stores of older schema versions are read, not written")
    shutil.copytree(golden, tmp_path / "s")
    form = {"h5": ["store.format=h5"], "int8": ["store.dtype=int8"], "archive": ["store.compression=zstd"]}
    told = ["options.grid=2", "store.unit_rows=9", *form.get(golden.name, [])]
    job = prepare(FeaturizeConfig.from_sources(None, told, backbone="toy", source=maker.SOURCE))
    assert run(job, tmp_path / "s", resume=True).units == 0
    assert files_of(tmp_path / "s") == files_of(golden)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.name)
def test_a_golden_head_predicts_the_actions_that_it_did(schema: Path, maker: ModuleType) -> None:
    wanted = np.asarray(expected_of(schema)["predicted"], np.float32)
    assert wanted.std(axis=0).min() > 0.01  # the observation matters
    np.testing.assert_allclose(maker.predictions_of(schema / "head", schema / "zarr"), wanted, rtol=0, atol=TOLERANCE)


def test_golden_files_are_never_made_again(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"schema-{SCHEMA_VERSION}").mkdir()
    commands: list[list[str]] = []
    with pytest.raises(UsageError, match=f"schema-{SCHEMA_VERSION} exists; expected a new SCHEMA_VERSION"):
        maker.make(tmp_path, commands.append)
    assert commands == []
    assert list((tmp_path / f"schema-{SCHEMA_VERSION}").iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["make.py"])  # without a folder: the one beside the script
    with pytest.raises(SystemExit, match="exists; expected a new SCHEMA_VERSION"):  # a text: one line, exit code 1
        runpy.run_path(str(HERE / "make.py"), run_name="__main__")


def test_the_script_still_makes_what_is_kept(
    maker: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = maker.make(tmp_path, lambda arguments: app(arguments, standalone_mode=False))
    capsys.readouterr()
    kept = HERE / made.name
    assert {p.relative_to(made) for p in made.rglob("*")} == {p.relative_to(kept) for p in kept.rglob("*")}
    for name in maker.STORES:
        assert verify_store(made / name).findings == []
        found, wanted = open_store(made / name), open_store(kept / name)
        assert found.manifest.fingerprint == wanted.manifest.fingerprint
        np.testing.assert_allclose(floats(found), floats(wanted), rtol=0, atol=0.02)
