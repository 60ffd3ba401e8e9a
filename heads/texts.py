"""What a text store says of instructions, looked up by the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla.heads.batch import TextIO
from vla.stores.errors import DataError, UsageError
from vla.stores.store import Store
from vla.training.storage import as_tensor

INSTRUCTIONS = "instructions"
"""The kind of source that text stores are made from: one row for each distinct instruction, its id the text."""


def is_text_store(store: Store) -> bool:
    """Return whether a store holds instructions rather than demonstrations."""
    return bool(store.manifest.fingerprint.get("source", {}).get("kind") == INSTRUCTIONS)


@dataclass(frozen=True)
class TextRows:
    """Rows of K texts: `ids` int64 [K, L], `mask` bool [K, L], `embedding` float32 [K, L, D] (D is 0 without any)."""

    ids: Tensor
    mask: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class TextTable:
    """One text store."""

    store: Store

    def io(self) -> TextIO:
        """Return its sizes. Raises `UsageError` for a store of instructions that the backbone `text` did not make."""
        features = self.store.manifest.features
        if not {"ids", "mask"} <= features.keys():
            raise UsageError(f"{self.store.place} holds {', '.join(features)}", expected="ids and mask of texts")
        width = features["embedding"].shape[-1] if "embedding" in features else 0
        side = str(self.store.manifest.fingerprint["backbone"].get("side", "left"))
        return TextIO(length=features["ids"].shape[-1], width=width, side=side)

    def rows(self, texts: Sequence[str]) -> TextRows:
        """Look texts up. Raises `DataError` for one that the store does not hold."""
        position = {text: row for row, text in enumerate(self.store.episodes.ids)}
        lacking = [text for text in texts if text not in position]
        if lacking:
            raise DataError(
                f"{self.store.place} has no row for {lacking[0]!r} ({len(lacking)} of {len(texts)} texts)",
                expected="the instructions of the demonstrations",
                fix="vla featurize --backbone text on the same --source",
            )
        rows = self.store.episodes.row_start[[position[text] for text in texts]]
        columns = {name: self._read(name, rows) for name in ("ids", "mask")}
        embedding = self._read("embedding", rows).float() if self.io().width else torch.zeros(len(rows), 0, 0)
        return TextRows(columns["ids"].long(), columns["mask"].bool(), embedding)

    def _read(self, name: str, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        info = self.store.feature_info(name)
        out = np.empty((len(rows), *info.shape), info.stored)
        reader = self.store.reader(name, "always")
        try:
            reader.read(rows, out)
        finally:
            reader.close()
        return as_tensor(out, info.dtype)[:, 0]
