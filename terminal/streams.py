"""stdout and stderr of the command line where they fail: full, closed, or of an encoding that lacks a character.

stdout carries results, so a result that cannot be written ends the command with exit code 4. stderr carries the log: a
line of the log that cannot be written is dropped, for a full disk below a log must not end a training of two days.
A character that the encoding lacks is written as its escape, such as `\\u4f60`, on both.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from vla.terminal.safe_text import safe_line

STDIN, STDOUT, STDERR = range(3)
ENVIRONMENT_LACKS = 4
"""The exit code of a machine that lacks something, here a place for the result."""


class OutputError(Exception):
    """A result cannot be written to stdout. `reader_left`: a reader such as `head` closed the pipe, which is no fault.

    No OSError, because a command that names the file of every OSError would name a wrong one.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write the result to stdout: {error.strerror}")
        self.reader_left = isinstance(error, BrokenPipeError)


class ResultStream(io.TextIOWrapper):
    """stdout. The first failure raises `OutputError`; what is written after a failure is dropped."""

    failure: OutputError | None = None

    def write(self, text: str, /) -> int:
        """Write text and return its length."""
        with self._failing_once():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Pass what is buffered to the operating system. Python flushes once more as the process ends."""
        with self._failing_once():
            super().flush()

    @contextmanager
    def _failing_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.failure is None:
                self.failure = OutputError(error)
                raise self.failure from None


class LogStream(io.TextIOWrapper):
    """stderr. A line that the operating system refuses is dropped."""

    def write(self, text: str, /) -> int:
        """Write text and return its length."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Pass what is buffered to the operating system."""
        with suppress(OSError):
            super().flush()


def protect_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr` of this process; call once, before anything is written or opened."""
    # A descriptor that the shell closed would be the number of the next file that is opened, and the log would go
    # into a shard. The null device opened for reading refuses what is written, so that a lost result is noticed.
    for descriptor, flags in ((STDIN, os.O_RDONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # returns the lowest free number, which is this one
    if sys.stdout is sys.__stdout__:  # else a caller captures what is written
        sys.stdout = _wrap(sys.stdout, STDOUT, ResultStream)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap(sys.stderr, STDERR, LogStream)


def _wrap(stream: TextIO | None, descriptor: int, kind: type[io.TextIOWrapper]) -> io.TextIOWrapper:
    """Return `kind` over the bytes of a stream; Python has no stream where the descriptor was closed at the start."""
    if not isinstance(stream, io.TextIOWrapper):
        return kind(open(descriptor, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
    lines, through = stream.line_buffering, stream.write_through
    # The replaced stream lives on in `sys.__stdout__` or `sys.__stderr__`, so that its end closes no descriptor.
    return kind(stream.buffer, stream.encoding, "backslashreplace", line_buffering=lines, write_through=through)


def end_output(code: int, error: OutputError | None = None) -> int:
    """Write what is left of the result and return the exit code: `code`, or 4 for 0 where the result cannot be written.

    `error` is the failure that already ended the command. A reader that closed the pipe of stdout changes no code.
    """
    try:
        if error is None:
            sys.stdout.flush()
            # typer drops the exception where it writes an empty text to learn whether the stream takes texts.
            error = getattr(sys.stdout, "failure", None)
    except OutputError as failure:
        error = failure
    if error is None or error.reader_left:
        return code
    sys.stderr.write(f"vla: {safe_line(str(error))}\n")
    return code or ENVIRONMENT_LACKS
