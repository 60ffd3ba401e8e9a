"""Batches on the way to the device."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any, Protocol

import torch

from vla.stores.errors import DataError


class Movable(Protocol):
    """A batch."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Any:
        """Return the batch on `device`."""
        ...


class Feed:
    """Takes batches from a stream and moves them. `waited` sums the seconds spent waiting for the stream."""

    def __init__(self, stream: Iterator[Movable], device: torch.device) -> None:
        self.waited = 0.0
        self._stream, self._device = stream, device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def next(self, step: int) -> Any:
        """Return the next batch on the device. Raises `DataError` where there is none."""
        if self._copied is not None:
            # The memory behind the batch before is refilled once the next one is asked for: its copy has to be done.
            # The copy was queued before that batch's forward pass, so the GPU still has work while this waits.
            self._copied.synchronize()
        began = perf_counter()
        try:
            batch = next(self._stream)
        except StopIteration:
            raise DataError(f"the batches ended at step {step}", expected="batches for ever") from None
        self.waited += perf_counter() - began
        if self._copied is None:
            return batch.to(self._device, non_blocking=False)
        moved = batch.to(self._device, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._device))
        return moved

    def close(self) -> None:
        """End the stream, where it is a generator."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
