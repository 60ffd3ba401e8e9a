"""Several processes, one store: one of them writes, the others are told, and readers see nothing but commits.

5 rounds of four writers and two readers, 100 in the long run. See rivals.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RIVALS = Path(__file__).with_name("rivals.py")
SEED = os.environ.get("VLA_FAULT_SEED", "0")


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds of work, minutes on a machine that does something else
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "rounds",
    [pytest.param(5, id=""), pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)], id="long")],
)
def test_of_many_writers_one_writes_and_readers_see_only_commits(memory_path: Path, form: str, rounds: int) -> None:
    environment = {**os.environ, "VLA_FAULT_FORM": form}
    command = [sys.executable, "-W", "error", str(RIVALS), str(memory_path), str(rounds), SEED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == [], done.stderr
    assert report["wrote"] >= rounds
    assert report["refused"] >= rounds  # they did meet
