"""`vla verify --repair`: what is damaged is dropped and nothing else; resumed, the store equals one never damaged."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vla.stores import repair, verify
from vla.stores.below import HeldFolder
from vla.stores.commits import MAX_RECORD_BYTES
from vla.stores.errors import CorruptionError, MachineError, StoreError
from vla.stores.filesystem import writer_lock
from vla.stores.repair import repair_store
from vla.stores.store import open_store
from vla.stores.verify import verify_store

COMMIT = "commits/unit-000001.json"
ZARR_FILES = (
    "frames/grid/c.1.0.0.0",
    "frames/pooled/c.1.0.0",
    "steps/action/c.1.0",
    "checksums/grid/c.1",
    "stats/pooled/c.1.0.0",
)
UNIT_FILES = [*(("zarr", path) for path in ZARR_FILES), ("h5", "units/unit-000001.h5")]
DAMAGED = [*UNIT_FILES, ("zarr", COMMIT), ("h5", COMMIT)]
Files = Callable[[Path], dict[str, bytes]]
Resume = Callable[[Path], None]


def flip(file: Path, at: int = 7) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def of_unit(path: str, unit: int) -> bool:
    """Whether a file of the test's store belongs to a unit: its chunks, its .h5 file, its record."""
    folder, name = path.split("/")[0], path.split("/")[-1]
    return name.startswith((f"unit-{unit:06d}.", f"c.{unit}")) and folder not in ("episodes", "tasks")


def require_dropped(root: Path, whole: Path, files_of: Files, units: list[int]) -> None:
    """After a repair: these units are gone, all else is as it was, and nothing damaged is left."""
    kept = {path: data for path, data in files_of(whole).items() if not any(of_unit(path, unit) for unit in units)}
    assert files_of(root) == kept
    report = verify_store(root)
    assert (report.missing, report.damaged, report.debris) == (units, [], [])


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    os.truncate(file, 5)


def grow(file: Path) -> None:
    os.truncate(file, MAX_RECORD_BYTES + 1)


@pytest.mark.parametrize(("form", "path"), DAMAGED, indirect=["form"])
@pytest.mark.parametrize("damage", [flip, cut, grow, remove])
def test_a_damaged_unit_is_dropped_and_resumes_to_the_same_bytes(
    root: Path, whole: Path, path: str, damage: Callable[[Path], None], files_of: Files, resume: Resume
) -> None:
    damage(root / path)
    lost = damage is remove and path == COMMIT  # then the unit is not damaged but absent, and its files are debris
    assert verify_store(root).damaged == ([] if lost else [1])
    report = repair_store(root)
    assert report.dropped == ([] if lost else [1])
    assert report.pending == [1]
    require_dropped(root, whole, files_of, [1])
    resume(root)
    assert files_of(root) == files_of(whole)


def test_several_damaged_units_and_debris_go_at_once(
    root: Path, whole: Path, form: str, files_of: Files, resume: Resume
) -> None:
    shard = {"zarr": "frames/grid/c.{}.0.0.0", "h5": "units/unit-{:06d}.h5"}[form]
    flip(root / shard.format(0))
    flip(root / "commits/unit-000002.json")
    (root / "commits/unit-000002.json.partial").touch()
    (root / "steps.partial").mkdir()
    stray = shard.format(7)
    shutil.copy(root / shard.format(1), root / stray)
    report = repair_store(root)
    assert report.dropped == report.pending == [0, 2]
    assert {stray, "commits/unit-000002.json.partial", "steps.partial", shard.format(0)} <= set(report.removed)
    require_dropped(root, whole, files_of, [0, 2])
    resume(root)
    assert files_of(root) == files_of(whole)


def test_a_repair_of_a_sound_store_changes_nothing(root: Path) -> None:
    def state() -> dict[Path, tuple[int, int, int]]:
        return {path: ((s := path.stat()).st_ino, s.st_mtime_ns, s.st_size) for path in root.rglob("*")}

    before = state()
    report = repair_store(root)
    assert (report.dropped, report.removed, report.pending, report.found.findings) == ([], [], [], [])
    assert state() == before


def test_files_that_are_not_the_stores_stay(root: Path) -> None:
    flip(root / COMMIT)
    for name in ("notes.txt", "commits/notes.txt"):
        (root / name).write_text("mine")
    repair_store(root)
    assert (root / "notes.txt").read_text() == (root / "commits/notes.txt").read_text() == "mine"


