"""Worker processes to featurize on: some of this machine, or those of a dask.distributed cluster that is running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from vla.stores.errors import MachineError, UsageError, missing_extra

PATIENCE = "10s"
"""To wait for a scheduler that does not answer."""

DEATHS = 3
"""Workers that may die over one task before it counts as the cause."""

_DASK = {
    "distributed.scheduler.allowed-failures": DEATHS,
    # What a worker holds is batches and units, not dask's results: dask's limits would stop it for nothing.
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    # Its profiler (100 samples a second), ticks (50) and host statistics take 4 % of every core, idle or not.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "60s",
    # What `keep_freed_memory` does for a process, for the threads that dask computes in: one arena, nothing given back.
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": "1",
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_MAX_": "0",
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


@contextmanager
def open_cluster(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    """Start `workers` worker processes here, or join the cluster at `scheduler`; yield its dask client.

    One worker a GPU where there are GPUs (dask-cuda), else one a group of cores. Raises `MachineError` where a package
    or the scheduler is missing.
    """
    try:
        import dask
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    except ImportError:
        raise MachineError("dask.distributed is not installed", fix=missing_extra("dist")) from None
    with ExitStack() as held:
        held.enter_context(dask.config.set(_DASK))
        address = held.enter_context(_local_cluster(workers or 1)) if scheduler is None else scheduler
        try:
            if scheduler is not None:  # a client that stumbles over its address fails again for 20 s when it is deleted
                get_address_host_port(scheduler)
            client: Any = Client(address, timeout=PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError, TypeError) as error:  # TypeError: TLS that is not configured
            raise MachineError(f"no scheduler at {scheduler}: {error}", expected="tcp://HOST:PORT") from None
        held.enter_context(client)
        if scheduler is None:
            _keep_on_cores(client, workers or 1)
        yield client


def _local_cluster(workers: int) -> Any:
    # One thread a worker: its task overlaps decoding, network and writing by threads of its own.
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    options |= {"host": "127.0.0.1", "silence_logs": 50}
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if workers > gpus:
            raise UsageError(f"--workers {workers}", expected=f"one a GPU: at most {gpus}")
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError:
            found = f"{gpus} GPUs, and dask-cuda is not installed"
            raise MachineError(found, fix="pip install dask-cuda, or CUDA_VISIBLE_DEVICES= for cores") from None
        return LocalCUDACluster(**options)
    from distributed import LocalCluster

    from vla.featurize.cores import core_groups

    # As many threads each, on however many cores: another number would add up in another order.
    threads = min(map(len, core_groups(_own_cores(), workers)), default=1)
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return LocalCluster(processes=True, memory_limit=0, env=environment, **options)  # type: ignore[no-untyped-call]


def _keep_on_cores(client: Any, workers: int) -> None:
    from vla.featurize.cores import StayOnCores, core_groups

    groups = core_groups(_own_cores(), workers)
    if groups and not torch.cuda.is_available():  # dask-cuda has bound its workers to the cores beside their GPU
        client.register_plugin(StayOnCores(groups))


def _own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))
