from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.featurize.sources.lerobot import LeRobotSource
from vla.featurize.sources.registry import SOURCES, Entry, common_options, open_source
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.errors import SourceError, UsageError

Write = Callable[..., Path]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_names_a_class_with_the_methods_of_a_source(kind: str) -> None:
    module, _, name = SOURCES[kind].target.partition(":")
    made = getattr(importlib.import_module(module), name)
    assert all(callable(getattr(made, method)) for method in ("index", "digest", "steps", "frames"))


def test_a_lerobot_folder_is_recognised(version: str, tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, version=version)
    for spec in (root, str(root)):
        source = open_source(spec)
        assert isinstance(source, LeRobotSource)
        assert len(source.index().episodes) == 3


def test_options_reach_the_source(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path, lengths=(4, 0, 5), names={"action": "actions"})
    index = open_source(root, map={"action": "actions"}, cameras=["front"], skip_bad=True).index()
    assert (index.mapping["action"], list(index.skipped)) == ("actions", ["episode_000001"])


def test_common_options_that_are_off_are_not_passed_to_a_source_without_them() -> None:
    source = open_source("synthetic", cameras=None, **common_options(map={}, skip_bad=False, pad_actions=False))
    assert source.digest() == SyntheticSource().digest()
    assert common_options(map={"a": "b"}, skip_bad=True) == {"map": {"a": "b"}, "skip_bad": True}


@pytest.mark.parametrize("empty", [{}, [], (), "", 0])
def test_an_empty_value_of_an_option_is_passed_to_the_source(empty: Any) -> None:
    with pytest.raises(UsageError, match="no option 'nothing'"):
        open_source("synthetic", nothing=empty)
    with pytest.raises(UsageError, match="episodes"):
        open_source("synthetic", episodes=empty)


def test_synthetic_options_are_read_from_the_spec() -> None:
    source = open_source("synthetic:episodes=8,length=[3,5],seed=0")
    assert source.digest() == SyntheticSource(episodes=8, length=(3, 5), seed=0).digest()
    assert open_source("synthetic:episodes=8", seed=3).digest() == SyntheticSource(episodes=8, seed=3).digest()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("synthetic:episdes=8", "no option 'episdes', did you mean 'episodes'"),
        ("synthetic:episodes", "expected KEY=VALUE"),
        ("synthetic:episodes=many", "episodes = 'many'"),
        ("synthetic:episodes=0", "episodes = 0"),
        ("synthetic:length=[5,3]", "least and the greatest"),
        ("synthetic:cameras=0", "cameras = 0"),
        ("foo:/x", "no kind of source 'foo'; expected KIND:PATH with one of lerobot, "),
        ("robomimik:demo.hdf5", "no kind of source 'robomimik', did you mean 'robomimic'"),
        ("syntetic:episodes=3", "no kind of source 'syntetic', did you mean 'synthetic'"),
    ],
)
def test_wrong_options_are_usage_errors(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(spec)


def test_an_option_that_a_source_has_not_is_named(tmp_path: Path, write_lerobot: Write) -> None:
    with pytest.raises(UsageError, match="a synthetic source has no option 'map'"):
        open_source("synthetic", map={"action": "actions"})
    with pytest.raises(UsageError, match="a lerobot source has no option 'camera', did you mean 'cameras'"):
        open_source(write_lerobot(tmp_path), camera=["front"])


def test_a_folder_may_be_called_synthetic(tmp_path: Path, write_lerobot: Write) -> None:
    assert isinstance(open_source(write_lerobot(tmp_path / "synthetic")), LeRobotSource)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist; expected a folder with meta/info.json \(LeRobot"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="syntetic does not exist, did you mean 'synthetic'"):
        open_source("syntetic")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is of no known layout: it holds nothing; expected meta/info\.json"):
        open_source(tmp_path)


def test_a_foreign_folder_is_told_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "episode0.hdf5").touch()
    (tmp_path / "instructions").mkdir()
    with pytest.raises(SourceError, match=r"it holds episode0\.hdf5, instructions/; expected meta/info.json"):
        open_source(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"file is of no known layout; expected meta/info\.json"):
        open_source(tmp_path / "file")


def test_the_folder_above_or_inside_a_data_set_gets_the_right_one(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path / "set")
    for wrong in (tmp_path, root / "meta"):
        with pytest.raises(SourceError, match=f"Try: --source {root}$"):
            open_source(wrong)


def test_a_new_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: Path, *, speed: int = 1) -> None:
            self.root, self.speed = root, speed

    module = type(sys)("fake_source")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_source", module)
    monkeypatch.setitem(SOURCES, "fake", Entry("fake_source:Fake", ("fa*.txt",), "a fake"))
    (tmp_path / "fake.txt").touch()
    source = open_source(tmp_path, speed=3)
    assert isinstance(source, Fake)
    assert (source.root, source.speed) == (tmp_path, 3)
    named = open_source(f"fake:{tmp_path}")
    assert isinstance(named, Fake)
    with pytest.raises(SourceError, match=r"nowhere does not exist; expected a fake. Try: --source fake:PATH"):
        open_source("fake:nowhere")


def test_naming_the_sources_imports_no_decoder() -> None:
    heavy = {"av", "pyarrow", "PIL", "torch"}
    code = f"import sys, vla.featurize.sources.registry; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