def test_a_link_in_the_place_of_a_file_goes_and_what_it_points_to_stays(root: Path, form: str, tmp_path: Path) -> None:
    path = root / {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form]
    mine = tmp_path / "mine"
    mine.write_bytes(b"other bytes")
    path.unlink()
    path.symlink_to(mine)
    assert repair_store(root).dropped == [1]
    assert not path.is_symlink()
    assert mine.read_bytes() == b"other bytes"


def test_a_second_record_of_a_damaged_unit_goes_too(root: Path, form: str) -> None:
    """Otherwise the unit would still be committed, by the record under a longer number."""
    shutil.copy(root / COMMIT, root / "commits/unit-0000001.json")
    flip(root / {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form])
    repair_store(root)
    assert sorted(open_store(root, allow_partial=True).commits) == [0, 2]


def test_a_record_of_a_unit_beyond_the_plan_goes_alone(root: Path, whole: Path, files_of: Files) -> None:
    shutil.copy(root / COMMIT, root / "commits/unit-000003.json")
    report = repair_store(root)
    assert (report.dropped, report.pending) == ([3], [])
    assert files_of(root) == files_of(whole)


@pytest.mark.parametrize("path", ["zarr.json", "episodes/zarr.json", "episodes/length/c.0", "tasks/text/c.0.0"])
def test_damaged_metadata_and_tables_are_refused_and_nothing_is_dropped(root: Path, path: str, files_of: Files) -> None:
    flip(root / path, at=3)
    flip(root / COMMIT)
    before = files_of(root)
    with pytest.raises(CorruptionError, match=r"nothing was dropped.*--overwrite") as raised:
        repair_store(root)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files_of(root) == before


def test_a_missing_folder_of_records_is_refused_and_nothing_is_dropped(root: Path, files_of: Files) -> None:
    shutil.rmtree(root / "commits")
    before = files_of(root)
    with pytest.raises(CorruptionError, match=r"commits is missing.*nothing was dropped"):
        repair_store(root)
    assert files_of(root) == before


def test_a_folder_that_is_no_store_is_refused_and_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    with pytest.raises(StoreError, match="is no store"):
        repair_store(tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "commits"]


def test_a_repair_while_another_process_writes_or_repairs_is_refused(root: Path, files_of: Files) -> None:
    flip(root / COMMIT)
    before = files_of(root)
    with writer_lock(root), pytest.raises(StoreError, match="is being written by another process"):
        repair_store(root)
    assert files_of(root) == before


def test_a_second_repair_during_a_first_is_refused(root: Path) -> None:
    flip(root / COMMIT)
    refusals = []

    def again(done: int, total: int) -> None:
        with pytest.raises(StoreError, match="is being written by another process") as raised:
            repair_store(root)
        refusals.append(raised.value)

    assert repair_store(root, again).dropped == [1]
    assert len(refusals) == 2  # once for each unit that was verified


@pytest.mark.parametrize(("code", "drops"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)])
def test_only_what_the_disk_cannot_read_back_is_damage_of_the_store(
    root: Path, files_of: Files, monkeypatch: pytest.MonkeyPatch, code: int, drops: bool
) -> None:
    open_below = verify.open_below

    def fail(root: Path, name: str) -> int:
        if name.endswith(("c.1.0.0.0", "unit-000001.h5")):
            raise OSError(code, os.strerror(code), str(root / name))
        return open_below(root, name)

    monkeypatch.setattr(verify, "open_below", fail)
    before = files_of(root)
    if drops:
        assert repair_store(root).dropped == [1]
    else:
        with pytest.raises(MachineError, match="nothing was dropped"):
            repair_store(root)
        assert files_of(root) == before


def test_death_between_record_and_files_leaves_an_absent_unit(
    root: Path, whole: Path, form: str, files_of: Files, resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(root / {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form])

    def die(held: HeldFolder, name: str) -> bool:
        raise KeyboardInterrupt

    drop = repair.remove_commits

    def then_die(root: Path, units: set[int]) -> None:
        drop(root, units)
        monkeypatch.setattr(HeldFolder, "remove", die)

    monkeypatch.setattr(repair, "remove_commits", then_die)
    with pytest.raises(KeyboardInterrupt):
        repair_store(root)
    monkeypatch.undo()
    assert verify_store(root).missing == [1]
    resume(root)
    assert files_of(root) == files_of(whole)
