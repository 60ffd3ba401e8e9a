"""Spellings of one instruction, in stores and in raw demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vla.featurize.check_source import CheckConfig, check_source
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.inspect import describe
from vla.stores.instructions import normalised, same_instructions

SPELLINGS = ["Pick the cup.", "pick the cup ", "pick  the\u00a0cup", "open the drawer"]
Write = Callable[..., Path]


@pytest.mark.parametrize(
    "text",
    [
        "Pick the cup.",
        " pick the cup",
        "PICK THE CUP!",
        "pick\tthe cup",
        "ｐｉｃｋ the cup",
        "pick the\u200b cup",
        "pick_the-cup",
    ],
)
def test_case_spaces_punctuation_and_unicode_forms_make_no_other_instruction(text: str) -> None:
    assert normalised(text) == "pick the cup"


def test_composed_and_decomposed_letters_are_one_and_other_words_are_not() -> None:
    assert same_instructions(["caf\u00e9", "cafe\u0301", "cafe", "", "!"]) == [["caf\u00e9", "cafe\u0301"]]
    assert same_instructions(["pick 1", "pick 2", "左", "右"]) == []


def test_inspect_names_the_spellings_of_one_instruction(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path / "set", lengths=(4, 4, 4, 4), tasks=[[text] for text in SPELLINGS])
    (line,) = (finding.found for finding in check_source(CheckConfig(source=str(root))).findings)
    assert all(repr(text) in line for text in SPELLINGS[:3])
    assert SPELLINGS[3] not in line
    run(prepare(FeaturizeConfig(source=str(root), backbone="pixels")), tmp_path / "store")
    assert describe(tmp_path / "store")["spellings_of_one_task"] == [SPELLINGS[:3]]


def test_inspect_names_an_instruction_under_two_task_ids(tmp_path: Path, write_lerobot: Write) -> None:
    root = write_lerobot(tmp_path / "set", version="v2.1", tasks=[["pick"]] * 3)
    tasks = root / "meta/tasks.jsonl"
    tasks.write_text(tasks.read_text() + '{"task_index": 7, "task": "pick"}\n')
    (line,) = (finding.found for finding in check_source(CheckConfig(source=str(root))).findings)
    assert "pick" in line
    assert "7" in line
