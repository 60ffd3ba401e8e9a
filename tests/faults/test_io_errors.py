"""What the operating system may refuse, at three places of a run: one line, exit code 4, and the store goes on.

Seven kinds are put into the calls that write; below, those that can be had for real without a file system of one's own
(that one is in test_interrupted_runs.py, which also fails every single operation).
"""

from __future__ import annotations

import errno
import functools
import io
import os
import resource
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vla.stores.errors import MachineError
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

FEATURES = {"grid": ((1, 64, 32), "float16")}  # 4 KiB a row
PLACES = {
    "manifest": ("s.partial/", "zarr.json"),
    "unit": ("s/", {"zarr": "frames/grid/c.1.0.0.0.partial", "h5": "units/unit-000001.h5.partial"}),
    "record": ("s/", "commits/unit-000001.json.partial"),
}
KINDS = ["ENOSPC", "EIO", "EACCES", "EMFILE", "EINTR", "EROFS", "short"]


@pytest.fixture
def write(make_store: Callable[..., Any], form: str) -> Callable[..., Any]:
    """`write(root)` begins the store or goes on with it."""

    def go_on(root: Path, **options: Any) -> Any:
        return make_store(root, features=FEATURES, form={"format": form}, **{"resume": True} | options)

    return go_on


@pytest.fixture
def goes_on(
    write: Callable[..., Any], files_of: Callable[[Path], dict[str, bytes]], memory_path: Path
) -> Callable[[], None]:
    """`goes_on()`: what is committed is sound, and resuming ends with the bytes of a run that nothing went wrong in."""

    def check() -> None:
        if (memory_path / "s").exists():
            findings = verify_store(memory_path / "s").findings
            assert not [line for line in findings if line.startswith("array")]
            open_store(memory_path / "s", allow_partial=True)
        write(memory_path / "s")
        write(memory_path / "whole")
        assert files_of(memory_path / "s") == files_of(memory_path / "whole")
        assert not list(memory_path.rglob("*.partial"))

    return check


