"""The main path against a server of the S3 protocol that others wrote: moto's, or any at $VLA_TEST_S3_ENDPOINT.

The endpoint's bucket `vla-test` is made where the server lets anybody make it; credentials come from the environment.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import CorruptionError, MachineError, StoreError, UsageError
from vla.stores.remote.bucket import Bucket, ReplacedError, TakenError
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.verify import verify_remote
from vla.stores.store import open_store

BUCKET = "vla-test"


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that runs already, or moto's for as long as these tests take."""
    given, moto = os.environ.get("VLA_TEST_S3_ENDPOINT"), shutil.which("moto_server")
    if given:
        yield given
        return
    if moto is None:
        pytest.skip("no moto_server on the PATH (pip install 'moto[server]') and no $VLA_TEST_S3_ENDPOINT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        command = [moto, "-H", "127.0.0.1", "-p", str(port)]
        # Its own environment: PYTHONPATH and settings of this one are not meant for it.
        server = subprocess.Popen(command, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 50
        while not _answers(url) and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if server.poll() is not None:
            pytest.skip(f"{moto} does not start here (pip install 'moto[server]')")
        yield url
        server.terminate()
        server.wait()


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own for each test."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", "us-east-1")):
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:  # there already, or not for us to make
        if error.code not in (403, 409):
            raise
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/s"


def test_write_resume_verify_and_read_back(
    url: str, local: Any, options: RemoteOptions, write_remote: Callable[..., None], files_of: Any
) -> None:
    write_remote(local, options, url=url, units=1)
    with pytest.raises(UsageError, match="--resume"):
        write_remote(local, options, url=url)
    write_remote(local, options, url=url, resume=True)
    bucket = Bucket(url, options)
    stored = {path: bucket.get(path) for path in bucket.objects()}
    here = {path: data for path, data in files_of(local.root).items() if not path.endswith("writer.lock")}
    assert stored == here
    assert verify_remote(url, options, lambda done, total: None).findings == []
    rows = np.random.default_rng(0).permutation(24)
    there = open_store(url, remote=options)
    for name in local.features:
        assert there.read(name, rows).tobytes() == local.features[name][rows].tobytes()
    shard = "frames/grid/c.1.0.0.0"
    bucket.put(shard, stored[shard][:-1] + bytes([stored[shard][-1] ^ 1]))
    (finding,) = verify_remote(url, options, lambda done, total: None).findings
    assert "grid, unit 1" in finding
    fresh = options.model_copy(update={"cache": options.cache + "-2"})  # type: ignore[operator]
    with pytest.raises(CorruptionError):
        open_store(url, remote=fresh).read("grid", np.arange(8, 16))


def test_large_objects_go_up_in_parts_and_come_in_ranges(
    url: str, make_store: Any, memory_path: Path, options: RemoteOptions, write_remote: Callable[..., None]
) -> None:
    big = make_store(memory_path / "big", lengths=(4,), unit_rows=4, features={"map": ((1, 900_000), "float16")})
    write_remote(big, options, url=url)
    there = open_store(url, remote=options.model_copy(update={"block_mb": 1.0}))
    assert there.read("map", np.array([3, 1])).tobytes() == big.features["map"][[3, 1]].tobytes()


def test_conditional_requests_hold(
    url: str, local: Any, options: RemoteOptions, write_remote: Callable[..., None], tmp_path: Path
) -> None:
    bucket = Bucket(url, options)
    tag = bucket.create("one", b"1")
    with pytest.raises(TakenError):
        bucket.create("one", b"2")
    assert bucket.replace("one", b"3", tag) != tag
    with pytest.raises(ReplacedError):
        bucket.replace("one", b"4", tag)
    with pytest.raises(ReplacedError):
        bucket.get("one", etag=tag)
    assert bucket.get("one") == b"3"
    bucket.delete(["one"])
    elsewhere = options.model_copy(update={"cache": str(tmp_path / "elsewhere")})

    def second(unit: int) -> None:
        with pytest.raises(StoreError, match="is being written by"):
            write_remote(local, elsewhere, url=url, resume=True)

    write_remote(local, options, url=url, pace=second)


def test_a_bucket_that_is_not_there_is_said_in_one_line(url: str, options: RemoteOptions) -> None:
    with pytest.raises(MachineError, match=r"s3://vla-nothing/s: .*404 Not Found \(NoSuchBucket\)") as raised:
        open_store("s3://vla-nothing/s", remote=options)
    assert "\n" not in str(raised.value)
