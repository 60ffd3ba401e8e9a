"""What the two variants of `hier` have in common: a language model that sees, and an actor that is told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla.heads.batch import Batch
from vla.heads.nets.prefix import PrefixModel
from vla.heads.nets.speech import Observed, Prompt


class Language(nn.Module):
    """`model` over what `observe` sees and the words of a prompt."""

    model: PrefixModel

    @abstractmethod
    def observe(self, batch: Batch) -> Observed:
        """Return the tokens [B, P, D] that come before every prompt, and which are real."""


class Actor(nn.Module):
    """`net`: (x_t [B, H, A], t [B], *context) -> velocity [B, H, A]."""

    net: nn.Module

    @abstractmethod
    def context(self, language: Language | None, batch: Batch, prompt: Prompt) -> tuple[object, ...]:
        """Return what `net` is conditioned on. Nothing of `language` gets a gradient through it."""


class Record(nn.Module):
    """Numbers 0..255 or ids in a buffer: what a frozen file said, for its digest (frozen.py)."""

    said: Tensor

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("said", torch.tensor(list(numbers), dtype=torch.int64, device="cpu"))
