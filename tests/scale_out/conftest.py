"""Runs of `vla featurize` as processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from vla.cli import app
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.errors import VlaError
from vla.terminal.run_app import run_app

SOURCE = "synthetic:episodes=12,length=[16,24],image_size=32"
DELAY_MS = 8.0
"""For each of about 240 frames, asleep: a run takes long enough to be disturbed, and leaves the cores to others."""
ASKED = ("--backbone", "toy", "--set", "store.unit_rows=16", "--set", f"options.delay_ms={DELAY_MS}")


@pytest.fixture
def start(memory_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(name, *flags)` begins `vla featurize` into the store `memory_path / name`."""

    def begin(name: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from vla.cli import main; main()", *_featurize(memory_path, name, *flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)

    return begin


@pytest.fixture
def finish(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`finish(name, *flags, source=…)` runs it to its end in this process: (exit code, what it wrote)."""

    def run(name: str, *flags: str, source: str = SOURCE) -> tuple[int, str]:
        try:
            code = run_app(app, _featurize(memory_path, name, *flags, source=source))
        except VlaError as error:
            return error.exit_code, str(error)
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def committed(memory_path: Path) -> Callable[[str], dict[str, bytes]]:
    """`committed(name)` is every file of a store but its locks."""

    def read(name: str) -> dict[str, bytes]:
        return _files(memory_path / name)

    return read


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the store as one process makes it: 15 units or so."""
    root = tmp_path_factory.mktemp("one") / "s"
    settings = {"source": SOURCE, "backbone": "toy", "options": {"delay_ms": DELAY_MS}}
    run(prepare(FeaturizeConfig.build({**settings, "store": {"unit_rows": 16}})), root)
    return _files(root)


@pytest.fixture
def cluster() -> Iterator[Callable[..., str]]:
    """`cluster(threads=1)` is the address of a scheduler with one worker, which live until the end of the test."""
    from distributed import LocalCluster

    with ExitStack() as running:

        def begin(threads: int = 1) -> str:
            options: dict[str, Any] = {"processes": False, "protocol": "tcp", "host": "127.0.0.1"}
            options |= {"n_workers": 1, "threads_per_worker": threads, "dashboard_address": None}
            local = running.enter_context(LocalCluster(**options))  # type: ignore[no-untyped-call]
            return str(local.scheduler_address)

        yield begin


def _featurize(out: Path, name: str, *flags: str, source: str = SOURCE) -> list[str]:
    return ["featurize", "--source", source, *ASKED, "--out", str(out), "--name", name, *flags]


def _files(root: Path) -> dict[str, bytes]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def workers() -> Callable[[int], list[psutil.Process]]:
    """`workers(pid)` are the worker processes that a run has started."""

    def children(pid: int) -> list[psutil.Process]:
        alive = []
        with suppress(psutil.NoSuchProcess):  # the run itself may end while it is looked at
            for process in psutil.Process(pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # a zombie counts as none
                    if "spawn_main" in " ".join(process.cmdline()):
                        alive.append(process)
        return alive

    return children
