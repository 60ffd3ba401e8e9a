"""Signals that end a command: Ctrl-C, and what schedulers, terminals and service managers send before they kill.

One mechanism for every command. By default a signal raises `Interrupted` wherever the program is, as Ctrl-C does in
python, so that `with` blocks and `finally` clean up. Inside `defer_signals` the first signal is only noted, and the
block ends itself where its state is whole. A second signal ends at once.

A signal that the process inherited as ignored stays ignored (SIGHUP under nohup, SIGINT of a background job), and a
handler that the embedding program has set is left alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""SLURM sends SIGTERM, or what --signal names (SIGUSR1, most often); LSF SIGUSR2; Grid Engine SIGUSR1, SIGUSR2 and
SIGXCPU; a terminal that is closed SIGHUP."""

REPEAT_SECONDS = 0.5
"""`timeout`, launchers and terminals send a signal to the process and to its group: within this time it counts once.
SIGINT always counts: a person who types Ctrl-C twice means it."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. `number` is the signal's; the notes say what was saved and what to type."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Deferred:
    """The signal that waits for the end of a step: `number`, or 0. `noted` is called with it when it arrives."""

    noted: Callable[[int], None]
    number: int = 0


class _Handler:
    """The handler of all caught signals. `process`: the whole process is a command, which nothing outlives."""

    def __init__(self) -> None:
        self.deferred: Deferred | None = None
        self.first: float | None = None
        self.process = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            if self.deferred is None:
                raise Interrupted(number)
            self.deferred.number = number
            self.deferred.noted(number)
        elif not self.process:
            raise Interrupted(number)
        elif number == signal.SIGINT or now - self.first > REPEAT_SECONDS:
            # No clean-up: a commit or a checkpoint in flight is no worse off than after SIGKILL, which it withstands.
            os._exit(128 + number)


_handler = _Handler()


@contextmanager
def catch_signals(*, process: bool = False) -> Iterator[None]:
    """Have `SIGNALS` raise `Interrupted` while the block runs. In nested blocks the outermost one counts.

    `process`: the block is all that this process does; a second signal then ends the process instead of raising again.
    Outside the main thread, where python delivers no signal, this does nothing.
    """
    caught = []
    if threading.current_thread() is threading.main_thread():
        found = [(number, signal.getsignal(number)) for number in SIGNALS]
        caught = [pair for pair in found if pair[1] in (signal.SIG_DFL, signal.default_int_handler)]
    if caught:
        _handler.first, _handler.process = None, process
    for number, _ in caught:
        signal.signal(number, _handler)
    try:
        yield
    finally:
        for number, before in caught:
            signal.signal(number, before)


@contextmanager
def defer_signals(noted: Callable[[int], None] = lambda number: None) -> Iterator[Deferred]:
    """Yield where the first signal waits while the block runs; a second one raises `Interrupted` at once.

    Outside the main thread nothing ever waits there.
    """
    deferred, outer = Deferred(noted), _handler.deferred
    with catch_signals():
        if threading.current_thread() is threading.main_thread():
            _handler.deferred = deferred
        try:
            yield deferred
        finally:
            _handler.deferred = outer


@contextmanager
def explain_interrupt(left: Callable[[], str]) -> Iterator[None]:
    """Add what an interrupted block leaves, and what to type, as a note to the exception that ends the block."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(left())
        raise
