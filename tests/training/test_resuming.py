"""Stopped runs: what they leave, and that going on gives what never stopping would have given."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vla.stores.errors import CheckpointError, UsageError
from vla.stores.interrupt import SIGNALS, Interrupted
from vla.training import loop
from vla.training.checkpoint import checkpoints, newest_complete
from vla.training.devices import accelerated
from vla.training.run_folder import can_resume
from vla.training.seeding import random_aside, random_state, restore_random_state, seed_everything


def stop_at(run: Path, source: Path, step: int) -> None:
    """Make `run` what a killed run leaves that has come as far as the checkpoint of `step`, and a little further."""
    shutil.copytree(source, run)
    for folder in checkpoints(run):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1')  # half a line


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_at_any_checkpoint_equals_never_stopping(
    trainee: ModuleType, memory_path: Path, accumulate: int
) -> None:
    config = trainee.config_of(checkpoint_every=1, accumulate=accumulate)  # the log's windows are of four steps
    trainee.train(memory_path / "whole", config=config)
    for step in range(1, 14):
        run = memory_path / f"stopped-{step}"
        stop_at(run, memory_path / "whole", step)
        report = trainee.train(run, config=config, resume=True)
        assert report.resumed_from == run / "checkpoints" / f"step-{step:08d}"
        for folder in checkpoints(run):
            other = memory_path / "whole" / "checkpoints" / folder.name
            assert trainee.content_of(folder) == trainee.content_of(other), folder.name
        assert trainee.trace_of(run) == trainee.trace_of(memory_path / "whole")
        assert (run / "best.json").read_bytes() == (memory_path / "whole" / "best.json").read_bytes()


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "constant": {"schedule": "constant", "warmup_steps": 3},
    "constant, warm-up unsaid": {"schedule": "constant", "warmup_steps": None, "steps": 20},
    "cosine, warm-up unsaid": {"warmup_steps": None, "steps": 20},
    "no average, accumulated": {"schedule": "constant", "ema": False, "accumulate": 2},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("points", [(1,), (4,), (7,), (13,), (2, 5, 11)])
def test_every_file_of_the_last_checkpoint_is_equal_however_often_the_run_was_interrupted(
    trainee: ModuleType, memory_path: Path, how: str, points: tuple[int, ...], files_of: Any
) -> None:
    config = trainee.config_of(**SCHEDULES[how])
    trainee.train(memory_path / "whole", config=config)
    run = memory_path / "run"
    for point in points:

        def interrupt(step: int, total: int, metrics: dict[str, float], point: int = point) -> None:
            if step == point:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted):
            trainee.train(run, config=config, resume=True, progress=interrupt)
    trainee.train(run, config=config, resume=True)
    assert files_of(newest_complete(run)) == files_of(newest_complete(memory_path / "whole"))
    assert (run / "best.json").read_bytes() == (memory_path / "whole" / "best.json").read_bytes()
    assert trainee.trace_of(run) == trainee.trace_of(memory_path / "whole")


@pytest.mark.parametrize("first", [5, 7, 8, 12])
def test_a_constant_run_that_is_given_more_steps_ends_in_the_bytes_of_one_begun_with_all(
    trainee: ModuleType, memory_path: Path, first: int, files_of: Any
) -> None:
    long = trainee.config_of(schedule="constant", warmup_steps=3)
    trainee.train(memory_path / "whole", config=long)
    trainee.train(memory_path / "run", config=long.model_copy(update={"steps": first}))
    trainee.train(memory_path / "run", config=long, resume=True)
    assert files_of(newest_complete(memory_path / "run")) == files_of(newest_complete(memory_path / "whole"))


def test_a_finished_run_resumes_to_itself(trainee: ModuleType, memory_path: Path) -> None:
    first = trainee.train(memory_path / "run")
    again = trainee.train(memory_path / "run", resume=True)
    timeless = {name: value for name, value in first.metrics.items() if name not in trainee.SPEEDS}
    assert (again.step, again.metrics) == (14, timeless)


def test_before_the_first_checkpoint_resuming_starts_at_the_beginning(trainee: ModuleType, memory_path: Path) -> None:
    trainee.train(memory_path / "whole")
    for run in (memory_path / "never-begun", memory_path / "begun"):
        if run.name == "begun":
            stop_at(run, memory_path / "whole", 0)
        assert not can_resume(run)
        assert trainee.train(run, resume=True).resumed_from is None
        assert trainee.trace_of(run) == trainee.trace_of(memory_path / "whole")
    assert can_resume(memory_path / "begun")


# ---- Ctrl-C, and what schedulers send ----


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_a_step_leaves_a_checkpoint_of_its_end(
    trainee: ModuleType, memory_path: Path, number: signal.Signals
) -> None:
    trainee.train(memory_path / "whole")
    handler = signal.getsignal(number)

    def interrupt(call: int) -> None:
        if call == 8:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as ended:
        trainee.train(memory_path / "run", trainee.Net(before_loss=interrupt))
    assert isinstance(ended.value, KeyboardInterrupt)
    assert ended.value.number == number
    assert "step 8" in "".join(ended.value.__notes__)
    assert signal.getsignal(number) is handler
    assert newest_complete(memory_path / "run").name == "step-00000008"
    trainee.train(memory_path / "run", resume=True)
    assert trainee.trace_of(memory_path / "run") == trainee.trace_of(memory_path / "whole")
    ends = [newest_complete(memory_path / name) for name in ("run", "whole")]
    assert trainee.content_of(ends[0]) == trainee.content_of(ends[1])


@pytest.mark.usefixtures("default_signals")
def test_an_interrupt_between_steps_counts_too(trainee: ModuleType, memory_path: Path) -> None:
    def interrupt(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainee.train(memory_path / "run", progress=interrupt)
    state = json.loads((newest_complete(memory_path / "run") / "state.json").read_bytes())
    assert state["step"] == 7
    assert len(state["window"]["loss"]) == 3  # steps 5, 6 and 7 wait for the line of step 8


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_stops_at_once(trainee: ModuleType, memory_path: Path, second: signal.Signals) -> None:
    def interrupt(call: int) -> None:
        if call == 8:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(second)

    with pytest.raises(Interrupted) as ended:
        trainee.train(memory_path / "run", trainee.Net(before_loss=interrupt))
    assert ended.value.number == second
    assert newest_complete(memory_path / "run").name == "step-00000006"


@pytest.mark.usefixtures("default_signals")
def test_what_is_ignored_or_handled_by_the_program_stays_so(trainee: ModuleType, memory_path: Path) -> None:
    handled = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job in the background
    signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))

    def interrupt(call: int) -> None:
        if call == 5:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
                signal.raise_signal(number)
        if call == 8:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as ended:
        trainee.train(memory_path / "run", trainee.Net(before_loss=interrupt))
    assert (ended.value.number, handled) == (signal.SIGTERM, [signal.SIGUSR1])
    assert newest_complete(memory_path / "run").name == "step-00000008"


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_all_processes_stop_after_the_same_step_though_one_alone_gets_the_signal(
    trainee: ModuleType, memory_path: Path
) -> None:
    script = str(trainee.__file__)
    command = [sys.executable, "-W", "error", script, "ddp-stop", str(memory_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    assert json.loads(done.stdout) == [143, 143], done.stderr[-2000:]
    assert 3 <= int(newest_complete(memory_path / "two").name[5:]) < 200


# ---- SIGKILL ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [pytest.param(10, id=""), pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)], id="long")],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    trainee: ModuleType, memory_path: Path, kills: int
) -> None:
    script = str(trainee.__file__)
    command = [sys.executable, "-W", "error", str(script), "kill", str(memory_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["kills"] >= kills
    assert len(result["resumed_at"]) >= 3, "the kills did not hit different moments"


# ---- what a folder may be used for ----


def test_an_existing_run_is_neither_continued_nor_replaced_unasked(trainee: ModuleType, memory_path: Path) -> None:
    run = memory_path / "run"
    trainee.train(run)
    (run / "vla").mkdir()  # a tracker's
    with pytest.raises(UsageError, match=r"--resume to go on, --overwrite to replace it"):
        trainee.train(run)
    trainee.train(run, config=trainee.config_of(steps=8), overwrite=True)
    assert newest_complete(run).name == "step-00000008"
    assert not (run / "vla").exists()


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_not_a_run_is_left_alone(trainee: ModuleType, memory_path: Path, flag: str) -> None:
    (memory_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(UsageError, match="is not a run"):
        trainee.train(memory_path, **{flag: True})
    assert [path.name for path in memory_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 20),
        ("batch_size", 3),
        ("accumulate", 2),
        ("lr", 0.5),
        ("betas", (0.9, 0.9)),
        ("eps", 1e-3),
        ("weight_decay", 0.1),
        ("schedule", "constant"),
        ("warmup_steps", 0),
        ("grad_clip", 3.0),
        ("precision", "bf16"),
        ("ema", False),
        ("ema_power", 0.5),
        ("ema_max", 0.5),
        ("seed", 7),
    ],
)
def test_resuming_with_other_mathematics_is_refused_by_name(
    trainee: ModuleType, memory_path: Path, field: str, value: Any
) -> None:
    run = memory_path / "run"
    trainee.train(run, config=trainee.config_of(steps=3, warmup_steps=1))
    with pytest.raises(UsageError, match=rf"was begun with .*train\.{field}.*the settings it was begun with"):
        trainee.train(run, config=trainee.config_of(**{"steps": 3, "warmup_steps": 1, field: value}), resume=True)


def test_every_setting_either_decides_the_weights_or_may_change(trainee: ModuleType, memory_path: Path) -> None:
    neutral = {
        "log_every": 2,
        "validate_every": 4,
        "checkpoint_every": 7,
        "keep_checkpoints": 3,
        "best_metric": "error",
        "trackers": (),
        "device": "auto",
        "threads": 0,
    }
    config = trainee.config_of()
    assert set(config.mathematics()) | set(neutral) == set(type(config).model_fields)
    trainee.train(memory_path / "run", config=trainee.config_of(steps=5))
    trainee.train(
        memory_path / "run",
        config=trainee.config_of(**{"steps": 5, **neutral}),
        validate=lambda model, step: {"error": 1.0},
        resume=True,
    )


def test_resuming_with_another_artefact_is_refused_by_name(trainee: ModuleType, memory_path: Path) -> None:
    artefact = {"stores": {"da3": {"sha256": "aa"}}, "scale": float("nan")}
    trainee.train(memory_path / "run", artefact=artefact)
    trainee.train(memory_path / "run", artefact=artefact, resume=True)
    with pytest.raises(UsageError, match=r"artefact\.stores\.da3\.sha256: aa here, bb wanted"):
        trainee.train(memory_path / "run", artefact={**artefact, "stores": {"da3": {"sha256": "bb"}}}, resume=True)


def test_a_constant_schedule_may_be_given_more_steps(trainee: ModuleType, memory_path: Path) -> None:
    long = trainee.config_of(schedule="constant", checkpoint_every=7, log_every=7)
    trainee.train(memory_path / "long", config=long)
    trainee.train(memory_path / "run", config=long.model_copy(update={"steps": 7}))
    trainee.train(memory_path / "run", config=long, resume=True)
    ends = [newest_complete(memory_path / name) for name in ("run", "long")]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


def test_a_constant_schedule_keeps_the_warmup_that_it_was_begun_with(trainee: ModuleType, memory_path: Path) -> None:
    """Unsaid it is a tenth of the steps, so that more steps were another warm-up, and refused."""
    settings = {"schedule": "constant", "checkpoint_every": 5}
    short, long = (trainee.config_of(**settings, steps=steps, warmup_steps=None) for steps in (20, 40))
    trainee.train(memory_path / "run", config=short)
    trainee.train(memory_path / "run", config=long, resume=True)
    trainee.train(memory_path / "run", config=long, resume=True)
    trainee.train(memory_path / "long", config=trainee.config_of(**settings, steps=40, warmup_steps=2))
    ends = [newest_complete(memory_path / name) / "model.safetensors" for name in ("run", "long")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    with pytest.raises(UsageError, match=r"train\.warmup_steps: 2 here, 4 wanted"):
        trainee.train(memory_path / "run", config=long.model_copy(update={"warmup_steps": 4}), resume=True)


def test_what_only_says_where_something_is_may_change(trainee: ModuleType, memory_path: Path) -> None:
    def artefact(place: str, digest: str) -> dict[str, Any]:
        return {
            "data": {"stores": [place]},
            "stores": [{"path": place, "sha256": digest}, {"path": "b", "sha256": "0"}],
        }

    places = ("data.stores", "stores.path")
    trainee.train(memory_path / "run", artefact=artefact("a", "1"), places=places)
    trainee.train(memory_path / "run", artefact=artefact("moved/a", "1"), places=places, resume=True)
    with pytest.raises(UsageError, match="sha256"):
        trainee.train(memory_path / "run", artefact=artefact("a", "2"), places=places, resume=True)


def test_a_checkpoint_of_another_module_is_refused(trainee: ModuleType, memory_path: Path) -> None:
    trainee.train(memory_path / "run", config=trainee.config_of(steps=3, ema=False))
    other = trainee.Net()
    other.net[3] = torch.nn.Linear(16, 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit the module: net\.3\.weight"):
        trainee.train(memory_path / "run", other, trainee.config_of(steps=3, ema=False), resume=True)
    net = trainee.Net()
    groups = [{"params": list(net.net[0].parameters())}]
    with pytest.raises(CheckpointError, match="of other parameters"):
        trainee.train(memory_path / "run", net, trainee.config_of(steps=3, ema=False), param_groups=groups, resume=True)


# ---- the gradient scaler of fp16, on a CPU ----


def test_an_overflowing_gradient_skips_its_step_and_the_run_goes_on(
    trainee: ModuleType, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def scaled(*arguments: Any) -> Iterator[Any]:
        with accelerated(*arguments) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
            yield accelerator

    def steep(first: int, stride: int) -> Iterator[Any]:  # gradients of some 100 times 2^127 are infinite in float32
        return (trainee.Numbers(batch.x, batch.y * 100) for batch in trainee.batches(first, stride))

    monkeypatch.setattr(loop, "accelerated", scaled)
    config = trainee.config_of(steps=40, log_every=1, checkpoint_every=20)
    trainee.train(memory_path / "run", config=config, batches=steep)
    trace = trainee.trace_of(memory_path / "run")
    skipped = [line["step"] for line in trace if "skipped_steps" in line]
    assert skipped[:3] == [1, 2, 3], "the scale was not too high"
    assert len(skipped) < 30
    assert trace[len(skipped)]["lr"] < config.lr  # the schedule waited
    assert trace[-1]["lr"] > 0  # and did not come to its end
    run = memory_path / "again"
    stop_at(run, memory_path / "run", 20)
    trainee.train(run, config=config, resume=True, batches=steep)
    assert trainee.trace_of(run) == trace
    assert trainee.content_of(newest_complete(run)) == trainee.content_of(newest_complete(memory_path / "run"))


# ---- random numbers ----


def draw() -> list[float]:
    normal = float(np.random.normal())  # noqa: NPY002 - every second one comes from the generator's own cache
    return [float(torch.randn(())), normal, random.random(), random.gauss(0, 1)]


def test_random_states_come_back_exactly_through_json() -> None:
    with random_aside(3):
        draw()
        state = json.loads(json.dumps(random_state()))
        expected = [draw() for _ in range(3)]
        seed_everything(99)
        restore_random_state(state)
        assert [draw() for _ in range(3)] == expected


def draw_and_fail() -> None:
    with random_aside(3):
        draw()
        raise ZeroDivisionError


def test_a_block_on_random_numbers_of_its_own_leaves_no_trace() -> None:
    with random_aside(5):
        before = random_state()
        drawn = []
        for _ in range(2):
            with random_aside(3):
                drawn.append(draw())
        assert drawn[0] == drawn[1]
        assert random_state() == before
        with pytest.raises(ZeroDivisionError):
            draw_and_fail()
        assert random_state() == before


def test_processes_and_initial_weights_have_streams_of_their_own() -> None:
    with random_aside(0):
        drawn = []
        for stream in (0, 1, 2):
            seed_everything(42, stream)
            drawn += draw()
        assert len(set(drawn)) == 12


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_equal_one_with_batches_twice_as_large(trainee: ModuleType, memory_path: Path) -> None:
    def double(first: int, stride: int) -> Iterator[Any]:
        number = first
        while True:
            halves = [trainee.batch_of(2 * number), trainee.batch_of(2 * number + 1)]
            yield trainee.Numbers(torch.cat([h.x for h in halves]), torch.cat([h.y for h in halves]))
            number += stride

    script = str(trainee.__file__)
    command = [sys.executable, "-W", "error", script, "ddp", str(memory_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr[-2000:]
    config = trainee.config_of(steps=6, checkpoint_every=3, accumulate=2, log_every=1)
    trainee.train(memory_path / "one", trainee.Net(noisy=False), config, batches=double)
    one, two = trainee.trace_of(memory_path / "one"), trainee.trace_of(memory_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    assert trainee.trace_of(memory_path / "resumed") == two
    ends = [newest_complete(memory_path / name) for name in ("two", "resumed")]
    assert trainee.content_of(ends[0]) == trainee.content_of(ends[1])
