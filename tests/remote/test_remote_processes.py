"""Processes that are killed while they upload or read, that share one cache, or that write the same store."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vla.stores.remote.lease import LEASE
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.verify import verify_remote
from vla.stores.store import open_store

URL = "s3://bucket/some/s"
SCRIPT = Path(__file__).with_name("processes.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(task, *arguments, options)` begins processes.py; what still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, options: RemoteOptions) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments), options.model_dump_json()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def is_write(request: Any) -> bool:
    return request.method in ("PUT", "POST", "DELETE")


def kill_at(bucket: Any, start: Start, number: int, *arguments: object, counts: Any, options: Any, fault: str) -> bool:
    """Run a process and kill it at its request `number` that `counts`; say whether it came to that."""
    seen = 0
    process: subprocess.Popen[str] | None = None

    def strike(request: Any) -> str | None:
        nonlocal seen
        if not counts(request):
            return None
        seen += 1
        if seen < number:
            return None
        assert process is not None
        process.kill()
        return fault

    bucket.fault = strike
    process = start(*arguments, options=options)
    _, errors = process.communicate(timeout=50)
    bucket.fault = lambda request: None
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def expected(local: Any, files_of: Callable[[Path], dict[str, bytes]]) -> dict[str, bytes]:
    return {path: data for path, data in files_of(local.root).items() if not path.endswith("writer.lock")}


@pytest.mark.slow
def test_an_upload_that_is_killed_again_and_again_ends_in_the_same_bytes(
    bucket: Any, local: Any, options: RemoteOptions, start: Start, content: Any, files_of: Any
) -> None:
    # 9 files and a record a unit after some 30 of the store itself: in its metadata, in a unit, before a record is
    # made, and after it is made but before its writer knows.
    for number, fault in ((12, "reset"), (34, "reset"), (12, "truncate-answer")):
        assert kill_at(
            bucket, start, number, "write", local.root, URL, counts=is_write, options=options, fault=fault
        ), f"no request {number}"
        if f"some/s/{LEASE}" in bucket.objects and "some/s/zarr.json" in bucket.objects:
            report = verify_remote(URL, options, lambda done, total: None)
            assert report.damaged == report.unreadable == []
    process = start("write", local.root, URL, options=options)
    assert process.communicate(timeout=50)[1] == ""
    assert content(bucket) == expected(local, files_of)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", ["reset", "truncate-answer"])
def test_an_upload_killed_at_any_request_is_resumed_to_the_same_bytes(
    bucket: Any, local: Any, options: RemoteOptions, start: Start, content: Any, files_of: Any, fault: str
) -> None:
    number, killed = 1, True
    while killed:
        bucket.objects.clear()
        killed = kill_at(bucket, start, number, "write", local.root, URL, counts=is_write, options=options, fault=fault)
        process = start("write", local.root, URL, options=options)
        assert process.communicate(timeout=50)[1] == "", number
        assert content(bucket) == expected(local, files_of), number
        number += 1
    assert number > 40


@pytest.mark.slow
def test_processes_that_share_a_cache_which_is_too_small_read_the_same_values(
    bucket: Any, remote: str, options: RemoteOptions, start: Start, tmp_path: Path
) -> None:
    alone = start("read", remote, options=options.model_copy(update={"cache": str(tmp_path / "own")}))
    small = options.model_copy(update={"limit_gb": 12 / 2**20})
    killed = kill_at(
        bucket,
        start,
        6,
        "read",
        remote,
        counts=lambda request: "/frames/" in request.key and request.method == "GET" and "c." in request.key,
        options=small,
        fault="reset",
    )
    assert killed
    readers = [start("read", remote, options=small) for _ in range(2)]
    outputs = [process.communicate(timeout=50) for process in (alone, *readers)]
    assert [errors for _, errors in outputs] == ["", "", ""]
    assert len({digest for digest, _ in outputs}) == 1


@pytest.mark.slow
def test_of_two_processes_that_write_one_store_the_second_is_refused(
    bucket: Any, local: Any, options: RemoteOptions, start: Start, content: Any, files_of: Any, tmp_path: Path
) -> None:
    second: list[tuple[str, str]] = []

    def when_a_record_is_made(request: Any) -> str | None:
        if request.method == "PUT" and request.key.endswith("unit-000001.json") and not second:
            second.append(("", ""))  # once
            bucket.fault = lambda request: None
            elsewhere = options.model_copy(update={"cache": str(tmp_path / "elsewhere")})
            second[0] = start("write", local.root, URL, options=elsewhere).communicate(timeout=50)
        return None

    bucket.fault = when_a_record_is_made
    first = start("write", local.root, URL, options=options)
    assert first.communicate(timeout=50) == ("wrote [0, 1, 2]\n", "")
    ((_, errors),) = second
    assert f"{URL} is being written by" in errors
    assert f"process {first.pid}" in errors
    assert content(bucket) == expected(local, files_of)
    assert open_store(URL, remote=options).complete
