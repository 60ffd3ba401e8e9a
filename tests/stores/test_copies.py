"""Augmented copies in training batches: drawn uniformly, repeatably, read from the right array; nowhere else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores import copies as copies_module
from vla.stores import shuffle
from vla.stores.batches import WindowBatch, WindowBatches
from vla.stores.errors import CorruptionError, FingerprintError, StoreError, UsageError
from vla.stores.join import JoinedReader, JoinedStores, join_stores
from vla.stores.manifest import Manifest, copy_name
from vla.stores.store import open_store
from vla.stores.windows import WindowIndex, WindowSpec

K = 2
SPEC = WindowSpec(n_obs=3, horizon=2)
LENGTHS = (5, 9, 6, 3)
COUNT = sum(LENGTHS)
Make = Callable[..., Any]


def with_copies(**features: tuple[tuple[int, ...], str]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {copy_name(name, copy): info for name, info in features.items() for copy in range(K + 1)}


@pytest.fixture(scope="module", params=["zarr", "h5", "zstd"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_store: Make) -> Any:
    form = {"format": "zarr", "compression": "zstd"} if request.param == "zstd" else {"format": request.param}
    return augmented(make_store, tmp_path_factory.mktemp("copies") / "s", form=form)


def augmented(make_store: Make, root: Path, **options: Any) -> Any:
    features = with_copies(grid=((1, 3, 4), "float16"), small=((1, 6), "int8"))
    defaults = {"lengths": LENGTHS, "features": features, "fingerprint": {"augment": {"copies": K, "seed": 0}}}
    return make_store(root, **defaults | options)


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows and pools of four blocks."""
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 2 * (24 + 6))
    monkeypatch.setattr(shuffle, "POOL_BLOCKS", 4)


def batches_of(stores: JoinedStores, batch_size: int = 5, **options: Any) -> WindowBatches:
    index = WindowIndex(stores.first.episodes, np.flatnonzero(stores.usable), SPEC)
    wanted = {"features": ("grid", "small"), "copies": K, **options}
    return WindowBatches(stores, index, batch_size=batch_size, **wanted)


def values(batch: WindowBatch) -> dict[str, np.ndarray[Any, Any]]:
    small = batch.features["small"] * batch.scales["small"].reshape(*batch.obs_valid.shape, 1, -1)
    return {"grid": batch.features["grid"].copy(), "small": small, "task": batch.task.copy()}


def require_drawn(made: Any, batches: WindowBatches, batch: WindowBatch, seed: int, number: int) -> None:
    windows, drawn = batches.draw_of_batch(seed, number)
    rows = batches.index.rows(windows).obs
    found = values(batch)
    for at, copy in enumerate(drawn.tolist()):
        np.testing.assert_array_equal(found["grid"][at], made.features[copy_name("grid", copy)][rows[at]])
        wanted = made.features[copy_name("small", copy)][rows[at]]
        np.testing.assert_allclose(found["small"][at], wanted, atol=0.02)  # half a step: 3 sigma / 127 / 2
    np.testing.assert_array_equal(batch.task, batches.index.rows(windows).task)


every_shuffle = pytest.mark.parametrize("kind", ["global", "blocks"])


@pytest.mark.usefixtures("small_pools")
@every_shuffle
@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_all_frames_and_features_of_a_window_are_of_the_copy_that_was_drawn(made: Any, kind: Any, verify: Any) -> None:
    batches = batches_of(join_stores([made.open()]), shuffle=kind, verify=verify)
    stream = batches.shuffled(seed=3)
    for number in range(10):
        require_drawn(made, batches, next(stream), 3, number)
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small_pools")
@every_shuffle
def test_every_copy_is_drawn_as_often_and_for_every_window(made: Any, kind: Any) -> None:
    batches = batches_of(join_stores([made.open()]), batch_size=COUNT, shuffle=kind)
    counts = np.zeros((COUNT, K + 1), int)
    epochs = 300
    for epoch in range(epochs):  # one batch an epoch
        windows, drawn = batches.draw_of_batch(7, epoch)
        assert sorted(windows) == list(range(COUNT))
        assert (np.diff(drawn.astype(int)) >= 0).all()
        counts[windows, drawn] += 1
    chi_squared = ((counts - epochs / (K + 1)) ** 2 / (epochs / (K + 1))).sum(axis=1)
    assert chi_squared.max() < 18.4  # 2 degrees of freedom, p = 0.0001, 23 windows


