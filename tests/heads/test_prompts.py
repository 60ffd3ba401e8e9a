"""Prompts: the published formats, the state in 256 bins, and tokens of which none is ever cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from vla.heads.prompts import (
    ByteTokenizer,
    action_prompt,
    discretise,
    load_tokenizer,
    plain_prompt,
    subtask_prompt,
    tokenise,
)
from vla.stores.errors import DataError, MachineError


def test_prompts_are_the_published_ones() -> None:
    assert plain_prompt(" pick_up the\ncup ") == "pick up the cup\n"
    assert action_prompt("pick_up", [0, 128, 255]) == "Task: pick up, State: 0 128 255;\nAction: "
    assert subtask_prompt("pick_up", [7]) == "Task: pick up, State: 7;\nSubtask: "


def test_the_state_falls_into_the_bins_of_openpi() -> None:
    """Inside [-1, 1) as its `digitize` gives them; below and above into the outermost bins, where it gives -1."""
    state = torch.linspace(-1, 0.999, 999)
    wanted = np.digitize(state.numpy(), np.linspace(-1, 1, 257)[:-1]) - 1
    assert discretise(state).tolist() == wanted.tolist()
    assert discretise(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_has_no_words(number: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        discretise(torch.tensor([0.0, number]))


def test_rows_are_padded_on_the_right_and_nothing_is_cut() -> None:
    tokenizer = ByteTokenizer()
    ids, valid, answer = tokenise(["ab", "abcd"], tokenizer, max_length=5)
    assert ids.tolist() == [[2, 100, 101, 0, 0], [2, 100, 101, 102, 103]]
    assert valid.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert not answer.any()
    with pytest.raises(
        DataError, match=r"'abcd' \.\.\. has 5 tokens; expected at most 4. Try: --set model.max_tokens=N"
    ):
        tokenise(["ab", "abcd"], tokenizer, max_length=4)


def test_what_is_to_be_said_follows_the_prompt_and_ends() -> None:
    tokenizer = ByteTokenizer()
    ids, valid, answer = tokenise(["ab", "a"], tokenizer, max_length=9, continuations=["x", "xyz"])
    said = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(ids, answer, strict=True)]
    assert said == ["x", "xyz"]
    assert [int(row[mask][-1]) for row, mask in zip(ids, answer, strict=True)] == [tokenizer.eos] * 2
    assert not (answer & ~valid).any()


def test_bytes_go_both_ways() -> None:
    tokenizer = ByteTokenizer()
    text = "Öffne die Tür"
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos, tokenizer.pad]) == text
    assert max(tokenizer.encode(text)) < tokenizer.size
    assert isinstance(load_tokenizer("random"), ByteTokenizer)


def test_a_folder_gives_its_own_tokenizer(memory_path: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "go": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.save(str(memory_path / "tokenizer.json"))
    loaded = load_tokenizer(str(memory_path))
    assert (loaded.pad, loaded.eos, loaded.bos, loaded.size) == (0, 1, 2, 4)
    assert loaded.encode("go") == [3]
    assert loaded.decode([3]) == "go"


def test_a_folder_without_a_tokenizer_of_paligemma_is_refused(memory_path: Path) -> None:
    with pytest.raises(MachineError, match=r"no tokenizer\.json in .* Try: --set model.tokenizer=FOLDER"):
        load_tokenizer(str(memory_path))
    file = memory_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"go": 0}, unk_token="go")).save(str(file))
    with pytest.raises(DataError, match="has no <pad>, <bos>, <eos>; expected the tokenizer of PaliGemma"):
        load_tokenizer(str(memory_path))
    file.write_text("{")
    with pytest.raises(DataError, match="is no tokenizer"):
        load_tokenizer(str(memory_path))
