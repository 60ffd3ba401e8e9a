"""Two small stores of grids, a teacher that is a function of them, and runs of a small student."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.backbones.registry import BACKBONES
from vla.featurize.backbones.toy import Toy
from vla.featurize.distill.train import DistillConfig, DistillJob, prepare

LENGTHS = (9, 7, 8, 6)
NAMES = tuple(f"episode_{number:06d}" for number in range(len(LENGTHS)))
MODEL = {"dim": 16, "heads": 2, "layers": 1, "dropout": 0.0, "gate_hidden": 8}


@dataclass(frozen=True)
class World:
    """Stores `near` (feature "near", 4 x 4 x 3) and `far` (feature "far", 6 x 6 x 5), and a teacher's folder of .npy.

    `embeddings` {episode: float32 [T, 8]}: a fixed projection of both grids' means.
    """

    root: Path
    near: Path
    far: Path
    teacher: Path
    embeddings: dict[str, NDArray[np.float32]]

    def config(self, **changes: Any) -> DistillConfig:
        """A run of a few steps; `changes` by section, such as train={"steps": 3}."""
        values: dict[str, dict[str, Any]] = {
            "data": {"stores": [str(self.near), str(self.far)], "teacher": str(self.teacher), "validation": 0.25},
            "model": dict(MODEL),
            "train": {"steps": 6, "batch_size": 8, "device": "cpu", "lr": 1e-2, "checkpoint_every": 3, "log_every": 2},
        }
        return DistillConfig.build(
            {name: {**values.get(name, {}), **changes.get(name, {})} for name in values | changes}
        )

    def job(self, **changes: Any) -> DistillJob:
        return prepare(self.config(**changes))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> World:
    root = tmp_path_factory.mktemp("world")
    shapes = {"near": (1, 4, 4, 3), "far": (1, 6, 6, 5)}
    made = {}
    for name, shape in shapes.items():
        made[name] = make_store(
            root / name,
            lengths=LENGTHS,
            ids=NAMES,
            features={name: (shape, "float16")},
            fingerprint={"backbone": {"name": name}, "context": 0},
            provenance={"random_weights": False},
        )
    table, rng = made["near"].episodes, np.random.default_rng(0)
    means = [made[name].features[name].astype(np.float32).mean(axis=(1, 2, 3)) for name in shapes]
    projected = np.concatenate(means, axis=1) @ rng.normal(size=(8, 8)).astype(np.float32)
    embeddings = {}
    (root / "teacher").mkdir()
    for name, start, length in zip(NAMES, table.row_start, table.length, strict=True):
        embeddings[name] = projected[start : start + length]
        np.save(root / "teacher" / f"{name}.npy", embeddings[name])
    return World(root, root / "near", root / "far", root / "teacher", embeddings)


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Shade(Toy):
    """The toy under another name and on another grid, so that both can be joined."""

    def spec(self) -> BackboneSpec:
        spec = super().spec()
        return dataclasses.replace(spec, name="shade", features={"shade": spec.features["grid"]})

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"shade": super().encode(images)["grid"]}


@pytest.fixture
def shade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register backbone "shade"."""
    module: Any = type(sys)("shade_module")
    module.Shade = Shade
    monkeypatch.setitem(sys.modules, "shade_module", module)
    monkeypatch.setitem(BACKBONES, "shade", BACKBONES["toy"]._replace(target="shade_module:Shade"))
