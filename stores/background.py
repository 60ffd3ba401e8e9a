"""Running an iterator ahead of its consumer in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1
"""How soon a producer notices that its consumer has gone."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def iterate_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield `items`, computed in a thread, at most `depth` of them waiting.

    With the one being made and the one in the consumer's hands, `depth + 2` items exist at a time: a producer that
    cycles through that many buffers never overwrites one in use. An error in the producer is raised here. Closing the
    generator (or leaving its loop by an exception) ends the thread.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    break
            put(_End(None))
        except BaseException as error:  # noqa: BLE001 - the consumer raises it, whatever it is
            put(_End(error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=produce, name="vla-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
