"""What every form of the store promises, whatever the dtype: one suite over all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.dtypes import decode
from vla.stores.errors import CorruptionError, FingerprintError, StoreError
from vla.stores.statistics import of_rows
from vla.stores.store import Store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

FORMS: dict[str, dict[str, str]] = {"zarr": {}, "h5": {"format": "h5"}, "zstd": {"compression": "zstd"}}
DTYPES = ("float16", "float32", "bfloat16", "int8")
RELATIVE = {"float16": 0.0, "float32": 0.0, "bfloat16": 2.0**-8}
"""Largest relative error: float16 and float32 are given values that they hold, bfloat16 keeps 8 bits."""

pytestmark = pytest.mark.parametrize("form", list(FORMS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def make(make_store: Callable[..., Any], form: str) -> Callable[..., Any]:
    """`make(root, dtype)` writes 20 rows in 3 units of two features of a dtype, in the form under test."""

    def write(root: Path, dtype: str = "float16", **options: Any) -> Any:
        features = {"grid": ((2, 3, 4), dtype), "pooled": ((1, 5), dtype)}
        return make_store(root, **{"features": features, "form": FORMS[form]} | options)

    return write


def values_of(store: Store, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows as the numbers that they stand for."""
    info, scales = store.feature_info(name), store.scales(name)
    if scales is None:
        return decode(info.dtype, store.read(name, rows))
    of_row = scales[rows // store.manifest.unit_rows]
    return decode(info.dtype, store.read(name, rows), of_row.reshape(len(rows), *(1,) * (len(info.shape) - 1), -1))


def data_file(root: Path, unit: int = 1) -> Path:
    """The file that holds the rows of a unit."""
    shard, whole = root / f"frames/grid/c.{unit}.0.0.0", root / f"units/unit-{unit:06d}.h5"
    return shard if shard.exists() else whole


@every_dtype
def test_values_come_back_within_the_error_of_the_dtype(
    memory_path: Path, make: Callable[..., Any], dtype: str
) -> None:
    made = make(memory_path / "s", dtype)
    store, rows = made.open(), np.arange(20)
    assert store.complete
    assert verify_store(memory_path / "s").findings == []
    for name, written in made.features.items():
        read = values_of(store, name, rows)
        scales = store.scales(name)
        if scales is None:
            assert (np.abs(read - written) <= RELATIVE[dtype] * np.abs(written)).all()
        else:
            steps = scales[rows // 8].reshape(20, *(1,) * (written.ndim - 2), -1)
            assert (np.abs(read - written) <= 0.5001 * steps).all()
        if dtype in ("bfloat16", "int8"):
            assert np.abs(read - written).max() > 0


@every_dtype
def test_rows_come_back_in_any_order_and_repeated(memory_path: Path, make: Callable[..., Any], dtype: str) -> None:
    store = make(memory_path / "s", dtype).open()
    rows, whole = np.array([19, 0, 1, 2, 2, 7, 8, 0, 3, 19, 18]), store.read("grid", np.arange(20))
    np.testing.assert_array_equal(store.read("grid", rows), whole[rows])
    assert len(np.unique(whole.reshape(20, -1), axis=0)) == 20
    assert store.read("grid", rows[:0]).shape == (0, 2, 3, 4)


@pytest.mark.parametrize("unit_rows", [1, 3, 20, 64])
def test_the_size_of_a_unit_changes_no_value(memory_path: Path, make: Callable[..., Any], unit_rows: int) -> None:
    made = make(memory_path / "s", unit_rows=unit_rows)
    np.testing.assert_array_equal(made.open().read("grid", np.arange(20)), made.features["grid"])
    for name, written in made.steps.items():
        read = made.open().steps(name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)


def test_runs_longer_than_one_system_call_are_read_whole(memory_path: Path, make: Callable[..., Any]) -> None:
    made = make(memory_path / "s", lengths=(1500,), unit_rows=1500)
    np.testing.assert_array_equal(made.open().read("pooled", np.arange(1500)), made.features["pooled"])


@every_dtype
def test_statistics_are_those_of_the_values_read(memory_path: Path, make: Callable[..., Any], dtype: str) -> None:
    store = make(memory_path / "s", dtype).open()
    for name, channels in (("grid", 4), ("pooled", 5)):
        direct = of_rows(values_of(store, name, np.arange(20)), channels)
        merged = store.statistics(name)
        assert merged.count == direct.count
        np.testing.assert_allclose(merged.mean, direct.mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(merged.m2, direct.m2, rtol=1e-12)
        np.testing.assert_array_equal(merged.min, direct.min)
        np.testing.assert_array_equal(merged.max, direct.max)


@every_dtype
def test_a_resumed_run_equals_an_uninterrupted_one_byte_for_byte(
    memory_path: Path, make: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]], dtype: str
) -> None:
    make(memory_path / "whole", dtype)
    make(memory_path / "s", dtype, units=[2, 0])
    make(memory_path / "s", dtype, resume=True)
    assert files_of(memory_path / "s") == files_of(memory_path / "whole")


def test_an_incomplete_store_is_opened_only_on_request(memory_path: Path, make: Callable[..., Any]) -> None:
    made = make(memory_path / "s", units=[0])
    with pytest.raises(StoreError, match=r"has 1 of 3 units.*--resume; .* --set data\.allow_partial=true$"):
        made.open()
    store = made.open(allow_partial=True)
    np.testing.assert_array_equal(store.read("grid", np.arange(8)), made.features["grid"][:8])
    assert np.isnan(store.steps("action")[8:]).all()
    with pytest.raises(StoreError, match=r"unit 1 .* is not committed"):
        store.read("grid", np.array([3, 9]))


@every_dtype
def test_an_episode_left_out_leaves_no_value_behind(memory_path: Path, make: Callable[..., Any], dtype: str) -> None:
    made = make(memory_path / "s", dtype, lengths=(3, 3, 2), unit_rows=8, units=[])
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.put(0, {name: np.ones((8, *i.shape), np.float32) for name, i in made.manifest.features.items()})
        buffer.put(3, {name: np.full((3, *i.shape), 99.0) for name, i in made.manifest.features.items()})
        buffer.steps["action"][:8] = 1
        buffer.leave_out("episode-1", range(3, 6), "frame 2 cannot be decoded")
        writer.commit(buffer)
    store, rows = made.open(), np.array([0, 1, 2, 6, 7])
    assert store.usable.tolist() == [True, False, True]
    statistics = store.statistics("grid")
    assert (statistics.count, statistics.max.tolist()) == (5 * 6, [1.0] * 4)
    np.testing.assert_allclose(values_of(store, "grid", rows), 1.0, rtol=1e-6)
    assert np.isnan(store.steps("action")[3:6]).all()
    assert (store.steps("action")[rows] == 1).all()
    with pytest.raises(StoreError, match=r"row 4 of .* was left out"):
        store.read("grid", np.array([4]))
    assert verify_store(made.root).findings == []


def test_a_unit_without_any_row_is_committed(memory_path: Path, make: Callable[..., Any]) -> None:
    made = make(memory_path / "s", lengths=(4, 4), unit_rows=4, units=[1])
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.leave_out("episode-0", range(4), "no picture can be decoded")
        writer.commit(buffer)
    store = made.open()
    assert store.usable.tolist() == [False, True]
    np.testing.assert_array_equal(store.read("grid", np.arange(4, 8)), made.features["grid"][4:])
    assert verify_store(made.root).findings == []


@every_dtype
def test_a_flipped_bit_in_a_row_is_never_returned(memory_path: Path, make: Callable[..., Any], dtype: str) -> None:
    made = make(memory_path / "s", dtype)
    reader = made.open().reader("grid")
    reader.read(np.array([11]), np.empty((1, 2, 3, 4), reader.info.stored))
    file, at = data_file(memory_path / "s"), int(reader._offsets[11])
    reader.close()
    raw = bytearray(file.read_bytes())
    raw[at + 5] ^= 16
    file.write_bytes(raw)
    store = made.open()
    with pytest.raises(CorruptionError, match=r"unit 1: .* differs from its (commit|checksum) in row 11"):
        store.read("grid", np.arange(20))
    assert len(store.read("grid", np.array([10, 12]))) == 2
    assert any(file.name in line for line in verify_store(memory_path / "s").findings)


@pytest.mark.parametrize("damage", ["cut", "grown", "removed", "swapped", "stale"])
def test_a_damaged_file_is_noticed_by_reading_and_by_verify(
    memory_path: Path, make: Callable[..., Any], damage: str
) -> None:
    made = make(memory_path / "s")
    file = data_file(memory_path / "s")
    raw = file.read_bytes()
    if damage == "swapped":
        other = data_file(memory_path / "s", 0)
        file.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif damage == "stale":
        shutil.copy(data_file(make(memory_path / "older", seed=1).root), file)
    elif damage == "removed":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if damage == "cut" else raw + b"\0")
    with pytest.raises(CorruptionError, match="unit 1"):
        made.open().read("grid", np.arange(8, 16))
    assert any(file.name in line for line in verify_store(memory_path / "s").findings)