def failing_open(kind: str, suffix: str, struck: list[str]) -> Callable[..., Any]:
    """An `open` under which one file cannot be opened, or takes half of what is written and then no more."""
    real = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "r" in mode or not str(file).endswith(suffix):
            return real(file, mode, *rest, **options)
        code = getattr(errno, kind, 0)
        error = OSError(code, os.strerror(code), str(file))
        struck.append(kind)
        if kind in ("EACCES", "EMFILE", "EROFS"):
            raise error
        target = real(file, mode, *rest, **options)
        through = target.write

        def write_half(data: Any) -> int:
            half = through(memoryview(data)[: max(1, len(memoryview(data)) // 2)])
            if kind == "short":
                return int(half)
            raise error

        target.write = write_half
        return target

    return opened


@pytest.mark.parametrize(
    ("place", "kind"),
    # The metadata are written by zarr-python, through Python's own buffers, which go on after a short write.
    [(place, kind) for place in PLACES for kind in KINDS if (place, kind) != ("manifest", "short")],
)
def test_an_error_at_any_place_is_one_line_and_the_store_goes_on(
    memory_path: Path,
    write: Callable[..., Any],
    goes_on: Callable[[], None],
    form: str,
    place: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, name = PLACES[place]
    suffix, struck = f"{folder}{name[form] if isinstance(name, dict) else name}", []
    monkeypatch.setattr(io, "open", failing_open(kind, suffix, struck))
    if kind == "short":
        write(memory_path / "s")
    else:
        with pytest.raises(MachineError) as raised:
            write(memory_path / "s")
        assert raised.value.exit_code == 4
        assert "\n" not in str(raised.value)
        assert str(memory_path) in str(raised.value)
        assert (memory_path / "s").exists() == (place != "manifest")
    monkeypatch.undo()
    assert struck
    if place != "manifest" and kind != "short":
        assert sorted(open_store(memory_path / "s", allow_partial=True).commits) == [0]
    goes_on()


# ---- for real ----


@pytest.fixture
def limited() -> Any:
    """`limited(which, value)` lowers a limit of this process until the end of the test or `limited()`."""
    before: dict[int, tuple[int, int]] = {}

    def limit(which: int | None = None, value: int = 0) -> None:
        if which is not None:
            before[which] = resource.getrlimit(which)
            resource.setrlimit(which, (value, before[which][1]))
        else:
            while before:
                resource.setrlimit(*before.popitem())

    yield limit
    limit()


def test_a_real_limit_on_the_size_of_files_is_one_line(
    memory_path: Path, write: Callable[..., Any], goes_on: Callable[[], None], limited: Callable[..., None]
) -> None:
    write(memory_path / "s", units=[0])
    limited(resource.RLIMIT_FSIZE, 20_000)  # a unit has 33 KB: the kernel takes a part of it, then no more
    with pytest.raises(MachineError, match=r"larger than .*allowed.*ulimit -f") as raised:
        write(memory_path / "s")
    limited()
    assert "\n" not in str(raised.value)
    assert [path.stat().st_size for path in memory_path.rglob("*.partial")] == [20_000]
    goes_on()


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_real_lack_of_file_descriptors_is_one_line(
    memory_path: Path, write: Callable[..., Any], goes_on: Callable[[], None], limited: Callable[..., None]
) -> None:
    write(memory_path / "s", units=[0])
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    said = set()
    for spare in range(8):
        limited(resource.RLIMIT_NOFILE, lowest + spare)
        try:
            write(memory_path / "s")
        except MachineError as error:
            said.add(error.found.rpartition(": ")[2])
        finally:
            limited()
    assert said == {"too many files are open"}
    goes_on()


def test_a_real_device_without_space_is_one_line(
    memory_path: Path, write: Callable[..., Any], goes_on: Callable[[], None], form: str
) -> None:
    """A device like /dev/full is a disk that is full: the temporary name of a file is that device."""
    made = write(memory_path / "s", units=[0])
    name = {"zarr": "frames/grid/c.1.0.0.0.partial", "h5": "units/unit-000001.h5.partial"}[form]
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        try:
            os.mknod(made.root / name, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
            (made.root / name).open("rb").close()
        except PermissionError:
            pytest.skip("this user or file system makes no devices")
        buffer = writer.begin(1)
        buffer.put(8, {"grid": made.features["grid"][8:16]})
        with pytest.raises(MachineError, match="the disk is full") as raised:
            writer.commit(buffer)
    assert "\n" not in str(raised.value)
    goes_on()


def test_a_real_folder_without_permission_is_one_line(
    memory_path: Path, write: Callable[..., Any], goes_on: Callable[[], None], form: str
) -> None:
    (memory_path / "to").mkdir()
    memory_path.chmod(0o755)
    write(memory_path / "s", units=[0])
    if os.geteuid() == 0:  # root may write anywhere: a child becomes nobody
        for path in (memory_path, *memory_path.rglob("*")):
            os.chown(path, 65534, 65534)
    units = {"zarr": "s/frames/grid", "h5": "s/units"}[form]
    for closed, root in {units: "s", "s/commits": "s", "to": "to/s"}.items():
        (memory_path / closed).chmod(0o555)
        assert as_nobody(functools.partial(write, memory_path / root)) == 4, closed
        (memory_path / closed).chmod(0o755)
    assert list((memory_path / "to").iterdir()) == []
    goes_on()


def as_nobody(work: Callable[[], Any]) -> int:
    """Run `work` in a child without privileges; return the exit code of the `MachineError` of a permission, or 0."""
    child = os.fork()
    if child == 0:
        code = 99
        with suppress(BaseException):
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                work()
                code = 0
            except MachineError as error:
                code = error.exit_code if "permission is denied" in str(error) and "\n" not in str(error) else 98
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
