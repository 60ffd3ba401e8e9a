"""Damage of every kind to every kind of file: reading raises, `verify_store` names array, unit and file. Never silent.

12 bit flips a file, 100 a file in the long run; h5 keeps a unit in one file, which gets 50 and 1,000.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores import verify
from vla.stores.errors import CorruptionError, StoreError
from vla.stores.verify import verify_store

UNIT_FILES = (
    "frames/grid/c.1.0.0.0",
    "frames/pooled/c.1.0.0",
    "checksums/grid/c.1",
    "stats/pooled/c.1.0.0",
    "steps/action/c.1.0",
    "steps/done/c.1",
    "steps/clock/c.1.0",
)
TABLE_FILES = (
    "episodes/id/c.0.0",
    "episodes/row_start/c.0",
    "episodes/length/c.0",
    "episodes/task/c.0",
    "tasks/text/c.0.0",
)
GROUP_FILES = tuple(
    f"{group}zarr.json" for group in ("", "frames/", "steps/", "checksums/", "stats/", "episodes/", "tasks/")
)
ARRAY_FILES = tuple(
    f"{array}/zarr.json"
    for array in (
        "frames/grid",
        "frames/pooled",
        "checksums/grid",
        "stats/pooled",
        "steps/action",
        "steps/done",
        "episodes/id",
        "episodes/length",
        "tasks/text",
    )
)
COMMIT = "commits/unit-000001.json"
UNIT_FILES_OF = {"zarr": UNIT_FILES, "h5": ("units/unit-000001.h5",)}
UNIT_CASES = [(form, path) for form, paths in UNIT_FILES_OF.items() for path in paths]
TABLE_GROUPS = tuple(path for path in (*GROUP_FILES, *ARRAY_FILES) if path.startswith(("zarr", "episodes", "tasks")))
EVERY_KIND = {
    "zarr": (*UNIT_FILES, *TABLE_FILES, *GROUP_FILES, *ARRAY_FILES, COMMIT),
    "h5": (*UNIT_FILES_OF["h5"], *TABLE_FILES, *TABLE_GROUPS, COMMIT),
}
CASES = [(form, path) for form, paths in EVERY_KIND.items() for path in paths]
in_every_file = pytest.mark.parametrize(("form", "path"), CASES, indirect=["form"])


def test_the_list_of_kinds_is_complete(whole: Path, form: str) -> None:
    kinds = {path.relative_to(whole).parent.as_posix() for path in whole.rglob("*") if path.is_file()}
    tested = {Path(path).parent.as_posix() for path in EVERY_KIND[form]}
    alike = {"checksums/pooled", "stats/grid", "episodes/row_start", "episodes/task", "steps/clock"}
    if form == "h5":
        alike = {path for path in alike if path.startswith("episodes")}
    assert kinds == tested | alike


@pytest.mark.parametrize("flips", [pytest.param(12, id=""), pytest.param(100, marks=pytest.mark.long, id="long")])
@in_every_file
def test_no_flipped_bit_is_silent(
    root: Path,
    path: str,
    flips: int,
    read_everything: Callable[[Path], dict[str, bytes]],
    require_noticed: Callable[[Path, str, str], None],
) -> None:
    file, before = root / path, read_everything(root)
    good = file.read_bytes()
    rng = np.random.default_rng(len(path))
    count = {12: 50, 100: 1000}[flips] if path.endswith(".h5") else flips
    for bit in rng.choice(len(good) * 8, size=min(count, len(good) * 8), replace=False).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        if path.endswith(".h5"):
            require_noticed_or_unused(root, path, before, read_everything)
        elif path.startswith("frames/") and in_checksum_of_row(path, bit // 8):
            # The reader compares rows with the commit, not with the copy of the checksum beside them.
            assert read_everything(root) == before
            assert any(path in line for line in verify_store(root).findings)
        else:
            require_noticed(root, path, f"bit {bit} of {path}")
    file.write_bytes(good)
    assert read_everything(root) == before


def require_noticed_or_unused(
    root: Path, path: str, before: dict[str, bytes], read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    """HDF5 leaves gaps in a file, and row checksums we do not read: `verify` notices them, a reader need not."""
    refusal = path
    try:
        assert read_everything(root) == before
    except StoreError as error:
        refusal = str(error)
    assert path in refusal
    report = verify_store(root)
    assert report.damaged == [1]
    assert any("array units/unit-000001.h5, unit 1" in line for line in report.findings)


def in_checksum_of_row(path: str, byte: int) -> bool:
    row = {"frames/grid/c.1.0.0.0": 24, "frames/pooled/c.1.0.0": 64}.get(path, 0)
    return row > 0 and byte < 8 * (row + 4) and byte % (row + 4) >= row


@in_every_file
def test_no_truncation_is_silent(root: Path, path: str, require_noticed: Callable[[Path, str, str], None]) -> None:
    size = (root / path).stat().st_size
    for length in sorted({size - 1, size - 4, size // 2, 1, 0}, reverse=True):
        os.truncate(root / path, length)
        require_noticed(root, path, f"{path} cut to {length} of {size} bytes")


@in_every_file
def test_no_appended_byte_is_silent(root: Path, path: str, require_noticed: Callable[[Path, str, str], None]) -> None:
    with (root / path).open("ab") as file:
        file.write(b"\0")
    require_noticed(root, path, f"{path} grown")


@pytest.mark.parametrize(
    ("form", "path"), [case for case in CASES if case[1] not in (COMMIT, "zarr.json")], indirect=["form"]
)
def test_no_missing_file_is_silent(root: Path, path: str, require_noticed: Callable[[Path, str, str], None]) -> None:
    (root / path).unlink()
    require_noticed(root, path, f"{path} removed")


def test_a_store_without_its_root_metadata_is_no_store(
    root: Path, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    (root / "zarr.json").unlink()
    for read in (read_everything, verify_store):
        with pytest.raises(StoreError, match="is no store"):
            read(root)


def test_a_missing_commit_record_means_an_absent_unit(
    root: Path, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    (root / COMMIT).unlink()
    with pytest.raises(StoreError, match="has 2 of 3 units"):
        read_everything(root)
    assert any(line.startswith("units 1 of") for line in verify_store(root).findings)


def test_a_missing_folder_of_commits_is_said(root: Path, read_everything: Callable[[Path], dict[str, bytes]]) -> None:
    shutil.rmtree(root / "commits")
    with pytest.raises(StoreError, match="commits"):
        read_everything(root)
    assert any("commits" in line for line in verify_store(root).findings)


def unit_twin(path: str, unit: int) -> str:
    return path.replace("c.1", f"c.{unit}", 1).replace("unit-000001", f"unit-{unit:06d}")


@pytest.mark.parametrize(("one", "two"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("form", "path"), UNIT_CASES, indirect=["form"])
def test_two_files_of_one_array_swapped_are_noticed(
    root: Path, path: str, one: int, two: int, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    first, second = root / unit_twin(path, one), root / unit_twin(path, two)
    assert first.stat().st_size == second.stat().st_size
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    if first.read_bytes() != second.read_bytes():
        with pytest.raises(CorruptionError):
            read_everything(root)
        report = verify_store(root)
        assert unit_twin(path, one) in " ".join(report.findings)
        assert unit_twin(path, two) in " ".join(report.findings)
        assert report.damaged == [one, two]


def test_two_commit_records_swapped_are_noticed(
    root: Path, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    one, two = root / COMMIT, root / "commits" / "unit-000000.json"
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)
    with pytest.raises(CorruptionError, match=r"unit-00000\d\.json is the record of unit"):
        read_everything(root)
    assert any("is the record of unit" in line for line in verify_store(root).findings)


def swap(one: Path, two: Path) -> None:
    one.rename(one.parent / "aside")
    two.rename(one)
    (one.parent / "aside").rename(two)


@pytest.fixture
def many(memory_path: Path, make_store: Callable[..., Any], form: str) -> Path:
    """A store of seven full units of equal size."""
    root: Path = make_store(memory_path / "many", lengths=(9, 12), unit_rows=3, form={"format": form}).root
    return root


def test_any_two_units_swapped_are_noticed(
    many: Path, form: str, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    """All 21 pairs of the files that hold the rows."""
    before = read_everything(many)
    path = {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form]
    for one, two in itertools.combinations(range(7), 2):
        swap(many / unit_twin(path, one), many / unit_twin(path, two))
        with pytest.raises(CorruptionError):
            read_everything(many)
        report = verify_store(many)
        assert report.damaged == [one, two]
        assert all(any(unit_twin(path, unit) in line for line in report.findings) for unit in (one, two))
        swap(many / unit_twin(path, one), many / unit_twin(path, two))
    assert read_everything(many) == before


def test_any_two_records_swapped_are_noticed(many: Path, read_everything: Callable[[Path], dict[str, bytes]]) -> None:
    for one, two in itertools.combinations(range(7), 2):
        swap(many / unit_twin(COMMIT, one), many / unit_twin(COMMIT, two))
        with pytest.raises(CorruptionError, match=r"is the record of unit"):
            read_everything(many)
        assert verify_store(many).damaged == [one, two]
        swap(many / unit_twin(COMMIT, one), many / unit_twin(COMMIT, two))
    assert verify_store(many).findings == []


@pytest.mark.parametrize("runs", [pytest.param(20, id=""), pytest.param(200, marks=pytest.mark.long, id="long")])
def test_files_and_records_of_older_runs_are_noticed(
    root: Path,
    form: str,
    runs: int,
    make_older: Callable[..., Any],
    memory_path: Path,
    read_everything: Callable[[Path], dict[str, bytes]],
) -> None:
    """The same manifest and sizes, valid in themselves: a file without its record, and a record without its file."""
    rows = {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form]
    for seed in range(1, runs + 1):
        older = make_older(memory_path / "older", seed=seed, units=[1], overwrite=seed > 1).root
        for path in (rows, COMMIT):
            good = (root / path).read_bytes()
            shutil.copy(older / path, root / path)
            with pytest.raises(CorruptionError, match=Path(rows).name if path == rows else "unit 1"):
                read_everything(root)
            report = verify_store(root)
            assert report.damaged == [1]
            assert any("unit 1" in line for line in report.findings)
            (root / path).write_bytes(good)
    assert verify_store(root).findings == []


@pytest.mark.parametrize(
    ("form", "path", "seed"),
    [(form, path, seed) for form, path in UNIT_CASES if not path.startswith("steps") for seed in (1, 2, 3, 4, 5)],
    indirect=["form"],
)
def test_a_stale_file_of_an_older_run_is_noticed(
    root: Path,
    path: str,
    seed: int,
    make_older: Callable[..., Any],
    tmp_path: Path,
    require_noticed: Callable[[Path, str, str], None],
) -> None:
    """Same manifest, same sizes, valid checksums inside: only the commit knows that it is not this run's."""
    older = make_older(tmp_path / "older", seed=seed)
    shutil.copy(older.root / path, root / path)
    require_noticed(root, path, f"stale {path}")


