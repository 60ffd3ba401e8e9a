"""Nothing that is not finite is saved, and nothing that was saved so is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla.pretrained.weights import first_not_finite, load_strictly, read_tensors
from vla.stores.errors import CheckpointError, DataError, UsageError
from vla.training.checkpoint import checkpoints, load_checkpoint
from vla.training.config import TrainConfig


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_an_update_that_overflows_the_weights_is_named_and_not_saved(
    trainee: ModuleType, memory_path: Path, validated: bool, ema: bool
) -> None:
    config = trainee.config_of(steps=1, warmup_steps=0, lr=3e38, weight_decay=1.0, ema=ema)
    validate = trainee.validate if validated else None
    with pytest.raises(DataError, match=r"net\.0\.weight .*step 1"):
        trainee.train(memory_path / "run", config=config, validate=validate)
    assert checkpoints(memory_path / "run") == []


@pytest.mark.parametrize("place", ["buffer", "average", "exp_avg", "exp_avg_sq"])
def test_a_number_that_is_not_finite_anywhere_in_the_state_stops_the_run_at_its_next_checkpoint(
    trainee: ModuleType, memory_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla.training.state import TrainState

    update = TrainState.update

    def poison(state: TrainState) -> torch.Tensor:
        norm = update(state)
        if state.step == 4:  # the fifth
            parameter = state.trained[0]
            slots = state.optimizer.state[parameter]
            extra: Any = state.module.extra
            chosen = {"buffer": extra, "average": next(state.averaged.parameters()).data, **slots}[place]
            chosen.view(-1)[1] = math.inf if place == "exp_avg_sq" else math.nan
        return norm

    class Net(trainee.Net):  # type: ignore[name-defined, misc]
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            self.register_buffer("extra", torch.zeros(3))

        def __deepcopy__(self, memo: Any) -> Any:
            return Net()

    monkeypatch.setattr(TrainState, "update", poison)
    with pytest.raises(DataError, match="step 6"):
        trainee.train(memory_path / "run", Net(), trainee.config_of(validate_every=99))
    assert [folder.name for folder in checkpoints(memory_path / "run")] == ["step-00000003"]


def test_a_module_that_is_not_finite_is_refused_before_a_run_is_touched(trainee: ModuleType, memory_path: Path) -> None:
    trainee.train(memory_path / "run", config=trainee.config_of(steps=3))
    net = trainee.Net()
    net.net[3].bias.data[1] = math.nan
    with pytest.raises(DataError, match=r"net\.3\.bias"):
        trainee.train(memory_path / "run", net, overwrite=True)
    assert checkpoints(memory_path / "run")[0].name == "step-00000003"


def test_a_best_checkpoint_is_never_one_whose_metric_is_not_finite(trainee: ModuleType, memory_path: Path) -> None:
    figures = {3: math.nan, 6: math.inf, 9: 0.3, 12: 0.4, 14: -math.inf}
    trainee.train(
        memory_path / "run",
        config=trainee.config_of(validate_every=99),
        validate=lambda model, step: {"action_mae": figures[step]},
    )
    assert json.loads((memory_path / "run" / "best.json").read_bytes())["checkpoint"] == "step-00000009"


def test_a_checkpoint_that_holds_a_number_that_is_not_finite_is_refused_at_load(
    trainee: ModuleType, memory_path: Path
) -> None:
    from vla.training.checkpoint import _FileRecord, digest_file

    trainee.train(memory_path / "run", config=trainee.config_of(steps=3))
    (folder,) = checkpoints(memory_path / "run")
    file = folder / "ema.safetensors"
    tensors = load_file(file)
    tensors["net.0.weight"][2, 1] = -math.inf
    save_file(tensors, file)
    complete = json.loads((folder / "complete.json").read_bytes())
    record = _FileRecord(size=file.stat().st_size, sha256=digest_file(file))
    complete["files"][file.name] = record.model_dump()
    (folder / "complete.json").write_text(json.dumps(complete))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors.*net\.0\.weight"):
        load_checkpoint(memory_path / "run")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_published_weights_that_are_not_finite_are_refused_by_name(memory_path: Path, suffix: str) -> None:
    file = memory_path / f"weights{suffix}"
    network = torch.nn.Linear(3, 2)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, math.nan])}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(DataError, match=r"weights\.\w+.*bias"):
        load_strictly(network, read_tensors(file), file)
    assert bool(network.bias.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    tensors = {
        "whole": torch.ones(2, dtype=torch.int64),
        "empty": torch.ones(0),
        "largest": torch.full((3,), torch.finfo(dtype).max, dtype=dtype),
        "zero": torch.zeros((), dtype=dtype),
    }
    assert first_not_finite(tensors) is None
    assert first_not_finite({}) is None
    bad = torch.ones(2, 3, dtype=dtype)
    bad[1, 2] = value
    assert first_not_finite({**tensors, "bad": bad, "worse": bad}) == "bad"


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay", "ema_power"])
def test_settings_of_the_optimiser_are_finite(field: str) -> None:
    with pytest.raises(UsageError, match=field):
        TrainConfig.build({field: math.inf})
