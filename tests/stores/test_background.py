"""Running ahead: order, errors, and a thread that goes when its consumer goes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from vla.stores.background import iterate_ahead


def ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vla-ahead"]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_arrive_in_order_and_all(depth: int) -> None:
    assert list(iterate_ahead(iter(range(100)), depth)) == list(range(100))


def test_an_error_arrives_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    stream = iterate_ahead(items(), 1)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(stream)
    assert not ahead_threads()


@pytest.mark.parametrize("held", [0, 1, 5])
def test_a_consumer_that_stops_early_ends_the_thread_and_closes_the_producer(held: int) -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    stream = iterate_ahead(items(), 2)
    assert [next(stream) for _ in range(held)] == list(range(held))
    stream.close()
    assert closed.is_set() == bool(held)  # never started: nothing to close
    assert not ahead_threads()


def test_a_consumer_that_fails_ends_the_thread() -> None:
    def consume() -> None:
        for item in iterate_ahead(itertools.count(), 2):
            _ = 1 // (item - 3)

    with pytest.raises(ZeroDivisionError):
        consume()
    deadline = time.monotonic() + 2.0
    while ahead_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ahead_threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_ring_of_depth_plus_two_is_never_overwritten_while_held(depth: int) -> None:
    ring = [[-1] for _ in range(depth + 2)]

    def items() -> Iterator[list[int]]:
        for number in range(200):
            buffer = ring[number % len(ring)]
            buffer[0] = number
            yield buffer

    for number, buffer in enumerate(iterate_ahead(items(), depth)):
        if number % 10 == 0:
            time.sleep(0.002)  # let the producer run as far ahead as it may
        assert buffer[0] == number


def test_at_most_depth_plus_one_items_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    stream = iterate_ahead(items(), 3)
    for number in range(10):
        assert next(stream) == number
        time.sleep(0.005)
        assert len(made) <= number + 1 + 3 + 1  # taken, waiting, and one in the producer's hands
    stream.close()