@pytest.mark.parametrize("form", ["zarr"], indirect=True)
def test_a_stale_shard_with_its_stale_checksums_is_noticed(
    root: Path, make_older: Callable[..., Any], tmp_path: Path, require_noticed: Callable[[Path, str, str], None]
) -> None:
    older = make_older(tmp_path / "older")
    for path in ("frames/grid/c.1.0.0.0", "checksums/grid/c.1"):
        shutil.copy(older.root / path, root / path)
    require_noticed(root, "checksums/grid/c.1", "stale shard and checksums")


def test_a_record_copied_from_another_store_is_refused(
    root: Path,
    form: str,
    make_older: Callable[..., Any],
    tmp_path: Path,
    read_everything: Callable[[Path], dict[str, bytes]],
) -> None:
    other = make_older(tmp_path / "other", fingerprint={"backbone": {"layer": -1}})
    for path in (*UNIT_FILES_OF[form], COMMIT):
        shutil.copy(other.root / path, root / path)
    with pytest.raises(CorruptionError, match=r"unit-000001\.json belongs to another store"):
        read_everything(root)


def test_a_record_that_is_a_number_too_far_is_refused(
    root: Path, read_everything: Callable[[Path], dict[str, bytes]]
) -> None:
    shutil.copy(root / COMMIT, root / "commits" / "unit-000003.json")
    with pytest.raises(CorruptionError, match=r"unit-000003\.json"):
        read_everything(root)


