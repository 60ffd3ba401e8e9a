"""The instructions of a data set as a head keeps them: in its checkpoint, so that a live policy needs no text store."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla.heads.texts import TextRows
from vla.stores.errors import CheckpointError


class Instructions(nn.Module):
    """Token ids of K instructions, padded on the left to L, and the mean of their embeddings.

    Buffers `ids` int64 [K, L] (-1 until they are set), `mask` bool [K, L], `mean` float32 [K, width].
    """

    ids: Tensor
    mask: Tensor
    mean: Tensor

    def __init__(self, count: int, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.full((count, length), -1))
        self.register_buffer("mask", torch.zeros(count, length, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(count, width))
        self._longest: int | None = None
        self.register_load_state_dict_post_hook(_measure_again)  # type: ignore[no-untyped-call]

    def set(self, rows: TextRows) -> None:
        """Keep the rows of K texts, whichever side their padding is on; `width` 0 keeps no embedding."""
        # A stable sort of False before True moves padding to the left and leaves tokens in order.
        order = rows.mask.long().argsort(dim=1, stable=True)
        mask = rows.mask.gather(1, order)
        self.mask.copy_(mask)
        self.ids.copy_(rows.ids.gather(1, order).masked_fill(~mask, 0))
        if self.mean.shape[1]:
            weight = rows.mask.float()[..., None]
            self.mean.copy_((rows.embedding * weight).sum(1) / weight.sum(1).clamp(min=1))
        self._longest = None

    def tokens(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, L'] of instructions number [B], without the padding that all K have in common."""
        self.check()
        assert self._longest is not None
        start = self.ids.shape[1] - self._longest
        return self.ids[task, start:], self.mask[task, start:]

    def means(self, task: Tensor) -> Tensor:
        """Return the mean embeddings [B, width] of instructions number [B]."""
        self.check()
        return self.mean[task]

    def check(self) -> None:
        """Raise `CheckpointError` where the instructions were never set. Looks at the buffers once after each load."""
        if self._longest is None:
            if bool((self.ids < 0).any()):
                raise CheckpointError("the tokens of the instructions are missing", expected="a fitted model")
            self._longest = int(self.mask.sum(1).max())


def _measure_again(loaded: Instructions, _: object) -> None:
    loaded._longest = None
