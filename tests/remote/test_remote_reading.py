"""Reading from a bucket through the cache: equal to reading from disk, and no byte fetched twice."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.batches import WindowBatches
from vla.stores.errors import CorruptionError, MachineError, StoreError
from vla.stores.inspect import describe
from vla.stores.join import join_stores
from vla.stores.remote.cache import CacheFolder
from vla.stores.remote.options import RemoteOptions
from vla.stores.store import Store, open_store
from vla.stores.windows import WindowIndex, WindowSpec

SHARD = "some/s/frames/grid/c.1.0.0.0"


def everything(store: Store) -> dict[str, bytes]:
    rows = np.arange(store.manifest.rows)
    values = {f"frames/{name}": store.read(name, rows).tobytes() for name in store.manifest.features}
    values |= {f"steps/{name}": store.steps(name).tobytes() for name in store.manifest.steps}
    return values | {f"stats/{name}": store.statistics(name).to_array().tobytes() for name in store.manifest.features}


def batches(store: Store) -> WindowBatches:
    joined = join_stores([store])
    index = WindowIndex(joined.first.episodes, np.flatnonzero(joined.usable), WindowSpec(n_obs=2, horizon=3))
    names = tuple(store.manifest.features)
    return WindowBatches(joined, index, features=names, obs_steps=("clock",), action_steps=("action",), batch_size=6)


def first_batches(store: Store, count: int) -> list[bytes]:
    found = []
    stream = batches(store).shuffled(seed=3)
    for batch in itertools.islice(stream, count):
        arrays = [*batch.features.values(), *batch.obs_steps.values(), *batch.action_steps.values(), batch.action_valid]
        found.append(b"".join(array.tobytes() for array in arrays))
    stream.close()  # type: ignore[attr-defined]
    return found


def test_everything_reads_as_from_disk(remote: str, local: Any, options: RemoteOptions) -> None:
    assert everything(open_store(remote, remote=options)) == everything(local.open())


def test_training_batches_equal_those_of_the_local_store(remote: str, local: Any, options: RemoteOptions) -> None:
    assert first_batches(open_store(remote, remote=options), 12) == first_batches(local.open(), 12)


def test_a_second_epoch_makes_no_request(bucket: Any, remote: str, options: RemoteOptions) -> None:
    store = open_store(remote, remote=options)
    first = first_batches(store, 4)  # 24 windows in batches of 6: one epoch
    blocks = [request for request in bucket.requests if "/frames/" in request.key]
    assert blocks
    bucket.requests.clear()
    assert first_batches(store, 8)[:4] == first
    assert bucket.requests == []
    again = open_store(remote, remote=options)  # another run: a listing and the root, nothing else
    assert first_batches(again, 4) == first
    assert {request.key.removeprefix("some/s/") for request in bucket.requests} <= {"", "zarr.json"}


def test_a_batch_fetches_the_blocks_it_needs_and_no_others(bucket: Any, remote: str, options: RemoteOptions) -> None:
    store = open_store(remote, remote=options)
    bucket.requests.clear()
    store.read("grid", np.array([9]))
    keys = {request.key for request in bucket.requests}
    assert keys == {SHARD}
    cache = CacheFolder(options)
    assert 0 < cache.used_bytes() <= 2 * 4096  # the index and one row, in pages of the file system
    cache.close()


@pytest.mark.parametrize("fault", ["500", "reset", "truncate", "stall", "slow", "whole", "corrupt"])
def test_passing_faults_never_change_what_is_read(
    bucket: Any, remote: str, local: Any, options: RemoteOptions, fault: str
) -> None:
    struck: set[tuple[str, str]] = set()
    bucket.stall_s = 0.5

    def once_each(request: Any) -> str | None:
        """Strike the first request for every object."""
        if request.method != "GET" or not request.key or (fault in ("stall", "slow") and len(struck) >= 3):
            return None
        new = request.key not in struck
        struck.add(request.key)
        return fault if new and (fault != "corrupt" or "/c." in request.key) else None

    bucket.fault = once_each
    short = options.model_copy(update={"timeout_s": 0.3, "block_mb": 1.0})
    assert everything(open_store(remote, remote=short)) == everything(local.open())
    assert struck


def test_bytes_that_arrive_wrong_twice_are_an_error_and_never_a_value(
    bucket: Any, remote: str, options: RemoteOptions
) -> None:
    store = open_store(remote, remote=options)
    bucket.fault = lambda request: "corrupt"
    with pytest.raises(CorruptionError, match=r"s3://bucket/some/s/frames/grid/c\.1\.0\.0\.0.*fetched twice") as raised:
        store.read("grid", np.arange(8, 16))
    assert str(options.folder) not in str(raised.value)
    bucket.fault = lambda request: None
    store.read("grid", np.arange(8, 16))  # and none of them stayed in the cache


def test_damage_in_the_cache_mends_itself(bucket: Any, remote: str, local: Any, options: RemoteOptions) -> None:
    want = everything(local.open())
    assert everything(open_store(remote, remote=options)) == want
    for path in sorted(options.folder.rglob("*")):
        if (
            path.is_file()
            and path.parts[-2] not in ("cache", "blocks")
            and "/files/" in str(path)
            and path.stat().st_size
        ):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert everything(open_store(remote, remote=options)) == want


def test_an_object_that_was_replaced_is_refused_by_who_had_it_open(
    bucket: Any, remote: str, local: Any, options: RemoteOptions
) -> None:
    store = open_store(remote, remote=options)
    whole = bucket.objects[SHARD]
    bucket.objects[SHARD] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(StoreError, match=r"c\.1\.0\.0\.0 was replaced"):
        store.read("grid", np.arange(8, 16))
    with pytest.raises(CorruptionError):
        open_store(remote, remote=options).read("grid", np.arange(8, 16))
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        store.read("grid", np.arange(8, 16))
    bucket.objects[SHARD] = whole
    assert everything(open_store(remote, remote=options)) == everything(local.open())


def test_another_store_in_its_place_is_another_store(
    bucket: Any, remote: str, make_store: Any, memory_path: Path, options: RemoteOptions, write_remote: Any
) -> None:
    old = open_store(remote, remote=options)
    everything(old)
    other = make_store(memory_path / "other", lengths=(9, 11, 4), seed=1, features={"grid": ((1, 3, 40), "float16")})
    write_remote(other, options, overwrite=True)
    assert everything(open_store(remote, remote=options)) == everything(other.open())


def test_the_cache_keeps_its_limit(bucket: Any, remote: str, local: Any, options: RemoteOptions) -> None:
    # Shards of 2 KiB and of 0.6 KiB: 6 files, pages of 4 KiB. Room for three.
    small = options.model_copy(update={"limit_gb": 12 / 2**20, "threads": 2})
    store = open_store(remote, remote=small)
    cache = CacheFolder(small)
    rows = np.random.default_rng(0).permutation(24)
    for row in [*rows.tolist(), *rows.tolist()]:
        got = store.read("grid", np.array([row]))
        assert got.tobytes() == local.features["grid"][row : row + 1].tobytes()
        assert cache.used_bytes() <= small.limit_bytes
    cache.close()


def test_the_least_recently_used_shard_goes_first(bucket: Any, remote: str, options: RemoteOptions) -> None:
    small = options.model_copy(update={"limit_gb": 12 / 2**20})
    store = open_store(remote, remote=small)
    for row in (0, 8, 0, 16):  # units 0, 1, 0, 2: unit 1 has to go
        store.read("grid", np.array([row]))
    bucket.requests.clear()
    store.read("grid", np.array([0]))
    assert bucket.requests == []
    store.read("grid", np.array([8]))
    assert {request.key for request in bucket.requests} == {SHARD}


def test_a_limit_below_one_batch_says_so(remote: str, options: RemoteOptions) -> None:
    store = open_store(remote, remote=options.model_copy(update={"limit_gb": 1 / 2**20}))
    with pytest.raises(MachineError, match=r"one batch needs .* MiB.*limit_gb"):
        store.read("grid", np.arange(24))


def test_two_readers_of_one_cache_fetch_a_block_for_both(
    bucket: Any, remote: str, local: Any, options: RemoteOptions
) -> None:
    stores = [open_store(remote, remote=options) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(everything, stores))
    assert found[0] == found[1] == everything(local.open())
    bucket.requests.clear()
    everything(open_store(remote, remote=options))
    assert not [request for request in bucket.requests if "/c." in request.key]


def test_inspect_says_the_same_of_both(
    remote: str, local: Any, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLA_CACHE", str(options.folder))
    facts = describe(remote)
    assert facts.pop("store") == remote
    here = describe(local.root)
    here.pop("store")
    assert facts == here


def test_what_is_no_store_is_said_to_be_none(bucket: Any, options: RemoteOptions) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/some/s is no store \(holds nothing\)"):
        open_store("s3://bucket/some/s", remote=options)
