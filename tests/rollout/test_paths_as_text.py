"""Every function that a user calls with a path takes it as text too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.distill.checkpoint import load_student
from vla.featurize.distill.teacher import open_teacher
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.registry import open_source
from vla.heads.checkpoint import load_head
from vla.heads.evaluate import evaluate_head
from vla.heads.export import export_head
from vla.heads.fit_fast import FitFastConfig, fit_fast
from vla.heads.groups import train_groups
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.online import OnlineTrainConfig, train_online
from vla.rollout.policy import Policy
from vla.stores.config_files import read_config
from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import CheckpointError, UsageError
from vla.stores.inspect import describe
from vla.stores.norm_stats import norm_stats_of, read_norm_stats, write_norm_stats
from vla.stores.repair import repair_store
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.stores.writer import refuse_existing
from vla.training.checkpoint import load_checkpoint, newest_complete

SOURCE = "synthetic:episodes=3,length=[5,6],cameras=1,image_size=32"


def config(root: Path, kind: type[HeadTrainConfig] = HeadTrainConfig) -> Any:
    model = {"horizon": 2, "encoder": {"dim": 8, "queries": 2}, "hidden": 8}
    train = {"steps": 1, "batch_size": 4, "device": "cpu"}
    return kind.build({"head": "mlp", "data": {"stores": [str(root / "toy")]}, "model": model, "train": train})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a run, a configuration and embeddings."""
    root = tmp_path_factory.mktemp("text")
    run(prepare(FeaturizeConfig(source=SOURCE, backbone="toy")), root / "toy")
    train_head(config(root), root / "run")
    (root / "config.toml").write_text("a = 1\n")
    write_norm_stats(root / "norm_stats.json", norm_stats_of(open_store(root / "toy")))
    (root / "teacher").mkdir()
    for episode in range(3):
        np.save(root / "teacher" / f"episode{episode}.npy", np.zeros((6, 4)))
    return root


def refused(error: type[Exception], call: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a call whose path is understood, and what lies there refused."""

    def read(path: Any) -> None:
        with pytest.raises(error):
            call(path)

    return read


READERS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "open_store": ("toy", open_store),
    "open_source": ("toy", lambda path: open_source(path).digest()),
    "describe": ("toy", describe),
    "verify_store": ("toy", verify_store),
    "repair_store": ("toy", repair_store),
    "read_config": ("config.toml", read_config),
    "from_sources": ("config.toml", refused(UsageError, HeadTrainConfig.from_sources)),
    "read_norm_stats": ("norm_stats.json", read_norm_stats),
    "load_head": ("run", load_head),
    "load_checkpoint": ("run", load_checkpoint),
    "newest_complete": ("run", newest_complete),
    "from_run": ("run", lambda path: Policy.from_run(path, device="cpu")),
    "load_student": ("run", refused(CheckpointError, load_student)),
    "open_teacher": ("teacher", open_teacher),
    "refuse_existing": ("run", refused(UsageError, partial(refuse_existing, resume=False, overwrite=False))),
}


@pytest.mark.parametrize("name", READERS)
def test_a_path_that_is_read_may_be_text(name: str, root: Path) -> None:
    place, read = READERS[name]
    for path in (root / place, str(root / place)):
        read(path)


WRITERS: dict[str, Callable[[Path, Any], object]] = {
    "run": lambda root, out: run(prepare(FeaturizeConfig(source=SOURCE, backbone="toy")), out),
    "train_head": lambda root, out: train_head(config(root), out),
    "train_online": lambda root, out: train_online(config(root, OnlineTrainConfig), out),
    "train_groups": lambda root, out: train_groups(config(root), out),
    "export_head": lambda root, out: export_head(load_head(root / "run"), f"{out}.pt2"),
    "fit_fast": lambda root, out: fit_fast(FitFastConfig(data=config(root).data, horizon=2), out),
    "convert_store": lambda root, out: convert_store(str(root / "toy"), out, ConvertOptions(format="h5")),
    "write_norm_stats": lambda root, out: write_norm_stats(out, norm_stats_of(open_store(root / "toy"))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_path_that_is_written_may_be_text(name: str, root: Path, tmp_path: Path) -> None:
    WRITERS[name](root, str(tmp_path / "out"))
    assert list(tmp_path.iterdir())


def test_other_stores_of_an_evaluation_may_be_text(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "toy", tmp_path / "copy")
    head = load_head(str(root / "run"))
    assert (
        evaluate_head(head, [str(tmp_path / "copy")]).mae.tolist() == evaluate_head(head, [root / "toy"]).mae.tolist()
    )