@pytest.mark.parametrize(
    ("form", "path"),
    [*UNIT_CASES, *((form, path) for form in EVERY_KIND for path in TABLE_FILES[:2])],
    indirect=["form"],
)
def test_a_file_of_gigabytes_where_data_should_be_is_not_read(
    root: Path, path: str, require_noticed: Callable[[Path, str, str], None]
) -> None:
    os.truncate(root / path, 8 << 30)
    require_noticed(root, path, "8 GiB")


@pytest.mark.parametrize("form", ["zarr"], indirect=True)
def test_verify_counts_what_it_read_and_names_every_damage(root: Path) -> None:
    report = verify_store(root)
    assert (report.units, report.committed, report.to_json()["ok"]) == (3, 3, True)
    assert report.files == 3 * (2 * 3 + 3)
    assert report.bytes == sum(f.stat().st_size for f in root.rglob("c.*") if "s/id" not in str(f)) - sum(
        (root / path).stat().st_size for path in TABLE_FILES if "s/id" not in path
    )
    for path in ("frames/grid/c.0.0.0.0", "steps/action/c.2.0"):
        (root / path).unlink()
    findings = verify_store(root).findings
    assert len(findings) == 2
    assert "array frames/grid, unit 0" in findings[0]
    assert "array steps/action, unit 2" in findings[1]


def test_files_that_belong_to_no_commit_are_named(root: Path, form: str) -> None:
    path = UNIT_FILES_OF[form][0]
    shutil.copy(root / path, root / unit_twin(path, 7))
    (root / "commits/unit-000002.json.partial").touch()
    findings = verify_store(root).findings
    assert any(f"{unit_twin(path, 7)} belongs to no committed unit" in line for line in findings)
    assert any("unit-000002.json.partial" in line for line in findings)


def test_an_error_of_the_disk_while_verifying_is_a_finding(
    root: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> str:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(verify, "digest_open", fail)
    findings = verify_store(root).findings
    assert any(UNIT_FILES_OF[form][0] in line and "input/output error" in line for line in findings)
