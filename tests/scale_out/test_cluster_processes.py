"""The processes of a cluster: where they compute, on whose scheduler, and what there has to be for one a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vla.featurize.cluster import open_cluster
from vla.featurize.cores import core_groups
from vla.stores.errors import MachineError, UsageError

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
        folder = ("--local-directory", str(tmp_path), "--nworkers", "1", "--nthreads", "1", "--no-dashboard")
        for name in ("first", "second"):
            running.enter_context(_dask("worker", address, *here, "--name", name, *folder, says="Registered to"))
        code, said = finish("two", "--scheduler", address)
    assert code == 0, said
    assert committed("two") == one
    assert "worker first" in said
    assert "worker second" in said


def test_an_address_without_a_scheduler_is_one_line() -> None:
    with (
        pytest.raises(MachineError, match=r"no scheduler at tcp://127\.0\.0\.1:1"),
        open_cluster(None, "tcp://127.0.0.1:1"),
    ):
        pass


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
