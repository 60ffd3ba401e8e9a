"""The distinct instructions of a source as a source: one episode of one frame each, without pictures or actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vla.featurize.image import Image
from vla.featurize.sources.base import Episode, Source, SourceIndex
from vla.stores.errors import SourceError
from vla.stores.fingerprint import digest

VIEW = "instruction"
"""The one view: text has no cameras."""


class Instructions:
    """What is told in `source`: an episode for each distinct instruction and each other text that it tells of an
    episode (a high-level task, a subtask), in the order of their first use.

    Its id is the text itself, so that a row is found by its text. The digest is that of the texts alone: sources that
    tell the same things share what was made of them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def index(self) -> SourceIndex:
        """See `Source.index`. Raises `SourceError` where an episode has no instruction."""
        return self._index

    @cached_property
    def _index(self) -> SourceIndex:
        index = self._source.index()
        mute = next((episode.id for episode in index.episodes if not episode.task.strip()), None)
        if mute is not None:
            raise SourceError(f"episode {mute!r} of {index.root} has no instruction", expected="a text")
        texts = dict.fromkeys(
            text for episode in index.episodes for text in (episode.task, *episode.texts.values()) if text.strip()
        )
        told = tuple(Episode(text, 1, text) for text in texts)
        return replace(
            index,
            kind="instructions",
            cameras=(VIEW,),
            episodes=told,
            steps={},
            mapping={},
            skipped={},
            extras=(),
            pictures=False,
            sizes={},
        )

    def digest(self) -> str:
        """SHA-256 (hex) of the distinct texts."""
        return digest(sorted(episode.id for episode in self._index.episodes))

    def steps(self, episode: int) -> dict[str, NDArray[np.generic]]:
        """Return nothing: an instruction has no steps."""
        return {}

    def frames(self, episode: int, start: int, stop: int) -> Iterator[tuple[Image, ...]]:
        """Refuse with `SourceError`: an instruction has no pictures."""
        raise SourceError("instructions have no pictures", expected="a backbone of texts")
