"""Fill in the tables of the docs that the code knows: `python docs/tables.py` rewrites them where they are."""

from __future__ import annotations

from pathlib import Path

from vla.heads.compatibility import markdown

PAGE = Path(__file__).parent / "heads" / "index.md"
BEGIN, END = "<!-- heads: written by docs/tables.py -->\n", "<!-- end of heads -->"


def filled(page: str) -> str:
    """Return a page with its table of heads as the heads are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(markdown()) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
