"""What a head sees of each storage dtype: the values that were stored, on the device, live as cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.heads.batch import Batch
from vla.heads.data import DataConfig, HeadData, open_data
from vla.stores.dtypes import DtypeName, decode_bfloat16, encode_bfloat16
from vla.stores.windows import WindowSpec
from vla.training.storage import as_tensor, live_scales, round_trip_dtype

EVERY: tuple[DtypeName, ...] = ("float16", "float32", "bfloat16", "int8")


def data_of(root: Path) -> HeadData:
    return open_data(DataConfig(stores=(str(root),), validation=0.0))


def only_batch(data: HeadData, n_obs: int = 2) -> Batch:
    episodes = np.arange(len(data.stores.first.episodes))
    return next(data.batches(episodes, WindowSpec(n_obs=n_obs, horizon=2), 64, pin=False).in_order())


@pytest.mark.parametrize("form", [{}, {"format": "h5"}, {"compression": "zstd"}], ids=["zarr", "h5", "zstd"])
@pytest.mark.parametrize("dtype", EVERY)
def test_a_batch_gives_the_values_that_were_stored(
    memory_path: Path, make_store: Callable[..., Any], dtype: str, form: dict[str, str]
) -> None:
    made = make_store(memory_path / "s", features={"grid": ((2, 3, 4), dtype)}, form=form)
    batch = only_batch(data_of(made.root))
    read = batch.feature("grid")
    assert read.shape == (20, 2, 2, 3, 4)
    assert read.dtype == {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    wanted = torch.from_numpy(made.features["grid"].astype(np.float32))
    bound = {"float16": 0.0, "float32": 0.0, "bfloat16": 0.03, "int8": 0.03}[dtype]
    assert (read[:, -1].float() - wanted).abs().max() <= bound
    first = torch.tensor([0, 5, 14])  # windows at the start of an episode see its first frame twice
    assert torch.equal(read[first, 0], read[first, 1])


def test_int8_travels_as_int8_with_the_scales_of_each_rows_own_unit(
    memory_path: Path, make_store: Callable[..., Any]
) -> None:
    data = data_of(make_store(memory_path / "s", features={"grid": ((2, 3, 4), "int8")}).root)
    batch = only_batch(data).to("cpu")
    scales = data.stores.first.scales("grid")
    assert scales is not None
    assert len(np.unique(scales, axis=0)) == 3
    assert batch.features["grid"].dtype == torch.int8
    np.testing.assert_array_equal(batch.scales["grid"][:, -1].numpy(), scales[np.arange(20) // 8])


def test_scales_follow_the_rows_of_a_joined_store(memory_path: Path, make_store: Callable[..., Any]) -> None:
    """The second store has its episodes in another order and units of another size."""
    make_store(memory_path / "a", ids=("x", "y", "z"), lengths=(5, 9, 6), features={"one": ((1, 4), "float32")})
    made = make_store(
        memory_path / "b", ids=("z", "x", "y"), lengths=(6, 5, 9), unit_rows=3, features={"two": ((1, 4), "int8")}
    )
    config = DataConfig(stores=(str(memory_path / "a"), str(memory_path / "b")), validation=0.0)
    batch = only_batch(open_data(config), n_obs=1)
    wanted = np.concatenate([made.features["two"][6:11], made.features["two"][11:20], made.features["two"][0:6]])
    assert (batch.feature("two")[:, 0] - torch.from_numpy(wanted.astype(np.float32))).abs().max() <= 0.02


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) <= 3.38e38)]
    ours, theirs = encode_bfloat16(values), torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(as_tensor(ours, "bfloat16"), theirs)
    np.testing.assert_array_equal(decode_bfloat16(ours), theirs.float().numpy())


@pytest.mark.parametrize("unit_rows", [20, 8])
@pytest.mark.parametrize("dtype", EVERY)
def test_live_features_equal_cached_ones(
    memory_path: Path, make_store: Callable[..., Any], dtype: DtypeName, unit_rows: int
) -> None:
    """Bit for bit; int8 with several units within half a step of the live grid and half of the cached one."""
    made = make_store(memory_path / "s", features={"grid": ((2, 3, 4), dtype)}, unit_rows=unit_rows)
    store = made.open()
    scales = live_scales(store, ("grid",)).get("grid")
    live = round_trip_dtype(torch.from_numpy(made.features["grid"].astype(np.float32)), dtype, scales)
    cached = only_batch(data_of(made.root), n_obs=1).feature("grid")[:, 0]
    if dtype != "int8" or unit_rows == 20:
        assert live.dtype == cached.dtype
        assert torch.equal(live, cached)
        return
    of_unit = store.scales("grid")
    assert of_unit is not None
    assert scales is not None
    np.testing.assert_array_equal(np.float32(scales), of_unit.max(axis=0))
    bound = (torch.from_numpy(of_unit[np.arange(20) // 8]) + torch.tensor(scales)) / 2 * 1.0001
    assert ((live - cached).abs().max() > 0) & bool(((live - cached).abs() <= bound[:, None, None]).all())


def test_a_live_channel_that_was_always_zero_stays_zero() -> None:
    live = round_trip_dtype(torch.tensor([[3.0, 3.0]]), "int8", (0.0, 0.5))
    assert live.tolist() == [[0.0, 3.0]]
    assert round_trip_dtype(torch.tensor([[1.0, 60.3]]), "int8", (0.0, 0.5)).tolist() == [[0.0, 60.5]]
    assert round_trip_dtype(torch.tensor([[1.0, -200.3]]), "int8", (0.0, 0.5)).tolist() == [[0.0, -63.5]]
