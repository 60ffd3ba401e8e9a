"""Signals during training: noted at once, acted upon at the end of a step, by all processes after the same one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch
from accelerate import Accelerator

from vla.stores.interrupt import Deferred, defer_signals

VOTE_SECONDS = 1.0
"""About how often the processes of a run compare what reached them: an exchange in every step would cost 3 % of a 6 ms
step, and schedulers leave 30 s or more between a warning and a kill."""

log = logging.getLogger(__name__)


class Stop:
    """Whether the run has to end after a step, the same answer in every process."""

    def __init__(self, accelerator: Accelerator, deferred: Deferred) -> None:
        self._accelerator, self._deferred = accelerator, deferred
        self._steps, self._interval, self._since = 0, 1, monotonic()

    def after_step(self) -> int:
        """Return the number of the signal to end for, 0 for none. Every process has to ask after every step."""
        if self._accelerator.num_processes == 1:
            return self._deferred.number
        self._steps += 1
        if self._steps < self._interval:
            return 0
        pace = self._steps / max(monotonic() - self._since, 1e-9)
        mine = torch.tensor(
            [[self._deferred.number, max(int(VOTE_SECONDS * pace), 1)]], device=self._accelerator.device
        )
        votes = self._accelerator.gather(mine)
        # The same numbers everywhere, so that every process holds the next exchange after the same step.
        self._steps, self._interval, self._since = 0, int(votes[:, 1].min()), monotonic()
        return int(votes[:, 0].max())


@contextmanager
def stopping(accelerator: Accelerator) -> Iterator[Stop]:
    """Yield what says when to stop. A second signal raises `Interrupted` wherever the program is.

    Inside a step the weights, the optimiser and the schedule disagree: a checkpoint of that moment would resume to
    other bits.
    """
    with defer_signals(_announce) as deferred:
        yield Stop(accelerator, deferred)


def _announce(number: int) -> None:
    name = signal.Signals(number).name
    log.warning("%s: writing a checkpoint after this step (once more to stop at once)", name)
