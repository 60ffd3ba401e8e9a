"""FAST ids as the words of a language model: said under the one constraint that what is said is a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla.heads.fast import FastTokenizer
from vla.stores.errors import DataError


class FastSpeaker:
    """Chooses the likeliest id among those that still lead to H x A whole coefficients, and then the end.

    Greedy speech that is free to stop early or to run on does not decode (the published processor then returns zeros).
    `numbers` int64 [size]: the language model's id of each FAST id. `end`: its end token. For one `say` of B rows.
    """

    def __init__(self, fast: FastTokenizer, numbers: Tensor, end: int, rows: int) -> None:
        self.fast, self.numbers, self.end = fast, numbers, end
        self.limit = 4 * fast.horizon * fast.action_dim + 1  # a character has four bytes at most
        self._open = [(fast.horizon * fast.action_dim, 0)] * rows

    def choose(self, scores: Tensor) -> Tensor:
        """Take scores [B, words]; return ids int64 [B]. Raises `DataError` where the vocabulary leads nowhere."""
        ours = scores[:, self.numbers]
        chosen = []
        for row, (remaining, pending) in enumerate(self._open):
            if not remaining and not pending:
                chosen.append(self.end)
                continue
            allowed = torch.from_numpy(self.fast.allowed(remaining, pending)).to(scores.device)
            if not allowed.any():
                raise DataError(f"no FAST id goes on with {remaining} coefficients to come", fix="vla fit-fast")
            best = int(ours[row].masked_fill(~allowed, -torch.inf).argmax())
            _, count, left = self.fast.spans[best].tolist()
            self._open[row] = (remaining - count, left)
            chosen.append(int(self.numbers[best]))
        return torch.tensor(chosen, device=scores.device)

    def back(self, said: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the FAST ids of what was said."""
        fast_of = {number: place for place, number in enumerate(self.numbers.tolist())}
        return [[fast_of[number] for number in row] for row in said]
