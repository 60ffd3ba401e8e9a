"""What an exported head is told: its prompt, which is made outside of the program, from the JSON file beside it.

    tell = ExportedPrompt.read(Path("pi05.json"))
    program(**tell(["open the drawer"], state), ...)  # prompt_ids int64 [1, L], prompt_valid bool [1, L]

A prompt that depends on nothing but the task needs none of this: its ids are in the program, looked up by `task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.heads.prompts import PromptTokenizer, discretise, fill, load_tokenizer, tokenise
from vla.heads.told import Telling
from vla.heads.vocabulary import WordTokenizer
from vla.pretrained.weights import RANDOM
from vla.stores.documents import read_json_file
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings, nearest

HOW = (
    "ids: `bos`, then those of `format` without special tokens, then `pad` up to `length`; valid: all but padding. "
    "{task}: without space around it, _ and line ends as spaces. {state}: a number for each of `columns`, with spaces "
    "between, of the present state x in the data's units: clip(floor(((x - centre) / scale + 1) * 128), 0, 255)"
)


class StateWords(Settings):
    """How a state [dim] becomes numbers: `columns` of it, by `names`, and `centre` and `scale` of each of those."""

    dim: int
    columns: tuple[int, ...]
    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]

    def bins(self, state: Tensor) -> list[list[int]]:
        """Return the numbers 0..255 of the told columns, of states [B, dim] in the data's units. Raises `DataError`
        where they are not finite."""
        told = state[:, list(self.columns)].float()
        centre, scale = (torch.tensor(values, dtype=torch.float32) for values in (self.centre, self.scale))
        bins: list[list[int]] = discretise((told - centre) / scale).tolist()
        return bins


class PromptExample(Settings):
    """A finished prompt: of a known task and, where it is told, of a `state` [dim] that lies within its range."""

    task: str
    state: tuple[float, ...] | None
    text: str
    ids: tuple[int, ...]


class PromptForm(Settings):
    """What the description of an exported head says of its prompt.

    `input`: what the program takes, the ids or the task's number. `format`, `how`: see `HOW`. `task`: what {task} is;
    `free`: whether it may be another than those of the `examples`. `tokenizer`: folder, hub id, "random" (bytes) or the
    words of ids 4 and up. `length`: L.
    """

    input: Literal["prompt_ids", "task"]
    format: str
    how: str
    task: str
    free: bool
    tokenizer: str | tuple[str, ...]
    bos: int
    pad: int
    length: int
    state: StateWords | None
    examples: tuple[PromptExample, ...]


def describe_prompt(telling: Telling, names: Sequence[str]) -> PromptForm:
    """Return what a description says of a head's prompt; `names` are those of the state."""
    words, state = None, None
    if telling.columns:
        assert telling.state is not None
        columns = list(telling.columns)
        centre, scale = telling.state.centre.cpu(), telling.state.scale.cpu()
        words = StateWords(
            dim=len(centre),
            columns=telling.columns,
            names=tuple(names[column] for column in columns) if names else (),
            centre=tuple(centre[columns].tolist()),
            scale=tuple(scale[columns].tolist()),
        )
        state = centre + scale * (torch.arange(1, len(centre) + 1) / (len(centre) + 1) * 2 - 1)
    examples = []
    for task in telling.texts:
        bins = words.bins(state[None])[0] if words is not None and state is not None else []
        text = fill(telling.form, task, bins)
        ids = (telling.tokenizer.bos, *telling.tokenizer.encode(text))
        told = None if state is None else tuple(state.tolist())
        examples.append(PromptExample(task=task, state=told, text=text, ids=ids))
    return PromptForm(
        input="task" if telling.fixed else "prompt_ids",
        format=telling.form,
        how=HOW,
        task=telling.what,
        free=telling.free,
        tokenizer=telling.source,
        bos=telling.tokenizer.bos,
        pad=telling.tokenizer.pad,
        length=telling.table()[0].shape[1] if telling.fixed else telling.longest(),
        state=words,
        examples=tuple(examples),
    )


class ExportedPrompt:
    """Makes the prompts of an exported head. `tokenizer`: another folder or hub id than that of the description.

    Raises `UsageError` for a program that takes the task's number, `DataError` where the tokenizer is another than the
    one of the head, and what loading it raises.
    """

    def __init__(self, form: PromptForm, tokenizer: str | None = None) -> None:
        if form.input == "task":
            raise UsageError("the program holds its prompts", expected="its input `task`, a position in `tasks`")
        self.form = form
        source = form.tokenizer if tokenizer is None else tokenizer
        self._tokenizer: PromptTokenizer = (
            load_tokenizer(source) if isinstance(source, str) else WordTokenizer.of_words(source)
        )
        for example in form.examples:
            if (self._tokenizer.bos, *self._tokenizer.encode(example.text)) != example.ids:
                found = f"the tokenizer of {source} has other ids for {example.text!r}"
                raise DataError(found, expected="the tokenizer that the head was trained with")

    @classmethod
    def read(cls, description: Path | str, tokenizer: str | None = None) -> ExportedPrompt:
        """Return the prompts of the .json that `vla export` wrote.

        Raises `UsageError` for a head without prompts, and where the description names a folder or a hub id of a
        tokenizer and `tokenizer` is None: a file from elsewhere chooses neither (stores/user_given.py). Raises
        `DataError` for a damaged description.
        """
        try:
            found = read_json_file(Path(description))
        except (OSError, ValueError) as error:
            raise DataError(f"{description}: {error}", expected="the .json of `vla export`") from None
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), dict):
            raise UsageError(f"{description} says of no prompt", expected="that of an exported head which reads text")
        form = PromptForm.build(found["prompt"], where=str(description))
        if tokenizer is None and isinstance(form.tokenizer, str) and form.tokenizer != RANDOM:
            raise UsageError(
                f"{description} names the tokenizer {form.tokenizer!r}, and no artefact chooses files or addresses",
                expected="your own value",
                fix=f"the argument `tokenizer` of ExportedPrompt.read, such as {form.tokenizer!r}",
            )
        return cls(form, tokenizer)

    def __call__(self, tasks: Sequence[str], state: Any = None) -> dict[str, Tensor]:
        """Return the inputs prompt_ids int64 [B, L] and prompt_valid bool [B, L].

        `tasks`: B texts. `state`: of the present, [B, S] in the data's units, all S numbers whichever are told; None
        where none is. Raises `UsageError` for a task that the head does not know and for another state than it is
        told, `DataError` for a prompt of more than L tokens and for numbers that are not finite.
        """
        form, known = self.form, [example.task for example in self.form.examples]
        for task in tasks:
            if not form.free and task not in known:
                expected = f"one of {'; '.join(known)}"
                raise UsageError(f"the head was not trained on {task!r}{nearest(task, known)}", expected=expected)
        bins = self._bins(len(tasks), state)
        prompts = [fill(form.format, task, row) for task, row in zip(tasks, bins, strict=True)]
        ids, valid, _ = tokenise(prompts, self._tokenizer, max_length=form.length)
        missing = (0, form.length - ids.shape[1])
        return {"prompt_ids": F.pad(ids, missing, value=form.pad), "prompt_valid": F.pad(valid, missing, value=False)}

    def _bins(self, count: int, state: Any) -> list[list[int]]:
        told = self.form.state
        if told is None:
            return [[]] * count
        values = None if state is None else torch.as_tensor(state)
        if values is None or tuple(values.shape) != (count, told.dim):
            found = "no state" if values is None else f"a state of shape {tuple(values.shape)}"
            raise UsageError(found, expected=f"({count}, {told.dim}), the present one of each task")
        return told.bins(values)
