"""Spellings of one instruction: a head takes every distinct text for a task of its own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def normalised(text: str) -> str:
    """Return a text without what two writers do differently: case, spaces, punctuation, forms of Unicode."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Format characters, such as a zero-width space, part no words.
    seen = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    return " ".join(re.sub(r"[^\w]|_", " ", seen).split())


def same_instructions(texts: Iterable[str]) -> list[list[str]]:
    """Return the groups of distinct texts that are one instruction after `normalised`, in the order of `texts`."""
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(normalised(text), []).append(text)
    return [group for words, group in groups.items() if words and len(group) > 1]
