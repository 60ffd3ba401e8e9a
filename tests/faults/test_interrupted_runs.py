"""Death and errors at every moment of a `featurize`: the store is whole, partial or absent, and resumes to equal bytes.

The nightly run sets `VLA_FAULT_KILLS` (8; 200), `VLA_FAULT_STRIDE` (3; 1) and `VLA_FAULT_SEED`. See victim.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VICTIM = Path(__file__).with_name("victim.py")
KILLS = int(os.environ.get("VLA_FAULT_KILLS", "8"))
STRIDE = int(os.environ.get("VLA_FAULT_STRIDE", "3"))
SEED = int(os.environ.get("VLA_FAULT_SEED", "0"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # seconds of work, minutes on a machine that does something else
    pytest.mark.skipif(sys.platform != "linux", reason="forks with threads"),
]


def report_of(*command: object) -> dict[str, Any]:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(("phase", "least"), [("create", 60), ("overwrite", 100), ("commit", 50)])
def test_a_crash_at_any_change_of_the_disk_loses_no_committed_unit(memory_path: Path, phase: str, least: int) -> None:
    report = report_of(sys.executable, VICTIM, "crash", memory_path, phase)
    assert report["failures"] == []
    assert report["operations"] >= least
    assert report["deaths"] >= report["operations"]  # before each operation, and halfway through each write


@pytest.mark.parametrize("phase", ["create", "overwrite", "commit"])
def test_an_error_of_any_file_operation_is_one_line_and_breaks_nothing(memory_path: Path, phase: str) -> None:
    report = report_of(sys.executable, "-W", "error", VICTIM, "error", memory_path, phase, STRIDE)
    assert report["failures"] == []
    assert report["raised"] >= 0.7 * report["operations"] / STRIDE  # a few are looked over: the thing is not needed


def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(memory_path: Path) -> None:
    report = report_of(sys.executable, VICTIM, "kill", memory_path, KILLS, SEED)
    assert report["failures"] == []
    assert report["kills"] >= KILLS
    assert len(report["commits_seen"]) > 1  # the moments were spread over the run


def test_a_disk_that_fills_up_is_one_line_and_breaks_nothing(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare: a file system of one megabyte cannot be made")
    private = [unshare, "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run([*private, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted: a file system of one megabyte cannot be made")
    report = report_of(*private, f"{mount} && exec {sys.executable} {VICTIM} full {tmp_path}")
    assert report["failures"] == []
    assert report["through"]
    assert report["refused"] >= 30
