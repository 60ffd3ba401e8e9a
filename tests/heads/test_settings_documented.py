"""Docstrings are the one source of what settings mean: every field is in them, and `vla heads` and the docs agree."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import pytest

from vla.heads.compatibility import head_fields, markdown, requirements, table, undocumented
from vla.heads.needs import Need
from vla.heads.registry import HEADS, SUMMARIES, head_class
from vla.rollout.online import OnlineTrainConfig
from vla.stores.described import describe_fields
from vla.stores.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("head", HEADS)
def test_every_setting_of_a_head_is_documented_in_a_docstring(head: str) -> None:
    assert undocumented(head) == []


def test_every_setting_of_online_training_is_documented() -> None:
    assert [f.name for f in describe_fields(OnlineTrainConfig) if not f.text and f.name.startswith("online")] == []


@pytest.mark.parametrize("head", HEADS)
def test_settings_are_listed_with_the_defaults_that_the_head_is_trained_with(head: str) -> None:
    fields = {field.name: field for field in head_fields(head)}
    cls = head_class(head)
    assert fields["model.horizon"].default == str(cls.Config().horizon)
    assert {name for name in fields if name.startswith("train.")} == {f"train.{name}" for name in cls.train_defaults}
    for name, value in cls.train_defaults.items():
        if isinstance(value, int):
            assert fields[f"train.{name}"].default == str(value)


class Inner(Settings):
    """A table. `depth`: how deep."""

    depth: int = 3


class Outer(Settings):
    """Made up.

    `lo` and `hi`: its range. `kind`: "a"
    or "b". Where there are several, `n` says how many.
    """

    lo: float = 0.0
    hi: float = 1.0
    kind: Literal["a", "b"] = "a"
    n: int
    inner: Inner = Inner(depth=5)
    below: tuple[int, ...] | None = None
    """Said below the field."""
    silent: int = 0


def test_a_docstring_documents_fields_alone_together_in_passing_and_below() -> None:
    fields = {field.name: field for field in describe_fields(Outer, "x.")}
    assert fields["x.kind"].text == '"a" or "b". Where there are several, `n` says how many.'
    assert fields["x.lo"].text == fields["x.hi"].text == "`lo` and `hi`: its range."
    assert fields["x.n"].text == "Where there are several, `n` says how many."
    assert fields["x.below"].text == "Said below the field."
    assert (fields["x.inner.depth"].text, fields["x.inner.depth"].default) == ("how deep.", "5")
    assert (fields["x.kind"].type, fields["x.below"].type) == ("a | b", "tuple[int, ...] | null")
    assert (fields["x.n"].default, fields["x.below"].default) == ("(has to be given)", "null")


def test_a_field_that_no_docstring_names_is_found_out() -> None:
    assert [field.name for field in describe_fields(Outer) if not field.text] == ["silent"]


def test_the_table_in_the_docs_is_the_one_that_the_heads_give() -> None:
    spec = importlib.util.spec_from_file_location("vla_docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = (DOCS / "heads" / "index.md").read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run: python docs/tables.py"
    assert tables.filled(page.replace("| `mlp` |", "| `old` |")) == page


def test_the_table_names_every_head_and_what_would_make_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = (Need("fine", "siglip", masked=True), Need("text", "text", embeddings=True))
    monkeypatch.setattr(head_class("mlp"), "needs", classmethod(lambda cls, config: needs))
    assert requirements("mlp") == needs
    row = next(row for row in table() if row["head"] == "mlp")
    assert row["needs"] == ["`fine` (token, channel), with its mask", "text with embeddings"]
    assert row["commands"][1] == "vla featurize --backbone text --set options.embedding=table"
    assert [row["head"] for row in table()] == list(HEADS) == list(SUMMARIES)
    assert any("vla featurize --backbone siglip" in line for line in markdown())
