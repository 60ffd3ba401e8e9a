"""`make parity`: every test that needs a checkout belongs to a project, and the page shows what the last run gave."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = re.compile(r"VLA_\w+_CHECKOUT")


@pytest.fixture(scope="module")
def parity() -> Iterator[Any]:
    """The module `run_parity`, which is a script and no part of a package."""
    spec = importlib.util.spec_from_file_location("vla_run_parity", Path(__file__).with_name("run_parity.py"))
    assert spec
    assert spec.loader
    module = sys.modules["vla_run_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["vla_run_parity"]


def test_every_test_that_reads_a_checkout_is_run_for_its_project(parity: Any) -> None:
    read = {
        (variable, file.relative_to(ROOT).as_posix())
        for file in (ROOT / "tests").rglob("test_*.py")
        if file != Path(__file__)
        for variable in VARIABLE.findall(file.read_text(encoding="utf-8"))
    }
    run = {(project.variable, test) for project in parity.PROJECTS if project.url for test in project.tests}
    assert read == run


def test_every_parity_test_is_run_by_one_project_or_another(parity: Any) -> None:
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests/parity").glob("test_*_parity.py")}
    assert files <= {test for project in parity.PROJECTS for test in project.tests}


def test_the_page_shows_the_record(parity: Any) -> None:
    record = json.loads(parity.RECORD.read_text(encoding="utf-8"))
    assert parity.PAGE.read_text(encoding="utf-8") == parity.render(record)
    assert record.keys() == {project.name for project in parity.PROJECTS}


def test_outcomes_are_counted_and_failures_named(parity: Any, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "import os, pytest\n"
        "def test_well(record_property): record_property('cosine', os.environ['VLA_X_CHECKOUT'])\n"
        "def test_badly(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_unbegun(broken): pass\n"
        "def test_left_out(): pytest.skip('no loss')\n"
        "def test_other(): assert False\n"
    )
    made = parity.run_tests((str(tmp_path / "test_theirs.py"),), "not other", {"VLA_X_CHECKOUT": "0.5"})
    assert (made["passed"], made["failed"], made["skipped"]) == (1, ["test_badly", "test_unbegun"], 1)
    assert made["measured"] == {"cosine": "0.5"}
    assert "no loss" in made["skip_reasons"][0]


def test_a_project_that_cannot_run_keeps_its_last_outcome_and_says_why(
    parity: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    croco = next(project for project in parity.PROJECTS if project.name == "croco")
    record: dict[str, Any] = {"croco": {"passed": 49, "commit": "d7de", "failed": []}}
    assert parity.update(record, tmp_path, [croco])
    assert record["croco"] == {"passed": 49, "commit": "d7de", "failed": [], "not_run": "no folder croco"}
    assert "git clone https://github.com/naver/croco" in capsys.readouterr().err
    monkeypatch.setattr(parity, "run_project", lambda *_: {"passed": 1, "commit": "other", "failed": ["test_a"]})
    (tmp_path / "croco").mkdir()
    assert not parity.update(record, tmp_path, [croco])
    assert record["croco"] == {"passed": 1, "commit": "other", "failed": ["test_a"]}
    assert croco.commit in capsys.readouterr().err


def test_a_folder_that_is_missing_is_refused_and_the_record_stays(
    parity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "update", lambda *arguments: pytest.fail("tests were run"))
    monkeypatch.setattr(sys, "argv", ["run_parity.py", str(tmp_path / "no such folder")])
    with pytest.raises(SystemExit) as caught:
        parity.main()
    assert caught.value.code == 2
