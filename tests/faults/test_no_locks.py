"""File systems that grant no locks (NFS without a lock daemon, Lustre mounted without flock), and locks of others."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vla.featurize.hdf5 import opened
from vla.stores.errors import MachineError
from vla.stores.remote.cache import CacheFolder
from vla.stores.remote.options import RemoteOptions
from vla.stores.shared_writer import open_shared_writer
from vla.stores.writer import open_writer

NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.fixture
def made(make_store: Callable[..., Any], memory_path: Path) -> Any:
    return make_store(memory_path / "s", units=[0])


def refusing(number: int) -> Callable[..., None]:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, "as the file system answers")

    return refuse


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_writer_on_a_file_system_without_locks_is_refused_naming_the_cause(
    number: int, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with (
        pytest.raises(MachineError, match=r"locks.*--out") as raised,
        open_writer(made.root, made.manifest, made.episodes, resume=True),
    ):
        pass
    assert str(made.root) in str(raised.value)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_claiming_a_unit_on_a_file_system_without_byte_range_locks_is_refused(
    number: int, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.lockf", refusing(number))
    with (
        open_shared_writer(made.root, made.manifest, made.episodes) as writer,
        pytest.raises(MachineError, match=r"locks.*--out"),
    ):
        writer.claim(1)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_cache_on_a_file_system_without_locks_is_refused_naming_the_setting(
    number: int, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheFolder(RemoteOptions(cache=str(memory_path / "cache")))
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with pytest.raises(MachineError, match=r"locks.*VLA_CACHE"), cache.shared():
        pass
    cache.close()


def test_a_store_in_hdf5_is_read_without_locking_its_files(make_store: Callable[..., Any], memory_path: Path) -> None:
    """Another program's lock, which HDF5 would wait for or fail at, does not matter to a reader."""
    made = make_store(memory_path / "s", form={"format": "h5"})
    with (made.root / "units/unit-000001.h5").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert made.open().read("grid", np.arange(20)).tobytes() == made.features["grid"].tobytes()
        assert made.open().steps("action").tobytes() == made.steps["action"].tobytes()


def test_a_file_that_hdf5_cannot_lock_names_the_variable(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where HDF5_USE_FILE_LOCKING=TRUE is set, which outranks what a program asks for."""
    found = "[Errno 37] Unable to open file (unable to lock file, errno = 37, error message = 'No locks available')"

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOLCK, found)

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(MachineError, match="HDF5_USE_FILE_LOCKING=FALSE"), opened(memory_path / "x.h5"):
        pass


def test_a_unit_that_hdf5_cannot_lock_names_the_variable(
    make_store: Callable[..., Any], memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(memory_path / "s", form={"format": "h5"})

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOLCK, "unable to lock file, errno = 37, error message = 'No locks available'")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(MachineError, match="HDF5_USE_FILE_LOCKING=FALSE"):
        made.open().steps("action")
