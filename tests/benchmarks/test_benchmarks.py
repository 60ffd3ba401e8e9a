"""The benchmarks' parts at toy size, so that the scripts cannot rot. Nothing here is timed against anything."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import missing_extra

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = (1, 2, 8)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`load(name)` imports a module of `benchmarks/` as its scripts do, but without `keep_freed_memory`."""
    # pytest names the package at the root after its folder, whatever that is called.
    monkeypatch.delitem(sys.modules, "peers", raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("vla.stores.memory.keep_freed_memory", lambda: False)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def kept(load: Any, tmp_path: Path) -> tuple[np.ndarray[Any, Any], Path]:
    """Frames of two short episodes, and a store of them."""
    frames = np.random.default_rng(0).standard_normal((256, *SMALL)).astype(np.float16)
    module = load("random_store")
    module.write_store(tmp_path / "store", 256, {"grid": SMALL}, lambda some: {"grid": frames[some.start : some.stop]})
    return frames, tmp_path / "store"


def test_every_peer_reads_the_same_windows(load: Any, kept: Any, tmp_path: Path) -> None:
    frames, store = kept
    peers = load("peers")
    starts, read = [0, 3, 126, 130, 254], []
    for name in peers.WINDOW_PEERS:
        peer = peers.find(name)
        if isinstance(peer, str):
            continue
        folder = tmp_path / name
        folder.mkdir()
        peer.build(folder, frames, store)
        out = np.zeros((len(starts) * 2, *SMALL), np.float16)
        peer.open_reader(folder, frames, store, 2)(starts, out)
        np.testing.assert_array_equal(
            out, np.concatenate([frames[start : start + 2] for start in starts]), err_msg=name
        )
        read.append(name)
    assert {"zarr_python", "dp_disk", "dp_disk_two_frames", "dp_disk_zarr3", "dp_ram", "pt", "h5py"} <= set(read)


def test_a_peer_that_is_not_installed_is_skipped_by_name_saying_how_to_install_it(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    peers = load("peers")
    assert peers.find("tensorstore") == f"tensorstore is skipped: {missing_extra('bench')}"
    assert "pip install mosaicml-streaming" in peers.find("mds")


def test_read_windows_reports_a_ratio_for_every_peer(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("read_windows")
    monkeypatch.setattr(module, "WINDOW_PEERS", ("pt", "h5py"))
    monkeypatch.setattr(module, "GRID", SMALL)
    monkeypatch.setattr(module, "COARSE", (1, 1, 8))
    monkeypatch.setattr(module, "FINE", SMALL)
    monkeypatch.setattr(module, "BATCH", 4)
    figures = module.measure(rows=128, batches=4, rounds=2)
    assert figures.keys() >= {"share_of_ram_copy", "share_of_ram_copy_verified", "vs_pt", "vs_h5py", "vs_pt_history"}
    assert all(value > 0 for value in figures["windows_per_s"].values())
    assert figures["vs_pt_range"]["min"] <= figures["vs_pt"] <= figures["vs_pt_range"]["max"]


def test_slow_contestants_are_scaled_to_the_same_work(load: Any) -> None:
    module = load("read_windows")
    assert (module.share("ours", 16), module.share("pt", 16), module.share("pt", 1)) == (16, 4, 1)


def test_the_page_cache_of_a_file_can_be_emptied_and_looked_at(load: Any, tmp_path: Path) -> None:
    module = load("page_cache")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    assert module.resident([file]) == 1.0
    module.drop([file])
    # A file system in memory keeps its pages.
    assert module.resident([file]) in (0.0, 1.0)


def test_cold_reads_compares_what_was_read_in_the_same_time(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load("cold_reads")
    shape = (1, 8, 256)  # one page a row, as O_DIRECT demands
    monkeypatch.setattr(module, "GRID", shape)
    monkeypatch.setattr(module, "ROW_BYTES", 4096)
    monkeypatch.setattr(module, "BATCH", 8)
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    figures = module.measure(tmp_path, rows=256, batches=2, rounds=2)
    assert figures["share_of_disk_limit"] > 0
    assert set(figures["mb_per_s"]) == {"direct_1", "direct_4", "direct_16", "one_by_one", "random", "blocks"}


def test_large_store_opens_and_inspects_in_processes_of_their_own(load: Any, tmp_path: Path) -> None:
    module = load("large_store")
    module.make_store(tmp_path / "store", 60)
    figures = module.in_new_process(module.OPEN, tmp_path / "store")
    assert figures["windows"] == 600
    assert figures["memory_mb"] > 1
    assert module.in_new_process(module.INSPECT, tmp_path / "store")["inspect_s"] > 0


def test_the_slope_of_memory_is_in_mb_per_thousand_batches(load: Any) -> None:
    module = load("memory_slope")
    assert module.slope([5.0, 5.5, 6.0, 6.5], every=100) == pytest.approx(5.0)


def test_memory_slope_reads_and_trains_at_toy_size(load: Any, kept: Any, tmp_path: Path) -> None:
    _, store = kept
    module = load("memory_slope")
    module.GRID = SMALL
    assert len(module.read_batches(store, batches=250)) == 3
    figures = module.train(store, tmp_path / "run", steps=12)
    assert figures["log_lines_with_data_wait_share"] == 1.0
    assert figures["memory_mb"] > 1


def test_a_head_is_measured_on_features_made_from_its_needs(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vla.heads.needs import Need

    module = load("heads")
    needs = (Need("grid", "toy", ("y", "x")),)
    monkeypatch.setattr(module, "requirements", lambda head: needs)
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "SAMPLING_STEPS", (1, 2))
    figures = module.measure_head("fm", {"width": 8, "layers": 1, "encoder": {"dim": 8, "queries": 2}}, True)
    assert figures["features"] == ["grid"]
    assert figures["train_steps_per_s"] > 0
    assert figures["latency_cpu_ms"].keys() == {"1", "2"}
    assert figures["latency_cpu_ms"]["1"]["p50"] <= figures["latency_cpu_ms"]["1"]["p95"]


def test_a_head_whose_features_cannot_be_made_here_is_told_in_its_place(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla.heads.needs import Need

    module = load("heads")
    monkeypatch.setattr(module, "requirements", lambda head: (Need("grid", "croco", ("y", "x")),))
    assert "checkout" in module.measure_head("mlp", {}, True)["left_out"]