def test_windows_are_drawn_independently_where_memory_suffices_and_by_block_where_not(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 4 * (24 + 6))
    stores = join_stores([made.open()])
    alike = {}
    for kind in ("global", "blocks"):
        batches = batches_of(stores, batch_size=COUNT, shuffle=kind)  # type: ignore[arg-type]
        table = np.empty((200, COUNT), int)
        for epoch in range(200):
            windows, drawn = batches.draw_of_batch(0, epoch)
            table[epoch, windows] = drawn
        alike[kind] = (table[:, 0] == table[:, 1]).mean()
    assert alike["blocks"] == 1.0  # rows 0 and 1 share a block
    assert 0.2 < alike["global"] < 0.47  # a third


@pytest.mark.usefixtures("small_pools")
@every_shuffle
def test_resuming_at_any_batch_repeats_the_rest(made: Any, kind: Any) -> None:
    stores = join_stores([made.open()])
    stream = batches_of(stores, shuffle=kind).shuffled(seed=1)
    whole = [values(batch) for batch in itertools.islice(stream, 12)]
    stream.close()  # type: ignore[attr-defined]
    for start in range(12):
        resumed = batches_of(stores, shuffle=kind).shuffled(seed=1, start=start)
        for number in range(start, min(start + 2, 12)):
            found = values(next(resumed))
            for name, wanted in whole[number].items():
                np.testing.assert_array_equal(found[name], wanted)
        resumed.close()  # type: ignore[attr-defined]


