"""What `hier` is told: the texts of a data set, a tokenizer that knows them, and prompts of both with the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from vla.heads.batch import Batch, HeadIO
from vla.heads.hier_config import HierConfig
from vla.heads.normalize import Normalizer
from vla.heads.prompts import (
    BINS,
    PromptTokenizer,
    action_prompt,
    discretise,
    load_tokenizer,
    subtask_prompt,
    tokenise,
)
from vla.heads.vocabulary import WordTokenizer

LABELS = ("high_level_task", "subtask")
"""What a source of tasks that have parts says of an episode (featurize/sources/hierarchical.py)."""
Form = Callable[[str, Sequence[int]], str]
"""(text, bins) -> prompt: `action_prompt` or `subtask_prompt`."""


class HierTexts:
    """For each instruction that `Batch.task` may name its task and its subtask. `speaks`: high-level tasks are
    instructions too. `columns` of the state are told; `tokenizer` is the head's, and `source` where it comes from."""

    def __init__(self, config: HierConfig, io: HeadIO, columns: tuple[int, ...], *, speaks: bool) -> None:
        self._labels, self._columns, self._most = io.labels, columns, config.max_tokens
        highs: dict[str, str] = {}
        for label in io.labels:
            if label.keys() >= {*LABELS}:
                highs.setdefault(label["subtask"], label["high_level_task"])
        self.tasks = io.tasks or ("",)
        further = tuple(dict.fromkeys(high for high in highs.values() if high not in self.tasks)) if speaks else ()
        self.instructions = self.tasks + further
        self._high = [highs.get(task, task) for task in self.tasks] + list(further)
        # A text that is also the name of a whole task is that task.
        self._told_alone = {task for task in self.tasks if task in highs and task not in highs.values()}
        self.tokenizer: PromptTokenizer
        self.source: str | tuple[str, ...]
        if config.variant == "light":
            words = WordTokenizer(self._vocabulary())
            self.tokenizer, self.source = words, words.words
        else:
            self.source = config.tokenizer or config.weights
            self.tokenizer = load_tokenizer(self.source)

    def _vocabulary(self) -> list[str]:
        """All texts that a prompt or an answer may hold."""
        told = [label[name] for label in self._labels for name in LABELS if name in label]
        return list(dict.fromkeys([*self.instructions, *told]))

    def said(self) -> list[int]:
        """Return the ids of all that prompts are made of: another tokenizer would give others."""
        texts = [*self._vocabulary(), subtask_prompt("", range(BINS)), action_prompt("", ())]
        return [number for text in texts for number in (*self.tokenizer.encode(text), self.tokenizer.eos)]

    def told(self, batch: Batch, name: str) -> list[str]:
        """Return each window's text: its label's, else what goes with its instruction."""
        if batch.label is not None and all(name in label for label in self._labels):
            return [self._labels[number][name] for number in batch.label.tolist()]
        told = self._high if name == "high_level_task" else self.instructions
        return [told[number] for number in batch.task.tolist()]

    def ordered(self, batch: Batch) -> list[str | None]:
        """Return the subtask that each window's instruction is; None for a high-level task, and for windows of
        demonstrations, whose labels say what to compare with."""
        if batch.label is not None:
            return [None] * len(batch)
        told = [self.instructions[number] for number in batch.task.tolist()]
        return [text if text in self._told_alone else None for text in told]

    def tokens(
        self,
        batch: Batch,
        form: Form,
        texts: Sequence[str],
        state: Normalizer | None,
        answers: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, valid and answer [B, L] of prompts, as `tokenise`; `state` normalises the state."""
        prompts = [form(text, bins) for text, bins in zip(texts, self.bins(batch, state), strict=True)]
        return tokenise(prompts, self.tokenizer, max_length=self._most, continuations=answers, device=batch.task.device)

    def bins(self, batch: Batch, state: Normalizer | None) -> list[list[int]]:
        """Return the bins of each window's present state, of the real dimensions that are read and no others."""
        if state is None:
            return [[]] * len(batch)
        assert batch.state is not None  # check saw to it
        bins: list[list[int]] = discretise(state(batch.state[:, -1])[:, list(self._columns)]).tolist()
        return bins
