"""Whole files or none, durable before they are named, and in an order that a loss of power respects."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import MachineError
from vla.stores.filesystem import explaining, write_atomic, write_atomic_parts
from vla.stores.owned import STORE, sweep
from vla.stores.writer import open_writer


def record_operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Note each fsync with the path of what was synced, and each replace with the new name."""
    log: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        log.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noted_replace(source: Any, target: Any, **options: Any) -> None:
        log.append(("replace", str(target)))
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return log


def test_a_file_is_durable_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = record_operations(monkeypatch)
    digest = write_atomic_parts(tmp_path / "f", [b"one", memoryview(b""), np.arange(3, dtype="<u2").data])
    content = b"one\0\0\1\0\2\0"
    assert (tmp_path / "f").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    file = str(tmp_path / "f")
    assert log == [("fsync", f"{file}.partial"), ("replace", file), ("fsync", str(tmp_path))]


def test_every_file_of_a_unit_is_durable_before_the_record_that_commits_it(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "s", units=[])
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        buffer = writer.begin(0)
        buffer.put(0, {"grid": made.features["grid"][:8].astype(np.float32)})
        log = record_operations(monkeypatch)
        commit = writer.commit(buffer)
    named = [Path(path).relative_to(made.root).as_posix() for what, path in log if what == "replace"]
    assert named[-1] == "commits/unit-000000.json"
    assert sorted(named[:-1]) == sorted(commit.files)
    for position, (what, path) in enumerate(log):
        if what == "replace":
            assert log[position - 1] == ("fsync", f"{path}.partial")
            assert log[position + 1] == ("fsync", str(Path(path).parent))


def test_a_new_store_is_durable_before_it_gets_its_name(
    tmp_path: Path, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = record_operations(monkeypatch)
    rename = os.rename

    def noted(source: Any, target: Any, **options: Any) -> None:
        log.append(("rename", str(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", noted)
    make_store(tmp_path / "s", units=[])
    at = log.index(("rename", str(tmp_path / "s")))
    synced = {path for what, path in log[:at] if what == "fsync"}
    below = {str(path).replace("/s/", "/s.partial/") for path in (tmp_path / "s").rglob("*")}
    assert below <= synced
    assert log[at + 1] == ("fsync", str(tmp_path))


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = io.open

    def short(*arguments: Any, **options: Any) -> Any:
        file = real(*arguments, **options)
        write = file.write
        file.write = lambda data: write(memoryview(data)[:most])
        return file

    monkeypatch.setattr(io, "open", short)
    digest = write_atomic_parts(tmp_path / "f", [b"hello ", b"world"])
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"hello world"
    assert digest == hashlib.sha256(b"hello world").hexdigest()


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    write_atomic(tmp_path / "f", b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(MachineError, match="input/output error"):
        write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission is denied"),
        (errno.EROFS, "read-only"),
        (errno.EMFILE, "too many files"),
        (errno.EFBIG, "larger than .* is allowed"),
        (errno.EIO, "input/output error"),
        (errno.ENAMETOOLONG, "File name too long"),
    ],
)
def test_each_cause_is_one_line_with_the_file_and_the_remedy(number: int, said: str) -> None:
    with pytest.raises(MachineError, match=said) as raised, explaining(Path("/there")):
        raise OSError(number, os.strerror(number), "/there/file")
    assert str(raised.value).startswith("/there/file: ")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 4


def test_sweeping_deletes_debris_and_nothing_else(tmp_path: Path) -> None:
    debris = [
        "zarr.json.partial",
        "tasks.partial/zarr.json",
        "steps.partial/x/c.0.partial",
        "commits/unit-000001.json.partial",
    ]
    others = ["frames/keep.partially", "mine.partial", "steps.partial/mine", "sub/b.partial", "zarr.json"]
    for name in (*debris, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(debris) < set(sweep(tmp_path, STORE))
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == others
