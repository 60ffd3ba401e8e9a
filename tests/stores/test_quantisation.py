"""int8 and its siblings: one outlier erases nothing, what rounding costs is recorded, and a lost unit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from vla.cli import app
from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.dtypes import INT8_MAX, MAX_ROUNDING_ERROR, DtypeName, Rounding, decode
from vla.stores.errors import DataError
from vla.stores.inspect import describe
from vla.stores.manifest import FeatureInfo
from vla.stores.store import Store, open_store
from vla.stores.unit_buffer import FeatureBuffer
from vla.training.storage import round_trip_dtype


def stored(
    values: NDArray[Any], dtype: DtypeName = "int8", present: NDArray[np.bool_] | None = None
) -> tuple[FeatureBuffer, NDArray[np.float32]]:
    """Put rows [n, V, C] through the buffer of one unit; return it and the values that come back."""
    info = FeatureInfo(shape=values.shape[1:], dims=("view", "channel"), dtype=dtype)
    buffer = FeatureBuffer("f", info, len(values), len(values))
    buffer.put(0, values.astype(np.float32), 0)
    buffer.finish(np.ones(len(values), bool) if present is None else present)
    return buffer, decode(dtype, buffer.shard.rows, buffer.scales).astype(np.float32)


def row_errors(back: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    """The relative L2 error of each row [n]."""
    wanted, found = (rows.astype(np.float64).reshape(len(rows), -1) for rows in (values, back))
    return np.asarray(np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1))


def gaussian(rows: int, channels: int = 8, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, 1, channels)).astype(np.float32)


@pytest.mark.parametrize("outlier", [3e4, 1e30, -3e4])
@pytest.mark.parametrize("rows", [20, 40, 256])
def test_one_outlying_frame_erases_no_other(outlier: float, rows: int) -> None:
    values = gaussian(rows)
    values[rows // 2] = outlier
    buffer, back = stored(values)
    errors = np.delete(row_errors(back, values), rows // 2)
    assert errors.max() < 0.15
    assert errors.mean() < 0.06
    assert (np.sign(back[rows // 2]) == np.sign(outlier)).all()
    assert buffer.rounding is not None
    assert buffer.rounding.saturated == pytest.approx(1 / rows)
    assert buffer.rounding.error == pytest.approx(row_errors(back, values).mean(), rel=1e-4)


def test_one_outlying_channel_of_one_frame_erases_no_other_frame_of_that_channel() -> None:
    values = gaussian(64, 32)
    values[10, 0, 3] = 3e4
    _, back = stored(values)
    kept = np.delete(np.arange(64), 10)
    assert np.abs(back[kept, 0, 3] - values[kept, 0, 3]).max() < 0.1


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_ordinary_features_keep_the_grid_of_their_largest_magnitude(draw: str) -> None:
    values = getattr(np.random.default_rng(1), draw)(size=(256, 2, 16)).astype(np.float32)
    buffer, back = stored(values)
    assert buffer.scales is not None
    np.testing.assert_array_equal(buffer.scales, np.abs(values).max(axis=(0, 1)) / np.float32(INT8_MAX))
    assert buffer.rounding is not None
    assert buffer.rounding.saturated == 0
    assert 0 < buffer.rounding.error < 0.05
    assert np.abs(back - values).max() <= buffer.scales.max() / 2 * 1.001


def test_a_unit_that_int8_would_erase_is_refused() -> None:
    values = gaussian(40)
    values[:10] *= 3e4
    with pytest.raises(DataError, match="'f'"):
        stored(values)


@pytest.mark.parametrize(
    ("rows", "outliers", "channels"),
    [(64, 4, 5), (10, 1, 1), (19, 1, 3)],
)
def test_channels_that_int8_would_erase_among_many_are_counted(rows: int, outliers: int, channels: int) -> None:
    values = gaussian(rows, 512)
    values[:outliers, 0, 7 : 7 + channels] = 3e4
    buffer, back = stored(values)
    assert (back[outliers:, 0, 7 : 7 + channels] == 0).all()
    assert buffer.rounding is not None
    assert buffer.rounding.erased == pytest.approx(channels / 512)


def test_a_unit_whose_channels_are_erased_beside_a_huge_one_is_refused() -> None:
    values = gaussian(64, 8)
    values[:, 0, 0] = 1e6
    values[:4, 0, 1:] = 3e4
    with pytest.raises(DataError, match="'f'"):
        stored(values)


def test_ordinary_and_sparse_channels_are_not_counted_as_erased() -> None:
    values = gaussian(200, 4)
    values[..., 0] = 0.0
    values[::10, 0, 0] = np.linspace(1, 3, 20)  # the rows of 0 were 0 before
    values[..., 1] = np.exp(values[..., 1])
    rounding = stored(values)[0].rounding
    assert rounding is not None
    assert rounding.erased == 0


@pytest.mark.parametrize("size", [1e-8, 1e-10])
def test_a_unit_that_float16_would_round_to_nothing_is_refused(size: float) -> None:
    values = gaussian(40) * np.float32(size)
    with pytest.raises(DataError, match="'f'"):
        stored(values, "float16")
    for dtype in ("int8", "bfloat16", "float32"):
        assert row_errors(stored(values, dtype)[1], values).max() < 0.05


def test_small_rows_among_large_ones_are_kept_by_float16() -> None:
    values = gaussian(40)
    values[3] *= np.float32(1e-9)  # one frame next to zero is no lost unit
    assert stored(values, "float16")[0].rounding is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_in_every_dtype(dtype: DtypeName, bad: float) -> None:
    values = gaussian(20)
    values[7, 0, 2] = bad
    with pytest.raises(DataError, match="row 7"):
        stored(values, dtype)


def test_channels_of_zeros_and_tiny_channels_keep_their_values() -> None:
    values = gaussian(40, 3)
    values[..., 0], values[..., 1] = 0.0, values[..., 1] * np.float32(1e-12)
    _, back = stored(values)
    assert (back[..., 0] == 0).all()
    assert np.abs(back[..., 1] / values[..., 1] - 1)[np.abs(values[..., 1]) > 1e-12].max() < 0.05


def test_rows_that_are_left_out_widen_no_grid() -> None:
    values = gaussian(40)
    values[0] = 1e6
    present = np.ones(40, bool)
    present[0] = False
    buffer, _ = stored(values, present=present)
    assert buffer.scales is not None
    assert buffer.scales.max() < 0.1
    assert buffer.rounding is not None
    assert buffer.rounding.saturated == 0


def test_channels_that_rarely_fire_are_not_taken_for_outliers() -> None:
    """A channel above zero in one row of ten keeps its strongest rows."""
    values = gaussian(200, 4)
    values[..., 0] = 0.0
    values[::10, 0, 0] = np.linspace(1, 3, 20)
    _, back = stored(values)
    np.testing.assert_allclose(back[::10, 0, 0], values[::10, 0, 0], atol=0.02)


def test_the_error_of_a_store_is_recorded_and_told(memory_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(memory_path / "s", features={"grid": ((2, 3, 4), "int8"), "half": ((1, 4), "float16")})
    facts = describe(made.root)["features"]
    assert 0 < facts["grid"]["rounding"]["error"] < MAX_ROUNDING_ERROR
    assert facts["grid"]["rounding"]["saturated"] == 0
    assert "rounding" not in facts["half"]


def test_live_values_are_rounded_and_saturated_as_stored_ones() -> None:
    values = gaussian(40)
    values[3] = 50.0
    buffer, back = stored(values)
    assert buffer.scales is not None
    live = round_trip_dtype(torch.from_numpy(values), "int8", buffer.scales.tolist())
    assert torch.equal(live, torch.from_numpy(back))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_live_values_of_every_dtype_equal_stored_ones(dtype: DtypeName) -> None:
    values = gaussian(40)
    live = round_trip_dtype(torch.from_numpy(values), dtype)
    np.testing.assert_array_equal(live.float().numpy(), stored(values, dtype)[1])


def test_one_wide_unit_does_not_coarsen_the_live_grid(memory_path: Path, make_store: Callable[..., Any]) -> None:
    store = make_store(memory_path / "s", features={"grid": ((2, 3, 4), "int8")}, unit_rows=4).open()
    scales = store.scales("grid")
    wide = scales.copy()
    wide[1] *= 1000
    object.__setattr__(store, "scales", lambda feature: wide)
    assert (store.live_scales("grid") <= 4 * np.median(wide, axis=0)).all()
    object.__setattr__(store, "scales", lambda feature: scales)
    np.testing.assert_array_equal(store.live_scales("grid"), scales.max(axis=0))


def test_an_outlier_survives_a_conversion_of_the_form_with_its_report(
    memory_path: Path, make_store: Callable[..., Any]
) -> None:
    made = make_store(memory_path / "s", features={"grid": ((2, 3, 4), "int8")})
    convert_store(made.root, memory_path / "h5", ConvertOptions(format="h5"))
    assert open_store(memory_path / "h5").rounding("grid") == made.open().rounding("grid")


def test_erased_channels_of_an_augmented_copy_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(buffer: FeatureBuffer, *rest: Any) -> Rounding:
        quantise(buffer, *rest)
        return Rounding(0.01, 0.0, 0.25 if buffer.name != "grid" else 0.0)

    quantise = FeatureBuffer._quantise
    monkeypatch.setattr(FeatureBuffer, "_quantise", rounding)
    command = ["featurize", "--source", "synthetic:episodes=2", "--backbone", "toy", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--dtype", "int8", "--augment", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rounding"]["grid"]["erased"] == 0.25
    assert describe(tmp_path / "toy")["features"]["grid"]["rounding"]["erased"] == 0.25


def test_a_store_without_a_record_of_its_rounding_gets_an_estimate(
    memory_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(memory_path / "s", features={"grid": ((2, 3, 4), "int8")})
    recorded = describe(made.root)["features"]["grid"]["rounding"]
    monkeypatch.setattr(Store, "rounding", lambda store, feature: None)
    estimated = describe(made.root)["features"]["grid"]["rounding"]
    assert estimated["saturated"] is None
    assert estimated["error"] == pytest.approx(recorded["error"], rel=0.3)


def test_featurize_reports_the_error_of_int8(tmp_path: Path) -> None:
    command = ["featurize", "--source", "synthetic:episodes=2", "--backbone", "toy", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--dtype", "int8", "--json"])
    assert done.exit_code == 0, done.output
    (cost,) = json.loads(done.stdout)["rounding"].values()
    assert 0 < cost["error"] < MAX_ROUNDING_ERROR
    assert cost["saturated"] == 0
