"""What pi0 and pi0.5 are told: the instruction, and for pi0.5 the state as numbers in the text.

pi0.5 reads its state as text (openpi, `PaligemmaTokenizer.tokenize`): each normalised number becomes the index of one
of 256 bins, and the indices stand in the prompt. Such prompts differ from row to row, so no text store can hold them:
they are tokenised batch by batch. Only the real dimensions of the state are written, never padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vla.pretrained.hub import TOKENIZER_FILES, find_model
from vla.pretrained.weights import RANDOM
from vla.stores.errors import DataError, MachineError

BINS = 256

PLAIN = "{task}\n"
"""pi0."""
ACTION = "Task: {task}, State: {state};\nAction: "
"""pi0.5, low level; the state as its bins, a space between them."""
SUBTASK = "Task: {task}, State: {state};\nSubtask: "
"""pi0.5, high level."""


def discretise(state: Tensor) -> Tensor:
    """Return bins int64 [..., S] in 0..255 of a normalised state [..., S]: clip(floor((x + 1) * 128), 0, 255).

    openpi's `digitize(x, linspace(-1, 1, 257)[:-1]) - 1` gives the same inside [-1, 1), and -1 below; here everything
    outside falls into the outermost bins. Raises `DataError` for numbers that are not finite.
    """
    if not bool(torch.isfinite(state).all()):
        raise DataError("a state that is not finite has no words", expected="finite numbers")
    return ((state + 1) * (BINS / 2)).floor().clamp(0, BINS - 1).long()


def clean(instruction: str) -> str:
    """Return an instruction as openpi tells it: no surrounding space, underscores and line ends as spaces."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def plain_prompt(instruction: str) -> str:
    """Return pi0's prompt."""
    return fill(PLAIN, instruction, ())


def action_prompt(instruction: str, bins: Sequence[int]) -> str:
    """Return pi0.5's prompt for actions, from the bins [S] of a normalised state."""
    return fill(ACTION, instruction, bins)


def subtask_prompt(instruction: str, bins: Sequence[int]) -> str:
    """Return the hierarchical pi0.5's prompt for the next subtask."""
    return fill(SUBTASK, instruction, bins)


def fill(form: str, instruction: str, bins: Sequence[int]) -> str:
    """Return one of the formats above with what is told."""
    return form.format(task=clean(instruction), state=" ".join(str(int(number)) for number in bins))


class PromptTokenizer(Protocol):
    """Text to ids and back. `pad`, `bos`, `eos` are ids, `size` one more than the largest id."""

    pad: int
    bos: int
    eos: int
    size: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        ...


class ByteTokenizer:
    """One id a byte, after PaliGemma's own first three: 0 padding, 1 end, 2 begin. Goes with random weights."""

    pad, eos, bos, size = 0, 1, 2, 3 + 256

    def encode(self, text: str) -> list[int]:
        """See `PromptTokenizer`."""
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """See `PromptTokenizer`. Bytes that are no UTF-8 become U+FFFD."""
        return bytes(number - 3 for number in ids if number >= 3).decode(errors="replace")


class FileTokenizer:
    """The tokenizer of a `tokenizer.json` with Gemma's special tokens. Raises `DataError` where it is another."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the Rust library raises bare Exceptions
            raise DataError(f"{path} is no tokenizer: {str(error).partition(chr(10))[0]}") from None
        known: dict[str, int] = self._tokenizer.get_vocab()
        lacking = [token for token in ("<pad>", "<bos>", "<eos>") if token not in known]
        if lacking:
            raise DataError(f"{path} has no {', '.join(lacking)}", expected="the tokenizer of PaliGemma")
        self.pad, self.bos, self.eos = known["<pad>"], known["<bos>"], known["<eos>"]
        self.size = max(known.values()) + 1

    def encode(self, text: str) -> list[int]:
        """See `PromptTokenizer`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `PromptTokenizer`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def load_tokenizer(weights: str) -> PromptTokenizer:
    """Return the tokenizer of a folder or hub id, or bytes for "random".

    Raises `MachineError` where there is no `tokenizer.json`, and what `FileTokenizer` raises.
    """
    if weights == RANDOM:
        return ByteTokenizer()
    fix = "--set model.tokenizer=FOLDER with PaliGemma's tokenizer.json (pi0's own checkpoints have none)"
    path = Path(weights).expanduser()
    if not path.is_dir():
        path = find_model(weights, fix, TOKENIZER_FILES)
    if not (path / "tokenizer.json").is_file():
        raise MachineError(f"no tokenizer.json in {path}", fix=fix)
    return FileTokenizer(path / "tokenizer.json")


def tokenise(
    prompts: Sequence[str],
    tokenizer: PromptTokenizer,
    *,
    max_length: int,
    continuations: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids int64 [B, L], valid bool [B, L] and answer bool [B, L], padded on the right to the longest.

    Each row is the begin token and its prompt, without an end. With `continuations` (what a language model shall learn
    to say) their ids and the end token follow, and `answer` marks them; without, `answer` is all False. Raises
    `DataError` for a row of more than `max_length` tokens: nothing is ever cut.
    """
    rows, starts = [], []
    for number, prompt in enumerate(prompts):
        row = [tokenizer.bos, *tokenizer.encode(prompt)]
        starts.append(len(row))
        if continuations is not None:
            row += [*tokenizer.encode(continuations[number]), tokenizer.eos]
        if len(row) > max_length:
            found = f"{prompt[:60]!r} ... has {len(row)} tokens"
            raise DataError(found, expected=f"at most {max_length}", fix="--set model.max_tokens=N")
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad)
    valid, answer = torch.zeros(2, len(rows), length, dtype=torch.bool)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        valid[number, : len(row)] = True
        answer[number, start : len(row)] = True
    return ids.to(device), valid.to(device), answer.to(device)
