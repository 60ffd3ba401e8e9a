"""The processes of a cluster: where they compute, on whose scheduler, and what there has to be for one a GPU."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla.featurize import spread, worker
from vla.featurize.cluster import open_cluster
from vla.featurize.cores import core_groups
from vla.featurize.job import FeaturizeConfig, Job, prepare, run
from vla.featurize.spread import run_on_cluster
from vla.featurize.units import UnitsReport
from vla.featurize.worker import end_on_worker, make_on_worker
from vla.stores import writer as writer_module
from vla.stores.errors import MachineError, StoreError, UsageError
from vla.stores.filesystem import explaining, writer_lock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("cores", "workers", "groups"),
    [
        ([0, 1], 2, [[0], [1]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3, 4]]),
        ([4, 6, 8], 1, [[4, 6, 8]]),
        ([0, 1], 3, []),
    ],
)
def test_cores_are_divided_among_workers(cores: list[int], workers: int, groups: list[list[int]]) -> None:
    assert core_groups(cores, workers) == groups


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_each_worker_stays_on_its_own_cores_and_so_does_the_one_that_replaces_it() -> None:
    def cores_of_threads() -> tuple[int, list[set[int]]]:  # on a worker: its process, where each of its threads may be
        return os.getpid(), [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]

    def bound(client: Any) -> dict[int, list[set[int]]]:
        """The cores of every thread of every worker, by process; nothing while one of them dies."""
        with suppress(OSError):
            return dict(client.run(cores_of_threads).values())
        return {}

    with open_cluster(2, None) as client:
        first = bound(client)
        assert len(first) == 2
        for cores in first.values():
            assert all(each == cores[0] for each in cores)
        assert len({frozenset(cores[0]) for cores in first.values()}) == 2
        os.kill(min(first), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(second := bound(client)) < 2 or min(first) in second:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert {frozenset(cores[0]) for cores in second.values()} == {frozenset(cores[0]) for cores in first.values()}


@contextmanager
def _dask(*command: str, says: str = "") -> Iterator[str]:
    """Run a dask process; yield the line of its log that holds `says`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        yield next(line for line in process.stdout if says in line)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_workers_of_a_running_scheduler_write_the_bytes_of_one_process(
    finish: Callable[..., tuple[int, str]],
    committed: Callable[[str], dict[str, bytes]],
    one: dict[str, bytes],
    tmp_path: Path,
) -> None:
    with ExitStack() as running:
        here = ("--host", "127.0.0.1")
        line = running.enter_context(_dask("scheduler", *here, "--port", "0", "--no-dashboard", says="Scheduler at:"))
        address = line.split()[-1]
        folder = ("--local-directory", str(tmp_path), "--no-nanny", "--nthreads", "1", "--no-dashboard")
        for name in ("first", "second"):
            running.enter_context(_dask("worker", address, *here, "--name", name, *folder, says="Registered to"))
        code, said = finish("two", "--scheduler", address)
    assert code == 0, said
    assert committed("two") == one
    assert "worker first" in said
    assert "worker second" in said