def test_draws_do_not_depend_on_the_size_of_a_batch(made: Any) -> None:
    stores = join_stores([made.open()])

    def of_epoch(size: int) -> dict[int, int]:
        parts = [batches_of(stores, size).draw_of_batch(0, number) for number in range(COUNT // size)]
        return {int(w): int(c) for windows, drawn in parts for w, c in zip(windows, drawn, strict=True)}

    assert of_epoch(1) == of_epoch(23)


def test_drawing_leaves_the_order_of_the_windows_as_it_is_without(made: Any) -> None:
    stores = join_stores([made.open()])
    drawing, plain = batches_of(stores, 6), batches_of(stores, 6, copies=0)
    for number in range(9):
        assert sorted(drawing.windows_of_batch(2, number)) == sorted(plain.windows_of_batch(2, number))
    order = np.random.default_rng([2, 0]).permutation(COUNT)
    np.testing.assert_array_equal(plain.windows_of_batch(2, 0), order[:6])
    assert not plain.draw_of_batch(2, 0)[1].any()


@pytest.mark.parametrize("copies", [0, K])
def test_in_order_is_plain(made: Any, copies: int) -> None:
    batches = batches_of(join_stores([made.open()]), copies=copies)
    found = np.concatenate([values(batch)["grid"] for batch in batches.in_order()])
    np.testing.assert_array_equal(found, made.features["grid"][batches.index.rows(np.arange(COUNT)).obs])


def test_each_array_is_read_by_one_call_a_batch(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = JoinedReader.read
    monkeypatch.setattr(JoinedReader, "read", lambda self, rows, out: (calls.append(len(rows)), plain(self, rows, out)))
    batches = batches_of(join_stores([made.open()]), batch_size=20, features=("grid",))
    stream = batches.shuffled(seed=0, depth=1, stop=3)
    for _ in stream:
        pass
    assert len(calls) == 3 * (K + 1)
    assert sum(calls) == 3 * 20 * SPEC.n_obs


def test_features_without_copies_are_read_plain_beside_those_that_have_them(tmp_path: Path, make_store: Make) -> None:
    one = augmented(make_store, tmp_path / "one", ids=("a", "b", "c", "d"))
    other = make_store(
        tmp_path / "other",
        lengths=LENGTHS[::-1],
        ids=("d", "c", "b", "a"),
        unit_rows=5,
        features={"tokens": ((1, 5), "float32")},
    )
    for pair in ((one, other), (other, one)):
        stores = join_stores([made.open() for made in pair])
        assert set(stores.owner) == {"grid", "small", "tokens"}
        assert stores.copies(("grid", "tokens")) == K
        batches = batches_of(stores, features=("grid", "tokens"))
        for number, batch in enumerate(batches.shuffled(seed=0, stop=6)):
            windows, drawn = batches.draw_of_batch(0, number)
            rows = batches.index.rows(windows).obs
            out = np.empty((rows.size, 1, 5), np.float32)
            reader = stores.reader("tokens")
            reader.read(rows.reshape(-1), out)
            reader.close()
            np.testing.assert_array_equal(batch.features["tokens"].reshape(out.shape), out)
            for at, copy in enumerate(drawn.tolist()):
                plain = np.empty((SPEC.n_obs, 1, 3, 4), np.float16)
                reader = stores.reader("grid", copy=copy)
                reader.read(rows[at], plain)
                reader.close()
                np.testing.assert_array_equal(batch.features["grid"][at], plain)


@pytest.mark.parametrize("record", [{"copies": K, "seed": 1}, {"copies": 1, "seed": 0}])
def test_stores_augmented_differently_are_not_drawn_from_together(
    tmp_path: Path, make_store: Make, record: dict[str, int]
) -> None:
    one = augmented(make_store, tmp_path / "one")
    features = {copy_name("tokens", copy): ((1, 5), "float32") for copy in range(record["copies"] + 1)}
    other = make_store(tmp_path / "two", lengths=LENGTHS, features=features, fingerprint={"augment": record})
    stores = join_stores([one.open(), other.open()])
    field = "seed: 1" if record["seed"] else "copies: 1"
    with pytest.raises(
        FingerprintError, match=rf"augmentation of .*two beside .*one.*{field} here.*data\.augment=false"
    ):
        stores.copies(("grid", "tokens"))
    assert stores.copies(("grid", "small")) == K
    assert stores.copies(("tokens",)) == record["copies"]


def test_a_copy_is_no_feature_of_its_own(made: Any) -> None:
    with pytest.raises(UsageError, match=r"no store has feature 'grid\.aug1'; expected one of grid, small"):
        join_stores([made.open()]).feature_info("grid.aug1")


def test_all_copies_together_hold_no_more_files_open_than_one_feature(
    tmp_path: Path, make_store: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = augmented(make_store, tmp_path / "s", unit_rows=2)
    monkeypatch.setattr(copies_module, "MAX_OPEN_FILES", 6)
    reader = join_stores([made.open()]).place_reader("grid")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for place in range(COUNT * (K + 1)):
        out = np.empty((1, 1, 3, 4), np.float16)
        reader.read(np.asarray([place]), out)
        np.testing.assert_array_equal(out[0], made.features[copy_name("grid", place // COUNT)][place % COUNT])
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 6
    reader.close()


def test_damage_in_a_copy_is_met_by_training_alone(tmp_path: Path, make_store: Make) -> None:
    augmented(make_store, tmp_path / "s")
    file = tmp_path / "s/frames/grid.aug2/c.1.0.0.0"
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(raw)
    stores = join_stores([open_store(tmp_path / "s")])
    assert len(list(batches_of(stores).in_order())) == 5
    with pytest.raises(CorruptionError, match=r"'grid\.aug2', unit 1"):
        list(batches_of(stores).shuffled(seed=0, stop=40))


@pytest.mark.parametrize("record", [{"copies": 3}, {"copies": -1}, {"copies": 10**9}, {"copies": True}, {}, "2", None])
def test_a_manifest_whose_copies_are_not_there_is_refused(made: Any, record: Any) -> None:
    raw = made.manifest.model_dump(mode="json")
    raw["fingerprint"]["augment"] = record
    manifest = Manifest.build(raw)
    with pytest.raises(StoreError, match=r"augmented copies|lacks"):
        manifest.require_sound(Path("zarr.json"))


def test_a_copy_of_another_shape_is_refused(made: Any) -> None:
    raw = made.manifest.model_dump(mode="json")
    raw["features"]["grid.aug1"]["dtype"] = "float32"
    with pytest.raises(StoreError, match=r"lacks 'grid\.aug1'; expected an array like 'grid'"):
        Manifest.build(raw).require_sound(Path("zarr.json"))
