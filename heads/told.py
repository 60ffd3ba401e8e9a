"""How a head that reads text makes its prompt: what has to be known to make it elsewhere (exported_prompt.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vla.heads.batch import Batch
from vla.heads.normalize import Normalizer
from vla.heads.prompts import BINS, PromptTokenizer, fill, tokenise


@dataclass(frozen=True)
class Telling:
    """How a head makes its prompt: `form` (prompts.py) of a text, and of `columns` of the present state.

    `what` says what the text is, `texts` the known ones by `Batch.task`, `of` those that the rows of a batch are told;
    `free`: any other may be told too. `source`: folder, hub id or "random" of `tokenizer`, or its words. `state`:
    normaliser of the state, None where no column is told. Text and told columns are read nowhere else in the head.
    """

    form: str
    what: str
    texts: tuple[str, ...]
    of: Callable[[Batch], Sequence[str]]
    tokenizer: PromptTokenizer
    source: str | tuple[str, ...]
    max_tokens: int
    state: Normalizer | None = None
    columns: tuple[int, ...] = ()
    free: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the prompt depends on nothing but which of `texts` it is."""
        return not self.columns and not self.free

    def table(self) -> tuple[Tensor, Tensor]:
        """Return ids int64 [K, L] and which are real, bool [K, L], of the prompts of all K texts, where these are
        `fixed`. Raises `DataError` where one is longer than `max_tokens`."""
        prompts = [fill(self.form, text, ()) for text in self.texts]
        ids, valid, _ = tokenise(prompts, self.tokenizer, max_length=self.max_tokens)
        return ids, valid.clone()  # memory of its own, which a program is saved with

    def longest(self) -> int:
        """Return L of the longest prompt that the head takes.

        Of known texts: with the longest of the 256 numbers in each column; numbers stand between spaces, where
        tokenizers split, so none changes the length of another. Of free ones: `max_tokens`.
        """
        if self.free:
            return self.max_tokens

        def length(text: str, number: int) -> int:
            return 1 + len(self.tokenizer.encode(fill(self.form, text, [number] * len(self.columns))))

        widest = max(range(BINS), key=lambda number: length(self.texts[0], number))
        return min(self.max_tokens, max(length(text, widest) for text in self.texts))
