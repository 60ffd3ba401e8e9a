"""A server of the S3 protocol on loopback, a store in its bucket, and the environment that leads there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.s3_server import Server
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.publish import open_remote_writer

URL = "s3://bucket/some/s"
LENGTHS = (9, 11, 4)
FEATURES = {"grid": ((1, 3, 40), "float16"), "pooled": ((2, 8), "float32")}


@pytest.fixture(scope="session")
def _server() -> Iterator[Any]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's content, empty: `objects` by key, `requests` so far, `fault` to inject."""
    _server.bucket = type(_server.bucket)()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    for module in ("bucket",):  # waits between attempts, not their number
        monkeypatch.setattr(f"vla.stores.remote.{module}.FIRST_WAIT_S", 0.001)
    return _server.bucket


@pytest.fixture
def options(memory_path: Path) -> RemoteOptions:
    """A cache of its own, blocks of 1 KiB."""
    return RemoteOptions(cache=str(memory_path / "cache"), block_mb=1 / 1024, timeout_s=30.0)


@pytest.fixture
def local(make_store: Callable[..., Any], memory_path: Path) -> Any:
    """The same store on disk: what every remote one is compared with."""
    return make_store(memory_path / "local" / "s", lengths=LENGTHS, features=FEATURES)


@pytest.fixture(scope="session")
def write_remote() -> Callable[..., None]:
    """`write_remote(made, options, units=None, url=URL, **flags)` writes the content of a local store to the bucket."""

    def write(
        made: Any, options: RemoteOptions, *, units: int | None = None, url: str = URL, pace: Any = None, **flags: bool
    ) -> None:
        manifest = made.manifest.model_copy(update={"tables": {}})
        with open_remote_writer(url, manifest, made.episodes, options, **flags) as writer:
            for unit in writer.pending()[:units]:
                buffer = writer.begin(unit)
                rows = slice(buffer.rows.start, buffer.rows.stop)
                values = {name: array[rows].astype(np.float32) for name, array in made.features.items()}
                buffer.put(rows.start, values)
                for name, array in made.steps.items():
                    buffer.steps[name][: len(buffer.rows)] = array[rows]
                if pace is not None:
                    pace(unit)
                writer.commit(buffer)

    return write


@pytest.fixture
def remote(bucket: Any, local: Any, options: RemoteOptions, write_remote: Callable[..., None]) -> str:
    """The URL of the store, complete in the bucket."""
    write_remote(local, options)
    bucket.requests.clear()
    return URL


@pytest.fixture(scope="session")
def content() -> Callable[[Any], dict[str, bytes]]:
    """`content(bucket)` returns what lies below the store's URL, `{path: bytes}`."""

    def below(bucket: Any) -> dict[str, bytes]:
        prefix = URL.removeprefix("s3://bucket/") + "/"
        return {key.removeprefix(prefix): data for key, data in bucket.objects.items() if key.startswith(prefix)}

    return below