def test_an_address_without_a_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla.featurize.cluster.PATIENCE", "1s")
    with (
        pytest.raises(MachineError, match=r"no scheduler at tcp://127\.0\.0\.1:1"),
        open_cluster(None, "tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize("address", ["", "foo", "tcp://foo", "tpc://127.0.0.1:1", "tcp://127.0.0.1:port"])
def test_what_is_no_address_is_one_line_and_leaves_no_client(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.Client.__init__", lambda *_, **__: pytest.fail("a client was made"))
    with (
        pytest.raises(MachineError, match=r"no scheduler at .*; expected tcp://HOST:PORT"),
        open_cluster(None, address),
    ):
        pass


def test_a_scheduler_that_is_not_there_leaves_everything_as_it_is(job: Job, memory_path: Path) -> None:
    for resume, overwrite in ((False, False), (True, False)):
        with pytest.raises(MachineError, match="no scheduler at foo"):
            run_on_cluster(job, memory_path / "s", scheduler="foo", resume=resume, overwrite=overwrite)
        assert list(memory_path.iterdir()) == []
    run(job, memory_path / "s")
    with pytest.raises(MachineError, match="no scheduler at foo"):
        run_on_cluster(job, memory_path / "s", scheduler="foo", overwrite=True)
    assert _units(memory_path / "s") == 4


@pytest.fixture
def job() -> Job:
    settings = {"source": "synthetic:episodes=4,length=[8,8]", "backbone": "toy", "store": {"unit_rows": 8}}
    return prepare(FeaturizeConfig.build(settings))


def _units(root: Path) -> int:
    return len(list((root / "commits").glob("unit-*.json")))


def test_workers_that_outlive_a_run_hold_neither_its_store_nor_its_lock(
    job: Job, cluster: Callable[..., str], memory_path: Path
) -> None:
    root, address = memory_path / "s", cluster()
    run_on_cluster(job, root, scheduler=address)
    with writer_lock(root):
        pass
    run_on_cluster(job, root, scheduler=address, overwrite=True)
    shutil.rmtree(root)
    assert run_on_cluster(job, root, scheduler=address).units == _units(root) == 4


def test_a_worker_of_several_threads_makes_the_units_of_one_task_at_a_time(
    cluster: Callable[..., str], memory_path: Path
) -> None:
    values = {"source": "synthetic:episodes=20,length=[2,2]", "backbone": "toy", "store": {"unit_rows": 2}}
    report = run_on_cluster(prepare(FeaturizeConfig.build(values)), memory_path / "s", scheduler=cluster(threads=4))
    assert report.units == _units(memory_path / "s") == 20


def test_a_store_that_is_replaced_under_a_worker_is_made_anew(
    job: Job, cluster: Callable[..., str], memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run that was killed: nobody told the worker that it is over."""
    root, address = memory_path / "s", cluster()
    with monkeypatch.context() as patch:
        patch.setattr(spread, "_end", lambda *_: None)
        run_on_cluster(job, root, scheduler=address)
    with pytest.raises(StoreError, match="another process"), writer_lock(root):
        pass
    shutil.rmtree(root)
    assert run_on_cluster(job, root, scheduler=address).units == _units(root) == 4


def test_a_worker_without_tasks_lets_go_of_a_store_by_itself(
    job: Job, cluster: Callable[..., str], memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run that was killed."""
    monkeypatch.setattr(spread, "_end", lambda *_: None)
    monkeypatch.setattr(worker, "LINGER_SECONDS", 0.05)
    run_on_cluster(job, memory_path / "s", scheduler=cluster())
    deadline, free = time.monotonic() + 60, False
    while not free and time.monotonic() < deadline:
        with suppress(StoreError), writer_lock(memory_path / "s"):
            free = True
        time.sleep(0.01)
    assert free


def test_a_source_that_has_changed_makes_another_store_on_the_same_workers(
    cluster: Callable[..., str], memory_path: Path, tmp_path: Path
) -> None:
    values = {"source": str(tmp_path), "backbone": "toy", "source_options": {"task": "go", "fps": 10}}
    (tmp_path / "episode0" / "top").mkdir(parents=True)
    np.save(tmp_path / "episode0" / "actions.npy", np.zeros((2, 2), np.float32))
    address = cluster()
    for name, red in (("before", 0), ("after", 255)):
        for frame in range(2):
            picture = np.full((32, 32, 3), (red, frame, 0), np.uint8)
            Image.fromarray(picture).save(tmp_path / "episode0" / "top" / f"{frame}.png")
        run_on_cluster(prepare(FeaturizeConfig.build(values)), memory_path / name, scheduler=address)
    before, after = (next((memory_path / name / "frames/grid").glob("c*")) for name in ("before", "after"))
    assert before.read_bytes() != after.read_bytes()


def test_a_disk_that_is_full_on_a_worker_ends_the_run_at_once(
    job: Job, cluster: Callable[..., str], memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(path: Path, parts: Any) -> str:
        tried.append(path)
        with explaining(path):
            raise OSError(errno.ENOSPC, "no space", str(path))

    monkeypatch.setattr(writer_module, "write_atomic_parts", full)
    with pytest.raises(MachineError, match="the disk is full") as raised:
        run_on_cluster(job, memory_path / "s", scheduler=cluster())
    assert raised.value.exit_code == 4
    assert len(tried) <= 4  # no unit twice; other tasks may have begun before the first was heard of


def test_a_task_of_a_run_that_is_over_makes_nothing(job: Job, cluster: Callable[..., str], memory_path: Path) -> None:
    task = (job.config.model_dump(mode="json"), str(memory_path / "s"), "plan", "over", [0])
    with open_cluster(None, cluster()) as client:
        client.run(end_on_worker, "over")
        assert client.submit(make_on_worker, *task, pure=False).result()["elsewhere"] == [0]
    assert not (memory_path / "s").exists()


def test_a_run_whose_units_are_missing_at_the_end_does_not_succeed(
    job: Job, cluster: Callable[..., str], memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "make_on_cluster", lambda *_: UnitsReport())
    with pytest.raises(StoreError, match=r"lacks units 0, 1, 2, 3.*a folder that all workers see"):
        run_on_cluster(job, memory_path / "s", scheduler=cluster())


class _Gpus:
    """Stands where `dask_cuda.LocalCUDACluster` would, on a machine that says it has GPUs."""

    def __init__(self, n_workers: int, threads_per_worker: int, **options: Any) -> None:
        raise _AskedFor(n_workers, threads_per_worker)


class _AskedFor(Exception):  # noqa: N818
    """What the cluster was asked for."""


def test_with_gpus_there_is_one_worker_each_through_dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=_Gpus))
    with pytest.raises(_AskedFor) as asked, open_cluster(2, None):
        pass
    assert asked.value.args == (2, 1)
    with pytest.raises(UsageError, match="at most 2"), open_cluster(3, None):
        pass
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(MachineError, match="dask-cuda is not installed"), open_cluster(2, None):
        pass
