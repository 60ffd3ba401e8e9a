"""Ctrl-C during training: noted at once, acted upon at the boundary of a step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Interrupt:
    """While it is entered, the first Ctrl-C only sets `pending`; a second one interrupts wherever the program is.

    Inside a step the weights, the optimiser and the schedule disagree: a checkpoint of that moment would resume to
    other bits. Outside the main thread, where python delivers no signal, and where `active` is False, it does nothing.
    """

    def __init__(self, *, active: bool) -> None:
        self.pending = False
        self._active = active and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        # Only python's own handler is replaced: whoever set another one wants something else to happen.
        self._active = self._active and self._before is signal.default_int_handler
        if self._active:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        signal.signal(signal.SIGINT, self._before)
        log.warning("interrupted: writing a checkpoint after this step (once more to stop at once)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)
