"""One writer, whole units, and nothing deleted that is not a store."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import CorruptionError, DataError, FingerprintError, SourceError, StoreError, UsageError
from vla.stores.filesystem import writer_lock
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer


def writer_of(made: Any, **options: bool) -> Any:
    return open_writer(made.root, made.manifest, made.episodes, **options)


def ones(made: Any, count: int, value: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.full((count, *info.shape), value, np.float32) for name, info in made.manifest.features.items()}


# ---- existing output: refuse, resume, overwrite ----


def test_existing_output_is_refused_naming_the_ways_out(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s")
    with pytest.raises(UsageError, match=r"exists\. Try: --resume .*--overwrite"), writer_of(made):
        pass
    assert made.open().complete


def test_resume_writes_only_what_is_missing(
    tmp_path: Path, make_store: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    make_store(tmp_path / "whole")
    made = make_store(tmp_path / "s", units=[1])
    before = {path: path.stat() for path in tmp_path.joinpath("s").rglob("c.1*")}
    with writer_of(made, resume=True) as writer:
        assert writer.pending() == [0, 2]
        with pytest.raises(StoreError, match=r"unit 1 of .* is committed"):
            writer.begin(1)
    make_store(tmp_path / "s", resume=True)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in before} == {path: stat.st_ino for path, stat in before.items()}


def test_resume_of_nothing_begins(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    assert make_store(tmp_path / "deep" / "down" / "s", resume=True).open().complete


def test_resume_sweeps_what_an_interrupted_run_left(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0])
    (tmp_path / "s" / "frames" / "grid" / "c.1.0.0.0.partial").write_bytes(b"half")
    (tmp_path / "s" / "commits" / "unit-000001.json.partial").write_bytes(b"half")
    (tmp_path / "s" / "steps.partial").mkdir()
    (tmp_path / "s" / "steps.partial" / "zarr.json.partial").touch()
    assert any("partial" in line for line in verify_store(tmp_path / "s").findings)
    with writer_of(made, resume=True):
        pass
    assert not list(tmp_path.rglob("*.partial"))


def test_overwrite_replaces_a_store(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    make_store(tmp_path / "s", seed=0)
    made = make_store(tmp_path / "s", seed=1, source="another", overwrite=True)
    np.testing.assert_array_equal(made.open().read("grid", np.arange(20)), made.features["grid"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
@pytest.mark.parametrize("kind", ["photos", "empty", "file", "foreign zarr"])
def test_a_folder_that_is_no_store_is_never_touched(
    tmp_path: Path,
    make_store: Callable[..., Any],
    files_of: Callable[[Path], dict[str, bytes]],
    flags: dict[str, bool],
    kind: str,
) -> None:
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("thesis")
    else:
        target.mkdir()
    if kind == "photos":
        (target / "cat.jpg").write_text("cat")
    if kind == "foreign zarr":
        import zarr

        zarr.create_group(target, zarr_format=3)
    before = files_of(tmp_path)
    with pytest.raises(StoreError):
        make_store(target, **flags)
    assert files_of(tmp_path) == before
    assert target.exists()


@pytest.mark.parametrize("name", ["s.partial", "s.old.partial"])
def test_a_folder_beside_the_store_that_is_no_debris_of_ours_is_never_deleted(
    tmp_path: Path, make_store: Callable[..., Any], name: str
) -> None:
    precious = tmp_path / name / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("thesis")
    with pytest.raises(StoreError, match=r"holds thesis\.tex"):
        make_store(tmp_path / "s")
    assert precious.read_text() == "thesis"


def test_what_an_interrupted_overwrite_left_is_removed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    make_store(tmp_path / "s").root.rename(tmp_path / "s.old.partial")
    make_store(tmp_path / "s.new").root.rename(tmp_path / "s.partial")
    assert make_store(tmp_path / "s", resume=True).open().complete
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_behind_a_link_is_replaced_where_it_lies(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    (tmp_path / "big-disk").mkdir()
    make_store(tmp_path / "big-disk" / "s")
    (tmp_path / "s").symlink_to(tmp_path / "big-disk" / "s")
    made = make_store(tmp_path / "s", seed=1, overwrite=True)
    assert (tmp_path / "s").is_symlink()
    store = open_store(tmp_path / "big-disk" / "s")
    np.testing.assert_array_equal(store.read("grid", np.arange(20)), made.features["grid"])


def test_a_name_reserved_for_debris_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"ends in '\.partial'"):
        make_store(tmp_path / "s.partial")


def test_a_damaged_store_is_not_resumed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0])
    metadata = tmp_path / "s" / "frames" / "grid" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("float16", "float32"))
    with pytest.raises(CorruptionError, match="data_type is 'float32'"), writer_of(made, resume=True):
        pass


def test_resume_with_other_settings_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    make_store(tmp_path / "s", units=[0])
    with pytest.raises(FingerprintError, match=r"source\.digest"):
        make_store(tmp_path / "s", source="another", resume=True)


# ---- one writer ----


def test_a_second_writer_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[])
    with writer_of(made, resume=True) as first:
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(StoreError, match="being written by another process"), writer_of(made, **flags):
                pass
        assert first.pending() == [0, 1, 2]
    with writer_of(made, resume=True):
        pass


LOCKER = """
import sys, pathlib
from vla.stores.filesystem import writer_lock
with writer_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_writer_is_free_again(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[])
    command = [sys.executable, "-c", LOCKER, str(made.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another process"), writer_of(made, resume=True):
            pass
        child.kill()
        child.wait()
    with writer_of(made, resume=True):
        pass


def test_a_store_replaced_between_opening_and_locking_is_not_taken_for_the_new_one(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = make_store(tmp_path / "s", units=[]), fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        made.root.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", made.root)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreError, match="written by another process"), writer_lock(made.root):
        pass


def test_a_file_system_without_locks_is_said_in_one_line(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla.stores.errors import MachineError

    made = make_store(tmp_path / "s", units=[])

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(MachineError, match="No locks available"), writer_of(made, resume=True):
        pass


def test_a_store_that_appears_while_another_is_being_made_is_not_mixed_with_it(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes begin at once: the one that comes second finds a store that is not its own, and is refused."""
    from vla.stores import writer

    create = writer._create

    def late(root: Path, *rest: Any) -> None:
        monkeypatch.setattr(writer, "_create", create)
        make_store(root, source="first")
        create(root, *rest)

    monkeypatch.setattr(writer, "_create", late)
    with pytest.raises(StoreError):
        make_store(tmp_path / "s", source="second")
    store = open_store(tmp_path / "s")
    assert store.manifest.fingerprint["source"]["digest"] == "first"
    assert verify_store(tmp_path / "s").findings == []
    assert not list(tmp_path.rglob("*.partial"))


def test_a_reader_sees_what_was_committed_when_it_opened(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0])
    early = made.open(allow_partial=True)
    with writer_of(made, resume=True) as writer:
        buffer = writer.begin(1)
        buffer.put(8, {"grid": made.features["grid"][8:16].astype(np.float32)})
        during = made.open(allow_partial=True)
        writer.commit(buffer)
    for store in (early, during):
        assert sorted(store.commits) == [0]
        with pytest.raises(StoreError, match=r"unit 1 .* not committed"):
            store.read("grid", np.array([8]))
    late = made.open(allow_partial=True)
    assert sorted(late.commits) == [0, 1]
    np.testing.assert_array_equal(late.read("grid", np.arange(16)), made.features["grid"][:16])


# ---- what a unit may hold ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused_naming_the_row(
    tmp_path: Path, make_store: Callable[..., Any], value: float, dtype: str
) -> None:
    made = make_store(tmp_path / "s", features={"grid": ((1, 3, 4), dtype)}, units=[0])
    with writer_of(made, resume=True) as writer:
        buffer, values = writer.begin(1), ones(made, 5)
        values["grid"][2, 0, 1, 3] = value
        with pytest.raises(DataError, match=r"feature 'grid' is not finite in row 11"):
            buffer.put(9, values)
    assert sorted(made.open(allow_partial=True).commits) == [0]


@pytest.mark.parametrize("value", [65520.0, -70000.0, 3e38])
def test_values_above_float16_are_refused_naming_the_row(
    tmp_path: Path, make_store: Callable[..., Any], value: float
) -> None:
    made = make_store(tmp_path / "s", units=[0])
    with writer_of(made, resume=True) as writer:
        buffer, values = writer.begin(1), ones(made, 4)
        values["grid"][3, 0, 0, 0] = value
        with pytest.raises(DataError, match=r"exceeds float16 in row 11; expected \|x\| <= 65504.*--dtype float32"):
            buffer.put(8, values)


def test_the_largest_float16_is_kept(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", lengths=(3,), unit_rows=3, units=[])
    with writer_of(made, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.put(0, ones(made, 3, -65504.0))
        writer.commit(buffer)
    assert float(made.open().read("grid", np.arange(3)).min()) == -65504.0


@pytest.mark.parametrize(
    ("start", "shapes"),
    [
        (8, {}),
        (8, {"grid": (4, 1, 3, 4)}),
        (8, {"grid": (4, 1, 3, 4), "pooled": (4, 2, 8), "extra": (4, 1)}),
        (8, {"grid": (4, 1, 1, 4), "pooled": (4, 2, 8)}),
        (8, {"grid": (4, 1, 3, 4), "pooled": (3, 2, 8)}),
        (8, {"grid": (1, 3, 4), "pooled": (1, 2, 8)}),
        (7, {"grid": (4, 1, 3, 4), "pooled": (4, 2, 8)}),
        (14, {"grid": (4, 1, 3, 4), "pooled": (4, 2, 8)}),
    ],
)
def test_features_of_other_names_shapes_or_rows_are_refused(
    tmp_path: Path, make_store: Callable[..., Any], start: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    features = {"grid": ((1, 3, 4), "float16"), "pooled": ((2, 8), "float32")}
    made = make_store(tmp_path / "s", features=features, units=[0])
    with writer_of(made, resume=True) as writer, pytest.raises(DataError, match="expected"):
        writer.begin(1).put(start, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})


def test_a_unit_with_rows_never_computed_is_not_committed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0])
    with writer_of(made, resume=True) as writer:
        buffer = writer.begin(1)
        buffer.put(8, ones(made, 3))
        with pytest.raises(StoreError, match=r"unit 1 .* lacks rows 11\.\.15"):
            writer.commit(buffer)
    assert sorted(made.open(allow_partial=True).commits) == [0]


def test_a_committed_unit_is_never_written_again(
    tmp_path: Path, make_store: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    made = make_store(tmp_path / "s", units=[0])
    with writer_of(made, resume=True) as writer:
        first, second = writer.begin(1), writer.begin(1)
        first.put(8, ones(made, 8, 1.0))
        second.put(8, ones(made, 8, 2.0))
        writer.commit(first)
        before = files_of(made.root)
        with pytest.raises(StoreError, match=r"unit 1 of .* is committed"):
            writer.commit(second)
    assert files_of(made.root) == before


def test_an_episode_left_out_leaves_no_value_behind(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    import zarr

    made = make_store(tmp_path / "s", lengths=(3, 3, 2), unit_rows=8, units=[])
    with writer_of(made, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.put(0, ones(made, 8))
        buffer.steps["action"][:8] = 1
        buffer.leave_out("episode-1", range(3, 6), "frame 2 cannot be decoded")
        writer.commit(buffer)
    store = made.open()
    assert store.complete
    assert store.skipped == {"episode-1": "frame 2 cannot be decoded"}
    assert store.usable.tolist() == [True, False, True]
    assert store.statistics("grid").count == 5 * 3
    assert np.isnan(store.steps("action")[3:6]).all()
    with pytest.raises(StoreError, match=r"row 4 of .* was left out"):
        store.read("grid", np.array([0, 4]))
    assert np.isnan(zarr.open_array(made.root / "frames" / "grid", mode="r")[3:6]).all()
    np.testing.assert_array_equal(store.read("grid", np.array([2, 6, 7])), 1)
    assert verify_store(made.root).findings == []


def test_a_unit_of_nothing_but_left_out_rows_is_committed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", lengths=(4, 2), unit_rows=4, units=[])
    with writer_of(made, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.leave_out("episode-0", range(4), "gone")
        writer.commit(buffer)
        buffer = writer.begin(1)
        buffer.put(4, ones(made, 2))
        writer.commit(buffer)
    store = made.open()
    assert store.usable.tolist() == [False, True]
    assert store.statistics("grid").count == 6
    assert verify_store(made.root).findings == []


def test_a_name_that_leaves_the_store_is_refused_before_anything_is_written(
    tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    for name in ("../evil", "a/b", "", ".", "zarr.json", "x.partial", "__x", "a\\b", "new\nline"):
        with pytest.raises(StoreError, match="name"):
            make_store(tmp_path / "s", features={name: ((1, 4), "float16")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [((), (), "no episodes"), (("a", "a"), (1, 1), "'a' occurs twice"), (("a", "b"), (1, 0), "'b' has 0 frames")],
)
def test_episodes_that_cannot_be_laid_out_are_refused(
    ids: tuple[str, ...], lengths: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        EpisodeTable.plan(ids, lengths, ["t"] * len(ids))
