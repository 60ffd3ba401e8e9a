"""The one console of the command line: texts are shown as they are, without markup, and without control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from vla.terminal.safe_text import safe


class SafeConsole(Console):
    """A console whose own colours are kept and whose texts are `safe`. A bracket is no markup, `:x:` no picture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a printed text or a table's cell. Here, before it is measured: an escape is wider than its byte."""
        return super().render_str(safe(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments; what reached a progress bar as `Text` is made safe here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)
