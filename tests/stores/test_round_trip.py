"""What is written is what is read, by us and by zarr-python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import StoreError, UsageError
from vla.stores.statistics import ChannelStatistics
from vla.stores.store import open_store

TWO_FEATURES = {"grid": ((2, 3, 4), "float16"), "pooled": ((2, 8), "float32")}


def test_every_value_comes_back_as_it_was_written(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", features=TWO_FEATURES)
    store = made.open()
    assert store.complete
    assert store.usable.all()
    for name, written in made.features.items():
        read = store.read(name, np.arange(20))
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    for name, written in made.steps.items():
        read = store.steps(name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    assert store.episodes.ids == made.episodes.ids
    assert store.episodes.tasks == ("task 0", "task 1")
    np.testing.assert_array_equal(store.episodes.task, [0, 1, 0])


def test_rows_come_back_in_any_order_and_repeated(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s")
    rows = np.array([19, 0, 1, 2, 2, 7, 8, 0, 3, 19, 18])
    np.testing.assert_array_equal(made.open().read("grid", rows), made.features["grid"][rows])
    assert made.open().read("grid", rows[:0]).shape == (0, 1, 3, 4)


@pytest.mark.parametrize("unit_rows", [1, 3, 20, 64])
def test_the_size_of_a_unit_changes_no_value(tmp_path: Path, make_store: Callable[..., Any], unit_rows: int) -> None:
    made = make_store(tmp_path / "s", unit_rows=unit_rows)
    store = made.open()
    np.testing.assert_array_equal(store.read("grid", np.arange(20)), made.features["grid"])
    np.testing.assert_array_equal(store.steps("clock"), made.steps["clock"])


def test_zarr_python_reads_the_same_values_from_the_same_files(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    import zarr

    made = make_store(tmp_path / "s", features=TWO_FEATURES)
    store = made.open()
    group = zarr.open_group(tmp_path / "s", mode="r")
    for name, written in made.features.items():
        array = group[f"frames/{name}"]
        np.testing.assert_array_equal(array[:], written)
        assert array.metadata.dimension_names == ("row", *store.feature_info(name).dims)
        moments = [ChannelStatistics.from_array(values) for values in group[f"stats/{name}"][:]]
        merged = moments[0].merge(moments[1]).merge(moments[2])
        np.testing.assert_array_equal(merged.to_array(), store.statistics(name).to_array())
    for name, written in made.steps.items():
        np.testing.assert_array_equal(group[f"steps/{name}"][:], written)
    np.testing.assert_array_equal(group["episodes/length"][:], [5, 9, 6])
    np.testing.assert_array_equal(group["episodes/row_start"][:], [0, 5, 14])
    assert bytes(group["episodes/id"][1]) == b"episode-1"
    assert bytes(group["tasks/text"][1]) == b"task 1"


@pytest.mark.filterwarnings("ignore:Object at commits is not recognized:zarr.errors.ZarrUserWarning")
def test_zarr_python_lists_every_array(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    import zarr

    make_store(tmp_path / "s")
    members = dict(zarr.open_group(tmp_path / "s", mode="r").members(max_depth=None))
    arrays = {path for path, member in members.items() if isinstance(member, zarr.Array)}
    assert {"frames/grid", "steps/action", "checksums/grid", "stats/grid", "episodes/id", "tasks/text"} <= arrays


def test_rows_not_committed_read_as_nan_in_zarr_python(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    import zarr

    made = make_store(tmp_path / "s", units=[0, 2])
    group = zarr.open_group(tmp_path / "s", mode="r")
    frames, action = group["frames/grid"][:], group["steps/action"][:]
    assert np.isnan(frames[8:16]).all()
    assert np.isnan(action[8:16]).all()
    np.testing.assert_array_equal(np.delete(frames, np.s_[8:16], 0), np.delete(made.features["grid"], np.s_[8:16], 0))


def test_an_incomplete_store_is_opened_only_on_request(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", units=[0])
    with pytest.raises(StoreError, match=r"has 1 of 3 units.*--resume"):
        made.open()
    store = made.open(allow_partial=True)
    assert not store.complete
    np.testing.assert_array_equal(store.usable, [True, False, False])
    np.testing.assert_array_equal(store.read("grid", np.arange(8)), made.features["grid"][:8])
    assert np.isnan(store.steps("action")[8:]).all()
    with pytest.raises(StoreError, match=r"unit 1 .* is not committed"):
        store.read("grid", np.array([3, 9]))


def test_units_may_be_committed_in_any_order(
    tmp_path: Path, make_store: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    make_store(tmp_path / "forward")
    make_store(tmp_path / "backward", units=[2, 1, 0])
    assert files_of(tmp_path / "forward") == files_of(tmp_path / "backward")


def test_two_runs_write_the_same_bytes(
    tmp_path: Path, make_store: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    make_store(tmp_path / "one", features=TWO_FEATURES)
    make_store(tmp_path / "two", features=TWO_FEATURES)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_ids_and_tasks_keep_every_character(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    ids = ("with space", "new\nline", "日本語 🤖", "..", "a/b", "Case", "case")
    made = make_store(tmp_path / "s", lengths=(1,) * 7, ids=ids)
    assert made.open().episodes.ids == ids


def test_a_wrong_name_gets_the_nearest_one(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    store = make_store(tmp_path / "s").open()
    with pytest.raises(UsageError, match=r"no feature 'gird', did you mean 'grid'\?"):
        store.read("gird", np.arange(2))
    with pytest.raises(UsageError, match=r"no steps 'actoin', did you mean 'action'\?"):
        store.steps("actoin")
    with pytest.raises(UsageError, match="did you mean 'grid'"):
        store.statistics("grids")


def test_opening_says_what_is_there_instead_of_a_store(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "nothing")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(StoreError, match=r"is no store \(holds cat.jpg\)"):
        open_store(tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"is no store \(holds a file\)"):
        open_store(tmp_path / "file")
    make_store(tmp_path / "s").root.rename(tmp_path / "s.partial")
    with pytest.raises(StoreError, match="interrupted run"):
        open_store(tmp_path / "s.partial")


def test_a_zarr_group_of_someone_else_is_no_store(tmp_path: Path) -> None:
    import zarr

    zarr.create_group(tmp_path / "g", zarr_format=3, attributes={"theirs": 1})
    with pytest.raises(StoreError, match="no store of ours"):
        open_store(tmp_path / "g")


def test_the_room_of_stores_imports_and_reads_without_torch(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    make_store(tmp_path / "s")
    program = """
import importlib, pathlib, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'h5py', 'dask', 'transformers'):
            raise ImportError(name + ' is hidden')
sys.meta_path.insert(0, Hidden())
import vla.stores
folder = pathlib.Path(vla.stores.__path__[0])
names = sorted(path.stem for path in folder.glob('*.py'))
names += ['formats.' + path.stem for path in (folder / 'formats').glob('*.py')]
assert len(names) > 15
for name in names:
    importlib.import_module('vla.stores.' + name)
from vla.stores.store import open_store
from vla.stores.verify import verify_store
import numpy
assert open_store(sys.argv[1]).read('grid', numpy.arange(20)).shape == (20, 1, 3, 4)
assert verify_store(pathlib.Path(sys.argv[1])).findings == []
assert 'torch' not in sys.modules and 'zarr' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "s"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