def test_no_flipped_bit_of_the_file_of_a_unit_is_silent(memory_path: Path, make: Callable[..., Any], form: str) -> None:
    """Every byte of metadata, index and checksum: reading gives the right values or an error, `verify` always finds."""
    del form
    made = make(memory_path / "s", unit_rows=3, lengths=(3, 3))
    file = data_file(memory_path / "s")
    good, wanted = file.read_bytes(), made.open().read("grid", np.arange(6)).tobytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(good) * 8, size=60, replace=False).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        message = ""
        try:
            assert made.open().read("grid", np.arange(6)).tobytes() == wanted
        except StoreError as error:
            message = str(error)
        assert not message or (file.name in message and "\n" not in message)
        assert any(file.name in line for line in verify_store(memory_path / "s").findings), bit


def test_going_on_in_another_form_or_dtype_is_refused_by_name(
    memory_path: Path, make: Callable[..., Any], form: str
) -> None:
    make(memory_path / "s", units=[0])
    other = {"zarr": {"format": "h5"}, "h5": {}, "zstd": {}}[form]
    with pytest.raises(FingerprintError, match="compression: " if form == "zstd" else "format: "):
        make(memory_path / "s", form=other, resume=True)
    with pytest.raises(FingerprintError, match=r"features\.grid\.dtype"):
        make(memory_path / "s", "bfloat16", resume=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_dtype
def test_values_that_are_not_finite_are_refused_naming_the_row(
    memory_path: Path, make: Callable[..., Any], dtype: str, value: float
) -> None:
    made = make(memory_path / "s", dtype, units=[0])
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        values = {name: np.ones((5, *i.shape), np.float32) for name, i in made.manifest.features.items()}
        values["grid"][2, 0, 1, 3] = value
        with pytest.raises(ValueError, match=r"feature 'grid' is not finite in row 11"):
            writer.begin(1).put(9, values)


def test_the_manifest_says_the_form_and_a_record_of_another_form_is_refused(
    memory_path: Path, make: Callable[..., Any], make_store: Callable[..., Any], form: str
) -> None:
    made = make(memory_path / "s")
    manifest = json.loads((memory_path / "s" / "zarr.json").read_text())["attributes"]["vla"]
    assert {key: manifest[key] for key in ("format", "compression") if key in manifest} == FORMS[form]
    other = {"zarr": {"format": "h5"}, "h5": {}, "zstd": {}}[form]
    theirs = make_store(memory_path / "o", features={"grid": ((2, 3, 4), "float16")}, form=other)
    shutil.copy(theirs.root / "commits/unit-000001.json", made.root / "commits/unit-000001.json")
    with pytest.raises(CorruptionError, match="belongs to another store"):
        made.open()
