"""One store made by several processes: equal bytes, whoever dies, whoever else is at it."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from vla.featurize.job import FeaturizeConfig, prepare
from vla.featurize.launch import Where, launch, outlook
from vla.stores.errors import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Finish = Callable[..., tuple[int, str]]
Start = Callable[..., "subprocess.Popen[str]"]
Committed = Callable[[str], dict[str, bytes]]
Workers = Callable[[int], list[psutil.Process]]


def test_two_workers_write_the_bytes_of_one_process(
    finish: Finish, committed: Committed, one: dict[str, bytes]
) -> None:
    code, said = finish("two", "--workers", "2")
    assert code == 0, said
    assert committed("two") == one
    assert "worker 0" in said
    assert "worker 1" in said


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_resuming_elsewhere_than_a_run_began_gives_the_same_bytes(
    finish: Finish,
    start: Start,
    committed: Committed,
    one: dict[str, bytes],
    memory_path: Path,
    number: signal.Signals,
) -> None:
    begun = start("mixed", "--workers", "2")
    _wait_for_units(memory_path / "mixed", 2, begun)
    begun.send_signal(number)
    begun.communicate(timeout=60)
    assert begun.returncode == 128 + number
    assert 2 <= len(_records(memory_path / "mixed")) < 15
    assert finish("mixed", "--unit-index", "1/2")[0] == 0
    assert finish("mixed", "--resume")[0] == 0
    assert committed("mixed") == one


@pytest.mark.parametrize(
    "kills",
    [pytest.param(2, id=""), pytest.param(25, marks=[pytest.mark.long, pytest.mark.timeout(1800)], id="long")],
)
def test_workers_killed_at_random_moments_cost_nothing_but_time(
    start: Start, committed: Committed, one: dict[str, bytes], workers: Workers, memory_path: Path, kills: int
) -> None:
    chance, killed = random.Random(0), 0
    while killed < kills:
        shutil.rmtree(memory_path / "two", ignore_errors=True)
        run = start("two", "--workers", "2")
        _wait_for_units(memory_path / "two", 1, run)
        while run.poll() is None and killed < kills:
            time.sleep(chance.uniform(0, 0.4))
            alive = workers(run.pid) if run.poll() is None else []
            if alive:
                with suppress(psutil.NoSuchProcess):  # its work was done
                    chance.choice(alive).kill()
                    killed += 1
                made = len(_records(memory_path / "two"))
                # Dask starts others: the next is killed at work, too, unless the run has ended.
                while len(alive) == 1 and run.poll() is None and len(_records(memory_path / "two")) == made:
                    time.sleep(0.02)
        _, said = run.communicate(timeout=200)
        assert run.returncode == 0, said
        assert committed("two") == one


def test_a_killed_scheduler_leaves_commits_and_no_process(
    finish: Finish, start: Start, committed: Committed, one: dict[str, bytes], workers: Workers, memory_path: Path
) -> None:
    run = start("two", "--workers", "2")
    _wait_for_units(memory_path / "two", 2, run)
    left = workers(run.pid)
    assert len(left) == 2
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
    assert finish("two", "--resume")[0] == 0
    assert committed("two") == one


def test_two_runs_at_once_share_the_units_of_a_store(
    start: Start,
    finish: Finish,
    cluster: Callable[..., str],
    committed: Committed,
    one: dict[str, bytes],
    memory_path: Path,
) -> None:
    address = cluster()
    first = start("two", "--workers", "1")
    _wait_for_units(memory_path / "two", 1, first)
    code, said = finish("two", "--scheduler", address, "--resume")
    assert code == 0, said
    _, said = first.communicate(timeout=200)
    assert first.returncode == 0, said
    assert committed("two") == one


def test_a_unit_that_always_fails_is_named_when_all_others_are_made(
    finish: Finish, cluster: Callable[..., str], memory_path: Path, tmp_path: Path
) -> None:
    address = cluster()
    demos = tmp_path / "demos"
    for episode in range(4):
        pictures = demos / f"episode{episode}" / "top"
        pictures.mkdir(parents=True)
        np.save(demos / f"episode{episode}" / "actions.npy", np.zeros((16, 2), np.float32))
        for frame in range(16):
            Image.new("RGB", (32, 32), (episode, frame, 0)).save(pictures / f"{frame:02d}.png")
    broken = demos / "episode2" / "top" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    asked = (str(demos), "--set", "source_options.task=go", "--set", "source_options.fps=10")
    code, said = finish("two", "--scheduler", address, *asked[1:], source=asked[0])
    assert code == 3, said
    assert "unit 2 failed" in said
    assert "03.png" in said
    assert [path.name for path in _records(memory_path / "two")] == [f"unit-00000{unit}.json" for unit in (0, 1, 3)]
    code, said = finish("two", "--scheduler", address, "--resume", "--skip-bad", *asked[1:], source=asked[0])
    assert code == 0, said


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ({"workers": 0}, "1 or more"),
        ({"workers": 2, "unit_index": "0/2"}, "one of them"),
        ({"scheduler": "tcp://127.0.0.1:1", "workers": 2}, "one of them"),
        ({"unit_index": "2/2"}, "i/n"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(where: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Where(**where)


def test_a_share_does_not_replace_a_store_that_others_may_be_filling(memory_path: Path) -> None:
    job = prepare(FeaturizeConfig(source="synthetic", backbone="toy"))
    with pytest.raises(UsageError, match="--overwrite with --unit-index"):
        launch(job, memory_path / "s", Where(unit_index="0/2"), resume=False, overwrite=True, accept=False)


def test_the_plan_of_a_share_foretells_that_share(memory_path: Path) -> None:
    source = "synthetic:episodes=4,length=[10,10]"
    job = prepare(FeaturizeConfig.build({"source": source, "backbone": "toy", "store": {"unit_rows": 10}}))
    how = {"resume": False, "overwrite": False, "accept": False}
    for share, pending in (("0/4", 1), ("1/2", 2), (None, 4)):
        facts = outlook(job, memory_path / "s", Where(unit_index=share))
        assert (facts["pending_units"], facts["pending_frames"]) == (pending, pending * 10)
    launch(job, memory_path / "s", Where(unit_index="0/4"), **how)
    assert outlook(job, memory_path / "s", Where(unit_index="0/4"))["pending_units"] == 0
    assert outlook(job, memory_path / "s", Where(unit_index="0/2"))["pending_units"] == 1


def test_several_processes_write_to_a_folder_alone() -> None:
    job = prepare(FeaturizeConfig(source="synthetic", backbone="toy"))
    with pytest.raises(UsageError, match="a folder that all of them see"):
        launch(job, "s3://bucket/store", Where(workers=2), resume=False, overwrite=False, accept=False)


def _records(root: Path) -> list[Path]:
    return sorted((root / "commits").glob("unit-*.json"))


def _wait_for_units(root: Path, count: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while len(_records(root)) < count:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
