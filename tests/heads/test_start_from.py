"""A head that starts from another run's weights: what has to be the same, so that numbers mean what they meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla.heads.checkpoint import load_head
from vla.heads.train import HeadTrainConfig, train_head, with_head_defaults
from vla.stores.errors import UsageError

ZSCORE = {"action_norm": "zscore", "clip_sample": False}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> dict[str, Path]:
    """Stores of one data set with a feature each, and one whose actions go farther."""
    root = tmp_path_factory.mktemp("stores")
    for name, lengths in (("near", (8, 7)), ("far", (8, 7)), ("longer", (8, 70))):
        make_store(
            root / name,
            lengths=lengths,
            features={"near" if name == "longer" else name: ((1, 3), "float32")},
            fingerprint={"backbone": {"name": name if name == "far" else "near"}, "context": 0},
            provenance={"random_weights": False, "backbone": {"name": name, "weights": None, "options": {}}},
        )
    return {name: root / name for name in ("near", "far", "longer")}


def config_of(*stores: Path, state: tuple[str, ...] = (), start: Path | None = None, **model: Any) -> HeadTrainConfig:
    small = {"net": "mlp", "horizon": 4, "n_action": 2, "hidden": 16, "layers": 1, **model}
    return HeadTrainConfig.build(
        {
            "head": "dp",
            "data": {"stores": list(map(str, stores)), "validation": 0, "state": state},
            "model": small | {"encoder": {"dim": 16, "components": 3, **model.get("encoder", {})}},
            "train": {"steps": 1, "batch_size": 4, "device": "cpu", "warmup_steps": 0},
            "init_from": None if start is None else str(start),
        }
    )


def statistics(path: Path, high: float) -> str:
    one = {"mean": [0.0, 0.0], "std": [1.0, 1.0], "q01": [-high, -high], "q99": [high, high]}
    path.write_text(json.dumps({"norm_stats": {"actions": one, "state": one}}))
    return str(path)


def test_statistics_that_mean_something_else_are_refused_with_what_to_type(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """Deviations under the name of limits, and clipped there: actions were cut off at one deviation."""
    train_head(config_of(stores["near"], **ZSCORE), tmp_path / "one")
    with pytest.raises(UsageError, match=r'action_norm is "limits".*Try: --set model\.action_norm=zscore'):
        train_head(config_of(stores["near"], start=tmp_path / "one"), tmp_path / "two")
    train_head(config_of(stores["near"], start=tmp_path / "one", **ZSCORE), tmp_path / "two")
    assert load_head(tmp_path / "two").config.action_norm == "zscore"


def test_other_columns_of_the_state_are_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    state = ("done", "clock")
    train_head(config_of(stores["near"], state=state, encoder={"state_columns": [0]}), tmp_path / "one")
    other = config_of(stores["near"], state=state, encoder={"state_columns": [1]}, start=tmp_path / "one")
    with pytest.raises(UsageError, match=r"Try: --set model\.encoder\.state_columns=\[0\]"):
        train_head(other, tmp_path / "two")
    named = config_of(stores["near"], state=state, encoder={"state_columns": ["done.0"]}, start=tmp_path / "one")
    train_head(named, tmp_path / "two")


def test_a_statistics_file_counts_by_what_it_holds(stores: dict[str, Path], tmp_path: Path) -> None:
    first, same, other = (statistics(tmp_path / f"{n}.json", high) for n, high in (("a", 9), ("b", 9), ("c", 8)))
    quantile = {"action_norm": "quantile", "clip_sample": False}
    train_head(config_of(stores["near"], norm_stats=first, **quantile), tmp_path / "one")
    start = tmp_path / "one"
    with pytest.raises(UsageError, match=r"c\.json holds other statistics of the action .*norm_stats=.*a\.json"):
        train_head(config_of(stores["near"], norm_stats=other, start=start, **quantile), tmp_path / "two")
    with pytest.raises(UsageError, match=r"norm_stats is null.*Try: --set model\.norm_stats=.*a\.json"):
        train_head(config_of(stores["near"], start=start, **quantile), tmp_path / "two")
    train_head(config_of(stores["near"], norm_stats=same, start=start, **quantile), tmp_path / "two")


def test_limits_that_other_demonstrations_exceed_are_refused_for_clipping(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    train_head(config_of(stores["near"]), tmp_path / "one")
    with pytest.raises(UsageError, match=r"would cut .*% of the actions off.*clip_sample=false"):
        train_head(config_of(stores["longer"], start=tmp_path / "one"), tmp_path / "two")
    train_head(config_of(stores["longer"], start=tmp_path / "one", clip_sample=False), tmp_path / "two")


def test_stores_are_compared_by_their_features_and_the_order_of_features_is_told(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    near, far, start = stores["near"], stores["far"], tmp_path / "one"
    train_head(config_of(near, far), start)
    with pytest.raises(UsageError, match=r"in the order far, near; expected near, far.*Try: --features near,far"):
        train_head(config_of(far, near, start=start), tmp_path / "two")
    config = config_of(far, near, start=start)
    told = config.model_copy(update={"data": config.data.model_copy(update={"features": ("near", "far")})})
    train_head(told, tmp_path / "two")


# ---- going on with the same run --------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_store_that_was_moved(stores: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stores["near"], tmp_path / "here")
    train_head(config_of(tmp_path / "here"), tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    report = train_head(config_of(tmp_path / "there"), tmp_path / "run", resume=True)
    assert report.resumed_from is not None
    with pytest.raises(UsageError, match="begun with other settings"):
        train_head(config_of(stores["longer"]), tmp_path / "run", resume=True)


def test_a_constant_run_that_goes_on_takes_no_warmup_of_its_heads_own() -> None:
    """A head's warm-up of 100 steps is left out of runs that are shorter, and came back with more steps."""
    train = {"steps": 120, "schedule": "constant"}
    config = HeadTrainConfig.build({"head": "mlp", "data": {"stores": ["stores/x"]}, "train": train})
    assert with_head_defaults(config).train.warmup_steps == 100
    assert with_head_defaults(config, begun=True).train.warmup_steps is None


def test_a_best_metric_without_a_validation_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """It was accepted, whatever its name, and no best checkpoint was ever told."""
    settings = config_of(stores["near"]).model_dump(exclude_unset=True)
    settings["train"]["best_metric"] = "nonsense"
    with pytest.raises(UsageError, match=r"best_metric 'nonsense' of a validation that there is not"):
        train_head(HeadTrainConfig.build(settings), tmp_path / "run")
