"""Errors of work on a local copy name the URL that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla.stores.errors import VlaError


@contextmanager
def named(url: str, root: Path) -> Iterator[None]:
    """Let errors of work on the local folder `root` name `url` instead."""
    try:
        yield
    except VlaError as error:
        if str(root) not in str(error):
            raise
        raise type(error)(
            error.found.replace(str(root), url),
            expected=error.expected.replace(str(root), url),
            fix=error.fix.replace(str(root), url),
        ) from None
