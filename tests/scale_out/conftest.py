"""Runs of `vla featurize` as processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vla.featurize.job import FeaturizeConfig, prepare, run

SOURCE = "synthetic:episodes=12,length=[16,24],image_size=128"
"""About 240 frames of about 3 ms each: a run takes long enough to be disturbed."""
UNITS = ("--backbone", "toy", "--set", "store.unit_rows=16")


@pytest.fixture
def start(memory_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(name, *flags, source=…)` begins `vla featurize` into the store `memory_path / name`."""

    def begin(name: str, *flags: str, source: str = SOURCE) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from vla.cli import main; main()", "featurize", "--source", source, *UNITS]
        command += ["--out", str(memory_path), "--name", name, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)

    return begin


@pytest.fixture
def finish(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str]]:
    """`finish(name, *flags)` runs it to its end: (exit code, what it said)."""

    def run(name: str, *flags: str, source: str = SOURCE) -> tuple[int, str]:
        process = start(name, *flags, source=source)
        out, said = process.communicate(timeout=100)
        return process.returncode, out + said

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
    run(prepare(FeaturizeConfig.build({"source": SOURCE, "backbone": "toy", "store": {"unit_rows": 16}})), root)
    return _files(root)


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
