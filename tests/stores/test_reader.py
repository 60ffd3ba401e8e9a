"""The direct reader: verification modes, open files, short reads, fork."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores import reader as reader_module
from vla.stores.errors import CorruptionError, MachineError


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 4
    path.write_bytes(raw)


def test_runs_longer_than_one_system_call_are_read_whole(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s", lengths=(1500,), unit_rows=1500)
    rows = np.arange(1500)
    np.testing.assert_array_equal(made.open().read("grid", rows), made.features["grid"])


def test_more_units_than_open_files_are_read(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 2)
    made = make_store(tmp_path / "s", lengths=(12,), unit_rows=2)
    store = made.open()
    before = open_files()
    reader = store.reader("grid")
    out = np.empty((1, 1, 3, 4), np.float16)
    for row in np.random.default_rng(0).integers(0, 12, size=60):
        reader.read(np.array([row]), out)
        np.testing.assert_array_equal(out[0], made.features["grid"][row])
        assert open_files() <= before + 2
    reader.close()
    assert open_files() == before


def test_first_checks_a_row_once_always_every_time_never_not_at_all(
    tmp_path: Path, make_store: Callable[..., Any]
) -> None:
    made = make_store(tmp_path / "s")
    shard = tmp_path / "s" / "frames" / "grid" / "c.0.0.0.0"
    out, rows = np.empty((2, 1, 3, 4), np.float16), np.array([1, 3])
    readers = {verify: made.open().reader("grid", verify) for verify in ("first", "always", "never")}
    for reader in readers.values():
        reader.read(rows, out)
    flip(shard, 1 * 28 + 5)  # row 1: 24 bytes of values, 4 of checksum
    readers["first"].read(rows, out)
    readers["never"].read(rows, out)
    with pytest.raises(CorruptionError, match=r"row 1"):
        readers["always"].read(rows, out)
    with pytest.raises(CorruptionError, match=r"row 1"):
        made.open().reader("grid", "first").read(rows, out)
    made.open().reader("grid", "first").read(rows[1:], out[1:])


def test_a_row_that_was_refused_is_refused_again(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s")
    flip(tmp_path / "s" / "frames" / "grid" / "c.0.0.0.0", 0)
    reader, out = made.open().reader("grid", "first"), np.empty((2, 1, 3, 4), np.float16)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"row 0"):
            reader.read(np.array([0, 1]), out)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "order"])
def test_memory_that_does_not_fit_is_refused(tmp_path: Path, make_store: Callable[..., Any], wrong: str) -> None:
    reader = make_store(tmp_path / "s").open().reader("grid")
    out = {
        "shape": np.empty((3, 1, 3, 4), np.float16),
        "dtype": np.empty((2, 1, 3, 4), np.float32),
        "order": np.empty((4, 3, 1, 2), np.float16).T,
    }[wrong]
    with pytest.raises(ValueError, match="out is"):
        reader.read(np.array([0, 1]), out)


@pytest.mark.parametrize("row", [-1, 20])
def test_rows_outside_the_store_are_refused(tmp_path: Path, make_store: Callable[..., Any], row: int) -> None:
    with pytest.raises(IndexError, match=f"{row}"):
        make_store(tmp_path / "s").open().read("grid", np.array([row]))


@pytest.mark.parametrize("most", [1, 7, 24, 28, 100])
def test_short_reads_are_continued(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    made = make_store(tmp_path / "s")

    def short(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        left, done = most, 0
        for buffer in buffers:
            part = memoryview(buffer)[:left]
            got = os.pread(descriptor, len(part), offset + done)
            part[: len(got)] = got
            done, left = done + len(got), left - len(got)
            if left == 0:
                break
        return done

    monkeypatch.setattr(os, "preadv", short)
    np.testing.assert_array_equal(made.open().read("grid", np.arange(20)), made.features["grid"])


def test_a_file_cut_while_it_is_open_is_noticed(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    made = make_store(tmp_path / "s")
    reader, out = made.open().reader("grid", "never"), np.empty((1, 1, 3, 4), np.float16)
    reader.read(np.array([0]), out)
    os.truncate(tmp_path / "s" / "frames" / "grid" / "c.0.0.0.0", 30)
    with pytest.raises(CorruptionError, match="ends before its index says"):
        reader.read(np.array([5]), out)


@pytest.mark.parametrize("operation", ["open", "fstat", "pread", "preadv"])
def test_an_error_of_the_disk_is_said_in_one_line(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    reader = make_store(tmp_path / "s").open().reader("grid")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(5, os.strerror(5))

    out, error = np.empty((1, 1, 3, 4), np.float16), ""
    with monkeypatch.context() as patched:
        patched.setattr(os, operation, fail)
        try:
            reader.read(np.array([0]), out)
        except MachineError as raised:
            error = str(raised)
    assert "input/output error" in error
    reader.read(np.array([0]), out)


@pytest.mark.skipif(sys.platform != "linux", reason="fork with threads is only safe enough on Linux")
def test_a_reader_carried_over_a_fork_is_refused(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    reader = make_store(tmp_path / "s").open().reader("grid")
    out = np.empty((1, 1, 3, 4), np.float16)
    reader.read(np.array([0]), out)
    child = os.fork()
    if child == 0:  # nothing but system calls here: the parent may have threads
        try:
            reader.read(np.array([0]), out)
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
