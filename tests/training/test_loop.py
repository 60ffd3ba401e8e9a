"""What `fit` does between the first batch and the last checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vla.stores.errors import DataError, MachineError, UsageError
from vla.training.checkpoint import checkpoints, load_checkpoint


def test_two_runs_with_one_seed_are_equal_bit_for_bit(trainee: ModuleType, memory_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(len(name) + ord(name))  # what was drawn before does not matter
        trainee.train(memory_path / name)
    one, two = (load_checkpoint(memory_path / name).folder for name in ("a", "b"))
    assert trainee.content_of(one) == trainee.content_of(two)
    assert trainee.trace_of(memory_path / "a") == trainee.trace_of(memory_path / "b")


def test_another_seed_gives_another_noise(trainee: ModuleType, memory_path: Path) -> None:
    losses = [trainee.train(memory_path / str(seed), config=trainee.config_of(seed=seed)).metrics for seed in (1, 2)]
    assert losses[0]["loss"] != losses[1]["loss"]


def test_two_half_batches_accumulated_equal_one_batch(trainee: ModuleType, memory_path: Path) -> None:
    def whole(first: int, stride: int) -> Any:
        for number in itertools.count(first * 2, 2 * stride):
            halves = [trainee.batch_of(number), trainee.batch_of(number + 1)]
            yield trainee.Numbers(torch.cat([h.x for h in halves]), torch.cat([h.y for h in halves]))

    one = trainee.train(memory_path / "one", trainee.Net(noisy=False), batches=whole)
    config = trainee.config_of(accumulate=2)
    two = trainee.train(memory_path / "two", trainee.Net(noisy=False), config)
    for name in ("loss", "error", "grad_norm"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=1e-5)
    weights = [load_checkpoint(memory_path / name).weights for name in ("one", "two")]
    torch.testing.assert_close(weights[0]["net.0.weight"], weights[1]["net.0.weight"], rtol=0, atol=2e-5)


def test_the_learning_rate_follows_the_schedule(trainee: ModuleType, memory_path: Path) -> None:
    for schedule in ("cosine", "constant"):
        config = trainee.config_of(schedule=schedule, log_every=1, warmup_steps=4, lr=0.5)
        trainee.train(memory_path / schedule, config=config)
        rates = [line["lr"] for line in trainee.trace_of(memory_path / schedule)]
        after = [
            0.5 * (1 + math.cos(math.pi * (k - 4) / 10)) / 2 if schedule == "cosine" else 0.5 for k in range(4, 14)
        ]
        assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, *after])


def test_gradients_are_clipped_to_their_norm_together(trainee: ModuleType, memory_path: Path) -> None:
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))

    hook = register_optimizer_step_pre_hook(measure)
    try:
        trainee.train(memory_path / "run", config=trainee.config_of(grad_clip=0.01, log_every=1))
    finally:
        hook.remove()
    assert norms == pytest.approx([0.01] * 14, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in trainee.trace_of(memory_path / "run"))  # before clipping


def test_groups_of_parameters_have_their_own_settings_and_the_rest_stays(
    trainee: ModuleType, memory_path: Path
) -> None:
    net = trainee.Net()
    before = net.net[0].weight.detach().clone()
    trainee.train(memory_path / "run", net, param_groups=[{"params": list(net.net[3].parameters()), "lr": 0.5}])
    assert torch.equal(net.net[0].weight, before)
    assert not torch.equal(net.net[3].weight, trainee.Net().net[3].weight)
    with pytest.raises(UsageError, match="not the module's"):
        trainee.train(memory_path / "other", net, param_groups=[{"params": list(trainee.Net().parameters())}])


def test_every_line_of_the_log_is_the_mean_since_the_last_one(trainee: ModuleType, memory_path: Path) -> None:
    trainee.train(memory_path / "each", config=trainee.config_of(log_every=1), validate=None)
    trainee.train(memory_path / "mean", config=trainee.config_of(log_every=5), validate=None)
    each = [line["loss"] for line in trainee.trace_of(memory_path / "each")]
    lines = trainee.trace_of(memory_path / "mean")
    assert [line["step"] for line in lines] == [5, 10, 14]
    means = [sum(part) / len(part) for part in (each[:5], each[5:10], each[10:])]
    assert [line["loss"] for line in lines] == pytest.approx(means)
    assert [line["error"] for line in lines] == pytest.approx([2 * mean for mean in means])


def test_speed_and_share_of_waiting_leave_validation_out(
    trainee: ModuleType, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    for module in ("feed", "metrics"):
        monkeypatch.setattr(f"vla.training.{module}.perf_counter", lambda: now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    def slow(first: int, stride: int) -> Any:
        for batch in trainee.batches(first, stride):
            passing(3.0)
            yield batch

    def slow_validation(model: torch.nn.Module, step: int) -> dict[str, float]:
        passing(100.0)
        return {"action_mae": 1.0}

    trainee.train(
        memory_path / "run", trainee.Net(before_loss=lambda call: passing(1.0)), batches=slow, validate=slow_validation
    )
    lines = [json.loads(line) for line in (memory_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [(line["steps_per_s"], line["data_wait_share"]) for line in lines if "loss" in line]
    assert speeds == [(0.25, 0.75)] * 4


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(50, 3), (2, 50)])
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(
    trainee: ModuleType, memory_path: Path, log_every: int, checkpoint_every: int
) -> None:
    def poisoned(first: int, stride: int) -> Any:
        for number in itertools.count(first, stride):
            batch = trainee.batch_of(number)
            yield trainee.Numbers(batch.x, batch.y * (math.nan if number == 4 else 1))

    config = trainee.config_of(log_every=log_every, checkpoint_every=checkpoint_every, validate_every=100)
    with pytest.raises(DataError, match=r"the loss is nan at step 5;"):
        trainee.train(memory_path / "run", config=config, batches=poisoned)
    assert [folder.name for folder in checkpoints(memory_path / "run")] == (
        ["step-00000003"] if log_every == 50 else []
    )


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(trainee: ModuleType, memory_path: Path) -> None:
    class Root(trainee.Net):  # type: ignore[name-defined, misc]
        def loss(self, batch: Any) -> Any:
            loss, parts = super().loss(batch)
            # The square root's slope at 0 is infinite, times 0 is NaN; its value is 0.
            return loss + (torch.sqrt(loss * 0) if int(self.calls) == 14 else 0), parts

    with pytest.raises(DataError, match=r"the gradient's norm is nan at step 14"):
        trainee.train(memory_path / "run", Root())
    assert checkpoints(memory_path / "run")[0].name == "step-00000012"


def test_batches_that_end_are_an_error(trainee: ModuleType, memory_path: Path) -> None:
    with pytest.raises(DataError, match="the batches ended at step 6"):
        trainee.train(memory_path / "run", batches=lambda first, stride: iter([trainee.batch_of(0)] * 5))


def test_validation_sees_averaged_weights_and_does_not_change_the_training(
    trainee: ModuleType, memory_path: Path
) -> None:
    seen: dict[int, torch.Tensor] = {}

    def validate(model: torch.nn.Module, step: int) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen[step] = model.state_dict()["net.0.weight"].clone()
        return trainee.validate(model, step)  # type: ignore[no-any-return]

    trainee.train(memory_path / "with", validate=validate)
    trainee.train(memory_path / "without", validate=None)
    assert sorted(seen) == [3, 5, 6, 9, 10, 12, 14]
    for step in (3, 14):
        folder = memory_path / "with" / "checkpoints" / f"step-{step:08d}"
        assert torch.equal(seen[step], load_file(folder / "ema.safetensors")["net.0.weight"])
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            other = memory_path / "without" / "checkpoints" / folder.name / name
            assert (folder / name).read_bytes() == other.read_bytes()


def test_without_averaging_validation_sees_the_weights_themselves(trainee: ModuleType, memory_path: Path) -> None:
    net = trainee.Net()

    def validate(model: torch.nn.Module, step: int) -> dict[str, float]:
        assert model is net
        assert not model.training
        return {"action_mae": 0.0}

    trainee.train(memory_path / "run", net, trainee.config_of(ema=False), validate=validate)
    assert net.training
    found = load_checkpoint(memory_path / "run")
    assert not found.averaged
    assert torch.equal(found.weights["net.0.weight"], net.net[0].weight)


def test_a_best_metric_that_validation_does_not_give_is_named(trainee: ModuleType, memory_path: Path) -> None:
    with pytest.raises(UsageError, match="'action_mea', did you mean 'action_mae'"):
        trainee.train(memory_path / "run", config=trainee.config_of(best_metric="action_mea"))


def test_the_newest_checkpoints_and_the_best_one_are_kept(trainee: ModuleType, memory_path: Path) -> None:
    figures = {3: 0.5, 6: 0.1, 9: 0.3, 12: math.nan, 14: 0.2}
    report = trainee.train(
        memory_path / "run",
        config=trainee.config_of(keep_checkpoints=2, validate_every=99),
        validate=lambda model, step: {"action_mae": figures[step]},
    )
    assert [folder.name[-2:] for folder in checkpoints(memory_path / "run")] == ["14", "12", "06"]
    assert load_checkpoint(memory_path / "run", which="best").step == 6
    assert load_checkpoint(memory_path / "run").metrics["action_mae"] == report.metrics["action_mae"] == 0.2
    lines = [json.loads(line) for line in (memory_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line["step"] == 12)["action_mae"] is None  # JSON has no NaN


def test_progress_is_told_every_step(trainee: ModuleType, memory_path: Path) -> None:
    told: list[tuple[int, int, float | None]] = []
    trainee.train(
        memory_path / "run", progress=lambda step, total, metrics: told.append((step, total, metrics.get("loss")))
    )
    assert [step for step, _, _ in told] == list(range(1, 15))
    assert {total for _, total, _ in told} == {14}
    assert told[2][2] is None
    assert told[3][2] is not None


def test_the_stream_is_closed_however_the_run_ends(trainee: ModuleType, memory_path: Path) -> None:
    closed = []

    def stream(first: int, stride: int) -> Any:
        try:
            yield from itertools.islice(trainee.batches(first, stride), 20)
        finally:
            closed.append(first)

    trainee.train(memory_path / "run", batches=stream)

    def fail(model: torch.nn.Module, step: int) -> dict[str, float]:
        raise DataError("no")

    with pytest.raises(DataError):
        trainee.train(memory_path / "other", batches=stream, validate=fail)
    assert closed == [0, 0]


# ---- devices ----


def test_bf16_computes_in_bf16_and_keeps_float32_weights(trainee: ModuleType, memory_path: Path) -> None:
    seen = []

    class Watched(trainee.Net):  # type: ignore[name-defined, misc]
        def loss(self, batch: Any) -> Any:
            seen.append(self.net(batch.x).dtype)
            return super().loss(batch)

    trainee.train(memory_path / "half", Watched(), trainee.config_of(precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert load_checkpoint(memory_path / "half").weights["net.0.weight"].dtype == torch.float32
    seen.clear()
    trainee.train(memory_path / "full", Watched())  # another precision in the same process
    assert set(seen) == {torch.float32}


def test_fp16_without_a_gpu_is_refused_before_anything_is_written(trainee: ModuleType, memory_path: Path) -> None:
    with pytest.raises(MachineError, match=r"fp16.*--set train\.precision=no"):
        trainee.train(memory_path / "run", config=trainee.config_of(precision="fp16"))
    assert not (memory_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(trainee: ModuleType, memory_path: Path) -> None:
    with pytest.raises(MachineError, match="'cuda' is not there"):
        trainee.train(memory_path / "run", config=trainee.config_of(device="cuda"))


def test_a_launcher_that_accumulates_behind_our_back_is_refused(
    trainee: ModuleType, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UsageError, match="asks for 4 accumulation steps"):
        trainee.train(memory_path / "run")


def test_trackers_that_are_unknown_or_not_installed_are_refused(
    trainee: ModuleType, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="'tensorbord', did you mean 'tensorboard'"):
        trainee.train(memory_path / "run", config=trainee.config_of(trackers=("tensorbord",)))
    monkeypatch.setattr("vla.training.devices.get_available_trackers", list)
    with pytest.raises(MachineError, match="pip install wandb"):
        trainee.train(memory_path / "run", config=trainee.config_of(trackers=("wandb",)))


def test_a_tracker_is_told_what_the_log_is_told(
    trainee: ModuleType, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking

    told: list[tuple[int, dict[str, float]]] = []

    class Recorder(tracking.GeneralTracker):  # type: ignore[misc]
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert values["warmup_steps"] == 2
            assert all(isinstance(value, (int, float, str, bool)) for value in values.values())

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            assert step is not None
            told.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    for module in ("accelerate.tracking", "vla.training.devices"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    trainee.train(memory_path / "run", config=trainee.config_of(trackers=("tensorboard",)))
    lines = [json.loads(line) for line in (memory_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in told] == lines
