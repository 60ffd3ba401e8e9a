"""Death and errors at every moment of a `featurize`: the store is whole, partial or absent, and resumes to equal bytes.

In both forms of the store; 12 kills each, 200 in the long run. `VLA_FAULT_SEED` moves the kills. See victim.py.
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
SEED = int(os.environ.get("VLA_FAULT_SEED", "0"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # seconds of work, minutes on a machine that does something else
    pytest.mark.skipif(sys.platform != "linux", reason="forks with threads"),
]


def report_of(*command: object, form: str = "zarr", toy: bool = False) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLA_FAULT_FORM": form, "VLA_FAULT_TOY": str(int(toy))}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# What the phase changes on the disk at least: the h5 form has fewer files.
LEAST = {"zarr": {"create": 60, "overwrite": 100, "commit": 50}, "h5": {"create": 15, "overwrite": 30, "commit": 15}}


LONG = [pytest.mark.long, pytest.mark.timeout(3600)]
PHASES = ("create", "overwrite", "commit")
CRASHES = [  # form, phase, how often, every which operation
    pytest.param("zarr", "commit", "short", 1),
    pytest.param("zarr", "create", "short", 4),  # replacing a store ends with these operations, too
    pytest.param("zarr", "overwrite", "short", 3),
    pytest.param("h5", "commit", "short", 1),  # the rest are the tables alone, and those are zarr's in both forms
    *(pytest.param(form, phase, "long", 1, marks=LONG) for form in ("zarr", "h5", "zstd") for phase in PHASES),
]


@pytest.mark.parametrize(("form", "phase", "when", "stride"), CRASHES, indirect=["form"])
def test_a_crash_at_any_change_of_the_disk_loses_no_committed_unit(
    memory_path: Path, form: str, phase: str, when: str, stride: int
) -> None:
    """Before an operation, halfway through a write, and after the last operation; in the long run after each, too.

    Of a commit, which alone can lose a unit, the short run tries every operation; of the other phases every third or
    fourth. The long run tries all, with torch.
    """
    command = [sys.executable, VICTIM, "crash", memory_path, phase, when, stride]
    report = report_of(*command, form=form, toy=when == "long")
    assert report["failures"] == []
    assert report["operations"] >= LEAST.get(form, LEAST["zarr"])[phase]
    assert report["deaths"] == report["moments"] > report["operations"] / stride


ERRORS = [  # form, phase, every which operation
    *(pytest.param("zarr", phase, 18) for phase in PHASES),
    pytest.param("h5", "commit", 12),
    *(pytest.param(form, phase, 1, marks=LONG) for form in ("zarr", "h5") for phase in PHASES),
]


@pytest.mark.parametrize(("form", "phase", "stride"), ERRORS, indirect=["form"])
def test_an_error_of_any_file_operation_is_one_line_and_breaks_nothing(
    memory_path: Path, form: str, phase: str, stride: int
) -> None:
    command = [sys.executable, "-W", "error", VICTIM, "error", memory_path, phase, stride]
    report = report_of(*command, form=form, toy=stride == 1)
    assert report["failures"] == []
    assert report["raised"] >= 0.6 * report["operations"] / stride  # a few are looked over: the thing is not needed


@pytest.mark.parametrize("kills", [pytest.param(12, id=""), pytest.param(200, marks=LONG, id="long")])
def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(memory_path: Path, form: str, kills: int) -> None:
    report = report_of(sys.executable, VICTIM, "kill", memory_path, kills, SEED, form=form)
    assert report["failures"] == []
    assert report["kills"] >= kills
    assert len(report["commits_seen"]) > 1  # the moments were spread over the run


@pytest.mark.parametrize("stride", [pytest.param(4, id=""), pytest.param(1, marks=LONG, id="long")])
def test_a_disk_that_fills_up_is_one_line_and_breaks_nothing(tmp_path: Path, form: str, stride: int) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare: a file system of one megabyte cannot be made")
    private = [unshare, "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run([*private, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted: a file system of one megabyte cannot be made")
    report = report_of(*private, f"{mount} && exec {sys.executable} {VICTIM} full {tmp_path} {stride}", form=form)
    assert report["failures"] == []
    assert report["through"]
    assert report["refused"] >= 16 / stride
