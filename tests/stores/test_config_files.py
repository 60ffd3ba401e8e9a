"""Configuration files: three kinds, one over another, and who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import model_validator

from vla.stores.config_files import read_config
from vla.stores.errors import UsageError
from vla.stores.settings import Settings


class Inner(Settings):
    """A table."""

    lr: float = 1.0
    steps: int = 1
    dims: tuple[int, ...] = (1,)


class Outer(Settings):
    """Settings with a table inside."""

    name: str = "default"
    train: Inner = Inner()


def write(root: Path, **files: str) -> Path:
    """Write files, `name__toml` as name.toml; return the folder."""
    for name, text in files.items():
        path = root / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'name = "x"\n[train]\nlr = 0.5\ndims = [2, 3]\n'),
        ("a.json", '{"name": "x", "train": {"lr": 0.5, "dims": [2, 3]}}'),
        ("a.yaml", "name: x\ntrain:\n  lr: 0.5\n  dims: [2, 3]\n"),
        ("a.yml", "name: x\ntrain: {lr: 0.5, dims: [2, 3]}\n"),
    ],
)
def test_every_kind_of_file_says_the_same(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    config = Outer.from_sources(tmp_path / name)
    assert config == Outer(name="x", train=Inner(lr=0.5, dims=(2, 3)))


def test_a_file_is_laid_over_the_one_that_it_extends_table_by_table(tmp_path: Path) -> None:
    write(
        tmp_path,
        base__toml='name = "base"\n[train]\nlr = 0.1\nsteps = 5\ndims = [1, 2, 3]\n',
        top__yaml="extends: base.toml\ntrain:\n  lr: 0.2\n  dims: [9]\n",
    )
    config = Outer.from_sources(tmp_path / "top.yaml")
    assert config == Outer(name="base", train=Inner(lr=0.2, steps=5, dims=(9,)))


def test_a_chain_goes_on_through_folders_relative_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", root__json='{"name": "root", "train": {"steps": 7}}', mid__toml='extends = "root.json"')
    write(tmp_path, top__toml='extends = "shared/mid.toml"\n[train]\nlr = 0.3\n')
    assert read_config(tmp_path / "top.toml") == {"name": "root", "train": {"steps": 7, "lr": 0.3}}


def test_flags_win_over_the_file_the_file_over_its_base_and_the_base_over_defaults(tmp_path: Path) -> None:
    """In the origin a YAML file cannot win: argparse's defaults replace whatever it says."""
    write(
        tmp_path,
        base__toml='name = "base"\n[train]\nsteps = 2\nlr = 0.1\n',
        top__toml='extends = "base.toml"\n[train]\nlr = 0.2\n',
    )
    file = tmp_path / "top.toml"
    assert Outer.from_sources(file, name=None) == Outer(name="base", train=Inner(steps=2, lr=0.2))
    told = Outer.from_sources(file, ["train.lr=0.3"], name="flag")
    assert told == Outer(name="flag", train=Inner(steps=2, lr=0.3))


def test_an_anchor_within_one_yaml_file_works(tmp_path: Path) -> None:
    write(tmp_path, a__yaml="x: &x {lr: 0.5}\ntrain: {<<: *x, steps: 3}\n")
    assert read_config(tmp_path / "a.yaml")["train"] == {"lr": 0.5, "steps": 3}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a__toml": 'extends = "a.toml"'}, "a.toml extends a.toml"),
        ({"a__toml": 'extends = "b.toml"', "b__toml": 'extends = "./a.toml"'}, "a.toml extends b.toml extends a.toml"),
        ({"a__toml": 'extends = "none.toml"'}, "cannot read .*none.toml"),
        ({"a__toml": "extends = 3"}, "extends = 3; expected the name of one file"),
        ({"a__toml": 'extends = ["b.toml"]'}, r"extends = \['b.toml'\]"),
        ({"a__toml": 'extends = "b.yaml"', "b__yaml": "- 1\n- 2\n"}, "b.yaml holds a list"),
        ({"a__toml": 'extends = "b.yaml"', "b__yaml": "x: [1\ny: 2"}, "b.yaml does not parse"),
        (
            {"a__toml": 'extends = "b.yaml"', "b__yaml": "x: !!python/object/apply:os.getcwd []"},
            "b.yaml does not parse",
        ),
        ({"a__toml": 'extends = "b.yaml"', "b__yaml": ""}, "b.yaml holds a NoneType"),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_line(files: dict[str, str], says: str, tmp_path: Path) -> None:
    write(tmp_path, **files)
    with pytest.raises(UsageError, match=says) as refused:
        read_config(tmp_path / "a.toml")
    assert "\n" not in str(refused.value)


def test_an_unknown_key_of_a_base_is_named(tmp_path: Path) -> None:
    write(tmp_path, base__json=json.dumps({"train": {"lrr": 1}}), a__toml='extends = "base.json"')
    with pytest.raises(UsageError, match=r"unknown key 'train.lrr', did you mean 'lr'"):
        Outer.from_sources(tmp_path / "a.toml")


def test_tables_of_a_base_are_not_changed_by_what_lies_over_them(tmp_path: Path) -> None:
    write(tmp_path, base__toml="[train]\nlr = 0.1\n", a__toml='extends = "base.toml"\n[train]\nsteps = 3\n')
    first: dict[str, Any] = read_config(tmp_path / "a.toml")
    first["train"]["lr"] = 9
    assert read_config(tmp_path / "base.toml") == {"train": {"lr": 0.1}}


class Tuned(Settings):
    """Settings whose table has other defaults than the table's class."""

    train: Inner = Inner(lr=0.5, steps=9)


def test_a_key_of_a_table_leaves_the_fields_own_defaults_of_the_others_alone() -> None:
    # Found in `hier`: model.encoder.noise=0.2 had made its encoder 512 wide instead of 128.
    assert Tuned.from_sources(None, ["train.steps=3"]) == Tuned(train=Inner(lr=0.5, steps=3))
    assert Tuned.build({"train": {"lr": 1.0}}).train == Inner(lr=1.0, steps=9)  # the class's default, said aloud
    assert Tuned.build({"train": Inner(steps=3)}).train == Inner(steps=3)


class Whole(Settings):
    """Two keys that may not be equal, and a table of the same kind."""

    a: int = 1
    b: int = 2
    part: Whole | None = None

    @model_validator(mode="after")
    def _differ(self) -> Whole:
        if self.a == self.b:
            raise ValueError(f"a and b are {self.a}")
        return self


def test_what_a_table_contradicts_itself_in_is_told_without_the_table() -> None:
    """It was printed whole, under an empty name."""
    for build in (lambda: Whole.build({"a": 2}, where="head"), lambda: Whole.from_sources(None, ["a=2"])):
        with pytest.raises(UsageError, match=r"^(head|settings): a and b are 2$"):
            build()
    with pytest.raises(UsageError, match=r"^head: part: a and b are 2$"):
        Whole.build({"part": {"a": 2}}, where="head")
    with pytest.raises(UsageError, match=r"^head: a = 'x': "):
        Whole.build({"a": "x"}, where="head")
