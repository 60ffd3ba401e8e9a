"""Random numbers: where a run's stream begins, and how it is put away and taken up again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, stream: int = 0) -> None:
    """Seed torch (all devices), numpy and python: independent numbers for each (seed, stream).

    Stream 0 is for whoever initialises a module, 1 + r for its training in process r: initial weights and noise that
    come from the same numbers would not be independent. Both are hashed (numpy's SeedSequence).
    """
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence([seed, stream]).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))  # noqa: NPY002 - libraries may draw from the global generator
    random.seed(int(python_seed))


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators (CPU and current GPU), of numpy's and of python's, JSON-able."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned. A GPU's state is left out on a machine that has none."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def random_aside(seed: int) -> Iterator[None]:
    """Run a block on a stream of its own, and go on afterwards as if it had drawn nothing."""
    before = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random_state(before)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
