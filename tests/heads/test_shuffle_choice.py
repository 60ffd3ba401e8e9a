"""Which shuffle a head is trained with: decided by the memory, kept by the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.heads import data as heads_data
from vla.heads.data import DataConfig, open_data
from vla.stores.errors import UsageError
from vla.stores.windows import WindowSpec

BYTES = 75 * 3 * 4 * 2  # the features of the store below


@pytest.fixture
def root(tmp_path: Path, make_store: Callable[..., Any]) -> Path:
    made: Path = make_store(tmp_path / "s", lengths=(20, 30, 25)).root
    return made


@pytest.mark.parametrize(
    ("memory", "asked", "wanted"),
    [
        (2 * BYTES, "auto", "global"),
        (BYTES, "auto", "blocks"),
        (BYTES, "global", "global"),
        (2 * BYTES, "blocks", "blocks"),
    ],
)
def test_blocks_are_chosen_where_the_features_exceed_memory_unless_told_otherwise(
    root: Path, monkeypatch: pytest.MonkeyPatch, memory: int, asked: str, wanted: str
) -> None:
    monkeypatch.setattr(heads_data, "memory_limit", lambda: memory)
    data = open_data(DataConfig.build({"stores": [str(root)], "shuffle": asked}))
    assert data.config.shuffle == wanted  # what the checkpoint keeps
    order = data.batches(data.training, WindowSpec(), 4, pin=False).batches.windows_of_batch(0, 0)
    permutation = np.random.default_rng([0, 0]).permutation(sum(data.stores.first.episodes.length[data.training]))
    assert (order.tolist() == permutation[:4].tolist()) == (wanted == "global")


def test_an_unknown_shuffle_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="shuffle = 'random'"):
        DataConfig.build({"stores": [str(root)], "shuffle": "random"})
