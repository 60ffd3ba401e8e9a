"""Words as tokens: the whole vocabulary of a data set's prompts, made of its own texts, so that it needs no file.

A language model that is trained from scratch on a few thousand frames has no use for 257 thousand tokens. What a head
is told and has to say is known when it is built: the instructions and labels of its data set (`HeadIO`), the words of
the prompts, and the 256 bins of a state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vla.heads.prompts import BINS, action_prompt, clean, subtask_prompt

PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")
"""A word or a mark with the space before it, or other space: the pieces of a text, put together, are the text."""


class WordTokenizer:
    """A `PromptTokenizer` of one id a word. What no text of the data set has in it is the token `unknown`."""

    pad, eos, bos, unknown = 0, 1, 2, 3

    def __init__(self, texts: Iterable[str]) -> None:
        told = [prompt("", range(BINS)) for prompt in (action_prompt, subtask_prompt)]
        for text in texts:
            told += [action_prompt(text, ()), clean(text)]
        self._know(dict.fromkeys(piece for text in told for piece in PIECE.findall(text)))

    @classmethod
    def of_words(cls, words: Iterable[str]) -> WordTokenizer:
        """Return the tokenizer that has exactly these `words`, in order."""
        tokenizer = cls.__new__(cls)
        tokenizer._know(words)
        return tokenizer

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the ids from 4 on; before them stand padding, end, begin and `unknown`."""
        return tuple(self._words[self.unknown + 1 :])

    @property
    def numbers(self) -> dict[int, int]:
        """The bins of a state among the words: {id: 0..255}."""
        bins = {str(number) for number in range(BINS)}
        return {at: int(word) for at, word in enumerate(self._words) if word.strip() in bins}

    def _know(self, words: Iterable[str]) -> None:
        self._words = ["", "", "", "\N{REPLACEMENT CHARACTER}", *words]
        self._ids = {word: number for number, word in enumerate(self._words) if word}
        self.size = len(self._words)

    def encode(self, text: str) -> list[int]:
        """See `PromptTokenizer`."""
        return [self._ids.get(piece, self.unknown) for piece in PIECE.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """See `PromptTokenizer`."""
        return "".join(self._words[number] for number in ids)
