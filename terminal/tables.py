"""Tables whose words, commands and paths stay whole: what fits no column is shown as a block of lines for each row.

rich shrinks a column until the table fits the screen, and breaks words and commands on the way. A command broken in two
cannot be copied. Columns are therefore measured here, and rich draws lines that are already wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from vla.terminal.safe_text import safe

if TYPE_CHECKING:  # rich is imported when something is shown
    from rich.console import Console
    from rich.text import Text

WORD = re.compile(r'(?:`[^`\n]+`|(?<![^\s\[{(])"(?!\s)[^"\n]*/[^"\n]*"|\[[\d, ]+\]|\S)+')
"""What is never broken: a word, a command in backquotes, a path in quotes, a shape such as [14, 14, 6]."""

INDENT = "  "
"""Before all lines of a block but the first."""

BORDERS = 3
"""Columns of the screen that rich adds to each column of a table: a space on both sides and a line."""


def draw_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    whole: Collection[int] = (),
    sections: Collection[int] = (),
    ruled: bool = False,
) -> None:
    """Print a table, or a block of lines for each row where the screen is too narrow, headed by its first cell.

    No line of a cell in the columns `whole` is wrapped. A rule follows each row in `sections`; every row if `ruled`.
    """
    from rich.table import Table
    from rich.text import Text

    cells = [[_text(cell) for cell in row] for row in rows]
    widths = _fit(columns, cells, whole, console.width - 1)
    if widths is None:
        for row in cells:
            title = Text.assemble(f"{columns[0]} ", row[0])
            first, *rest = title.split() if 0 in whole else wrap(title, console.width - len(INDENT))
            _draw_lines(console, [first, *(Text.assemble(INDENT, line) for line in rest)])
            pairs = list(zip(columns[1:], row[1:], strict=True))
            draw_pairs(console, pairs, indent=INDENT, whole=[at - 1 for at in whole])
        return
    table = Table(show_lines=ruled)
    for column, width in zip(columns, widths, strict=True):
        head = Text("\n").join(wrap(_text(column), width))
        table.add_column(head, width=width, no_wrap=True, overflow="ignore")
    for number, row in enumerate(cells):
        wrapped = [
            Text("\n").join(cell.split(allow_blank=True) if at in whole else wrap(cell, width))
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        table.add_row(*wrapped, end_section=number in sections)
    console.print(table)


def draw_pairs(
    console: Console, pairs: Sequence[tuple[str, str | Text]], *, indent: str = "", whole: Collection[int] = ()
) -> None:
    """Print labels in one column and their values beside them. No line of a value in the pairs `whole` is wrapped."""
    from rich.cells import cell_len
    from rich.text import Text

    side = max((cell_len(label) for label, _ in pairs), default=0)
    for at, (label, value) in enumerate(pairs):
        text = _text(value)
        lines = text.split(allow_blank=True) if at in whole else wrap(text, console.width - len(indent) - side - 2)
        heads = [label, *[""] * (len(lines) - 1)]
        starts = [indent + head + " " * (side - cell_len(head) + 2) for head in heads]
        _draw_lines(console, [Text.assemble(start, line) for start, line in zip(starts, lines, strict=True)])


def wrap(text: Text, width: int) -> list[Text]:
    """Return the lines of a text, broken between words alone; a word wider than `width` is a line of its own."""
    from rich.cells import cell_len

    lines = []
    for line in text.split(allow_blank=True):
        offsets, start = [], 0
        for word in WORD.finditer(line.plain):
            if word.start() > start and cell_len(line.plain[start : word.end()]) > width:
                start = word.start()
                offsets.append(start)
        for part in line.divide(offsets):
            part.rstrip()
            lines.append(part)
    return lines


def _text(cell: str | Text) -> Text:
    from rich.text import Text

    return Text(safe(cell)) if isinstance(cell, str) else cell  # before it is measured: an escape is wider


def _draw_lines(console: Console, lines: Sequence[Text]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True)


def _fit(
    columns: Sequence[str], rows: Sequence[Sequence[Text]], whole: Collection[int], width: int
) -> list[int] | None:
    """Return a width for each column, or None where a word or a whole line would not fit."""
    from rich.cells import cell_len

    widest, least = [], []
    for at, column in enumerate(columns):
        texts = [column, *(row[at].plain for row in rows)]
        lines = [cell_len(line) for text in texts for line in text.splitlines()]
        words = [cell_len(word) for text in texts for word in WORD.findall(text)]
        widest.append(max(lines, default=0))
        least.append(widest[-1] if at in whole else max(words, default=0))
    room = width - BORDERS * len(columns)
    if sum(least) > room:
        return None
    # What is left over goes to the columns one by one, evenly, until each has its widest line on one line.
    while sum(least) < room and least != widest:
        for at, (least_wide, most) in enumerate(zip(least, widest, strict=True)):
            if least_wide < most and sum(least) < room:
                least[at] += 1
    return least
