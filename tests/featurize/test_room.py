"""Whether there is room: what is still to be written, beside what there is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vla.featurize.job import FeaturizeConfig, Job, prepare, run
from vla.featurize.room import require_room
from vla.featurize.spread import run_on_cluster
from vla.stores.errors import MachineError
from vla.stores.store import open_store


def _job(channels: int = 8) -> Job:
    values = {"source": "synthetic:episodes=4,length=[8,8]", "backbone": "toy", "store": {"unit_rows": 8}}
    return prepare(FeaturizeConfig.build({**values, "options": {"channels": channels}}))


@pytest.fixture
def old(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole store of four units, about 0.1 MB, on a disk that has not a byte more."""
    run(_job(), memory_path / "s")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    return memory_path / "s"


def test_what_is_committed_needs_no_room_unless_it_is_overwritten(old: Path, memory_path: Path) -> None:
    large = _job(8192).plan
    (old / "commits" / "unit-000003.json").rename(memory_path / "unit-000003.json")
    with pytest.raises(MachineError, match=r"has 0\.0 GiB free; expected"):
        require_room(_job().plan, old)
    (memory_path / "unit-000003.json").rename(old / "commits" / "unit-000003.json")
    require_room(_job().plan, old)
    with pytest.raises(MachineError, match=r"GiB free without the old store; expected 0\.0 GiB for 32 frames"):
        require_room(large, old, overwrite=True)
    require_room(large, old, overwrite=True, accept=True)


def test_the_room_of_a_store_that_is_overwritten_is_free_unless_another_name_holds_it(
    old: Path, memory_path: Path
) -> None:
    require_room(_job().plan, old, overwrite=True)
    shutil.copytree(old, memory_path / "kept", copy_function=os.link)
    with pytest.raises(MachineError, match="without the old store"):
        require_room(_job().plan, old, overwrite=True)


@pytest.mark.parametrize("begin", [run, run_on_cluster])
def test_a_store_is_not_overwritten_where_there_is_no_room_for_the_new_one(old: Path, begin: Any) -> None:
    with pytest.raises(MachineError, match="without the old store"):
        begin(_job(8192), old, overwrite=True)
    assert len(open_store(old).commits) == 4
