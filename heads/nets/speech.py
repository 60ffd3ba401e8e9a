"""Teaching a prefix language model to say an answer, and letting it say one.

An answer stands behind its prompt in one row of tokens: the prompt sees itself in both directions, the answer is causal
(prefix.py). The hidden state of each token predicts the one behind it, so the last token of the prompt predicts the
answer's first, and the answer's last word the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.heads.nets.prefix import PrefixCache, PrefixModel

Observed = tuple[Tensor, Tensor]
"""Tokens [B, P, D] that come before every prompt, and which of them are real, bool [B, P]."""
Prompt = tuple[Tensor, Tensor]
"""ids int64 [B, L], begin token first, and which are real, bool [B, L], on the left."""


@dataclass(frozen=True)
class TokenErrors:
    """Cross-entropy in nats `error` [B, L - 1] of tokens 1 to L - 1, each given all before it; 0 where not counted.

    `counted` bool [B, L - 1]: the tokens of answers. `correct` bool [B, L - 1]: those that were the likeliest.
    """

    error: Tensor
    counted: Tensor
    correct: Tensor

    def mean(self, divisor: Tensor | None = None) -> Tensor:
        """Return the mean over counted tokens: never over padding. 0 where there are none.

        `divisor`: what the sum is divided by instead, the count of a whole optimiser step.
        """
        return self.error.sum() / (self.counted.sum().clamp(min=1) if divisor is None else divisor)


def teach(model: PrefixModel, observed: Observed, prompt: Prompt, answer: Tensor) -> TokenErrors:
    """Return the errors of answers that stand in the prompts' rows, bool `answer` [B, L] marking them.

    The scores of other tokens are never computed: a vocabulary of 257 thousand would fill the memory with them.
    """
    ids, _ = prompt
    hidden = _run(model, observed, prompt, answer).hidden[:, observed[0].shape[1] :]
    counted = answer[:, 1:]
    scores = model.logits(hidden[:, :-1][counted]).float()
    wanted = ids[:, 1:][counted]
    error = torch.zeros(counted.shape, device=ids.device)
    correct = torch.zeros_like(counted)
    error = error.masked_scatter(counted, F.cross_entropy(scores, wanted, reduction="none"))
    correct = correct.masked_scatter(counted, scores.argmax(dim=-1) == wanted)
    return TokenErrors(error, counted, correct)


def prefix_cache(model: PrefixModel, observed: Observed, prompt: Prompt) -> PrefixCache:
    """Return what an action expert attends to. No gradient leads back: neither through keys nor through values."""
    with torch.no_grad():
        return _run(model, observed, prompt, None).detach()


@torch.no_grad()
def say(
    model: PrefixModel, observed: Observed, prompt: Prompt, choose: Callable[[Tensor], Tensor], end: int, limit: int
) -> list[list[int]]:
    """Return the answer to each prompt, at most `limit` ids, without the end token.

    `choose` takes scores [B, words] and says which id comes next, int64 [B]. A row that has ended stays as it is.
    """
    cache = _run(model, observed, prompt, None)
    last = observed[0].shape[1] + prompt[1].sum(dim=1) - 1
    hidden = cache.hidden[torch.arange(len(last), device=last.device), last]
    answers: list[list[int]] = [[] for _ in range(len(last))]
    going = torch.ones_like(last, dtype=torch.bool)
    for _ in range(limit):
        chosen = choose(model.logits(hidden).float())
        going = going & (chosen != end)
        for answer, number, goes in zip(answers, chosen.tolist(), going.tolist(), strict=True):
            if goes:
                answer.append(number)
        if not going.any():
            break
        cache = model(model.embed(chosen[:, None]), going[:, None], past=cache)
        hidden = cache.hidden[:, -1]
    return answers


def _run(model: PrefixModel, observed: Observed, prompt: Prompt, starts: Tensor | None) -> PrefixCache:
    tokens, real = observed
    embeddings = torch.cat([tokens, model.embed(prompt[0]).to(tokens.dtype)], dim=1)
    if starts is not None:
        starts = torch.cat([torch.zeros_like(real), starts], dim=1)
    cache: PrefixCache = model(embeddings, torch.cat([real, prompt[1]], dim=1), starts)
    return cache


def append(prompt: Prompt, answers: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, valid and answer, [B, L] each, of prompts with the ids of answers behind, padded on the right."""
    rows = [ids[real].tolist() for ids, real in zip(*prompt, strict=True)]
    length = max(len(row) + len(answer) for row, answer in zip(rows, answers, strict=True))
    ids = torch.full((len(rows), length), pad)
    valid, marked = torch.zeros(2, len(rows), length, dtype=torch.bool)
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        whole = [*row, *answer]
        ids[place, : len(whole)] = torch.tensor(whole)
        valid[place, : len(whole)] = True
        marked[place, len(row) : len(whole)] = True
    device = prompt[0].device
    return ids.to(device), valid.to(device), marked.to(device)
