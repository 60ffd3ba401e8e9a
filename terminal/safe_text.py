"""Foreign text made harmless for a terminal. Names, tasks, licences and paths come out of files that others wrote.

An escape sequence in one of them could recolour, overwrite or retitle the terminal, and a bidirectional override could
show a path or a command in another order than it is typed. Such characters are shown as what they are (`\\x1b`).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f"  # bidirectional marks, embeddings, overrides; separators of lines
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible marks and tags
    "\ud800-\udfff]"  # lone surrogates: bytes of a path that are no UTF-8, which no stream encodes
)


def safe(text: str) -> str:
    """Return `text` with every control character, override and lone surrogate written as its escape."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def safe_line(text: str) -> str:
    """Return `text` as `safe` does, on one line: a foreign line feed cannot forge a second message."""
    return safe(text).replace("\n", "\\n")


def safe_json(value: Any) -> str:
    """Return JSON in ASCII: all but DEL is escaped by the format itself."""
    return json.dumps(value, indent=1).replace("\x7f", "\\u007f")


class _SafeFormatter(logging.Formatter):
    """Formats records of the log that no handler takes, which go to stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return safe(super().format(record))


def guard_stderr() -> None:
    """Send what the log, warnings and unexpected errors write to stderr through `safe`. Called once by the command."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_SafeFormatter())
    written = warnings.formatwarning
    warnings.formatwarning = lambda *args, **more: safe(written(*args, **more))
    sys.excepthook = _show_exception


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(safe("".join(traceback.format_exception(kind, error, trace))))
