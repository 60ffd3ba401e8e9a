"""Blocks of shards, fetched before a reader wants them.

A reader says which byte ranges of which shards a batch needs; what is missing comes in ranged GETs, neighbouring
blocks in one, several at a time; then the same reader reads the local file as it would any other. Every GET names the
entity tag that the shard was listed with, so that bytes of two objects never meet in one file. A row that fails its
checksum drops the blocks that it came from, once; the second time it is the store that is damaged (reader.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla.stores.errors import MachineError
from vla.stores.fingerprint import digest
from vla.stores.open_files import OpenFiles
from vla.stores.remote.bucket import Bucket, ObjectInfo, ReplacedError
from vla.stores.remote.cache import HEADER, CacheFolder, emptied

LONGEST_GET = 16 << 20
"""Bytes of one GET: long enough for a connection's full speed, short enough to be tried again whole."""
MAX_OPEN = 64
"""Shards a reader keeps open, two files each: several readers have to fit into the usual limit of 1024."""
ROUNDS = 20
"""How often blocks may be dropped by other processes between fetching and reading before that is an error."""


@dataclass(frozen=True)
class Shard:
    """A shard in the bucket, the SHA-256 of its content as committed, and the tag that says all of it at once."""

    path: str
    info: ObjectInfo
    sha256: str
    block: int

    @cached_property
    def header(self) -> bytes:
        """What stands at the start of the file of marks: marks of another object or block size are not believed."""
        identity = {"etag": self.info.etag, "size": self.info.size, "sha256": self.sha256, "block": self.block}
        return f"vla blocks 1 {digest(identity)}\n".encode().ljust(HEADER, b"\0")

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.info.size // self.block)


def prepare(folder: Path, shard: Shard) -> None:
    """See to it that the sparse file and its marks are there and are this object's. Under the exclusive lock."""
    blocks, file = folder / "blocks" / shard.path, folder / "files" / shard.path
    if blocks.is_file() and file.is_file() and file.stat().st_size == shard.info.size:
        if _read_header(blocks) == shard.header:
            return
        emptied(blocks, file)
    for path in (blocks, file):
        path.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
        opened.truncate(0)
        opened.truncate(shard.info.size)
    with blocks.open("wb") as opened:
        opened.write(shard.header + bytes(shard.blocks))


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER)


class BlockCache:
    """The blocks of one remote store, for one reader (and so for one thread)."""

    def __init__(self, bucket: Bucket, folder: Path, shards: Mapping[str, Shard]) -> None:
        self._bucket, self._folder, self._shards = bucket, folder, shards
        self._cache = CacheFolder(bucket.options)
        self._threads = ThreadPoolExecutor(bucket.options.threads, thread_name_prefix="vla-fetch")
        self._files = OpenFiles[tuple[str, str]](2 * MAX_OPEN)  # by part of the cache ("blocks" or "files") and path
        self._touched: dict[str, NDArray[np.int64]] = {}

    def close(self) -> None:
        """End the threads and close all files."""
        self._threads.shutdown(cancel_futures=True)
        self._files.close()
        self._cache.close()

    @property
    def url(self) -> str:
        """Where the store is."""
        return self._bucket.url

    def begin(self) -> None:
        """Forget which blocks were used so far."""
        self._touched = {}

    def drop_used(self) -> None:
        """Have every block that was used since `begin` fetched again."""
        with self._cache.shared(), self._files.in_use():
            for path, numbers in self._touched.items():
                self._mark(path, numbers, 0)

    @contextmanager
    def holding(self, wanted: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[None]:
        """Have byte ranges in the local shards while this lasts: `{shard: (offsets [n], bytes from each on [n])}`.

        Raises `MachineError` where they cannot be fetched, `ReplacedError` where a shard is another object by now.
        """
        numbers = {path: self._numbers(self._shards[path], *ranges) for path, ranges in wanted.items()}
        for path, blocks in numbers.items():
            self._touched[path] = np.union1d(self._touched.get(path, blocks), blocks)
        for _ in range(ROUNDS):
            with self._cache.shared(), self._files.in_use():
                missing = self._missing(numbers)
                if not missing:
                    for path in numbers:
                        os.utime(self._descriptor("blocks", path))
                    yield
                    return
            self._fetch(numbers, missing)  # and look again: another process may make room in between
        raise MachineError(
            f"blocks of {self._bucket.url} are dropped as fast as they are fetched",
            fix="--set data.remote.limit_gb=N, a larger N",
        )

    def _numbers(self, shard: Shard, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        first, last = offsets // shard.block, (offsets + sizes - 1) // shard.block
        spans = [np.minimum(first + step, last) for step in range(int((last - first).max()) + 1)]
        return np.unique(np.concatenate(spans))

    def _missing(self, numbers: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        missing = {}
        for path, wanted in numbers.items():
            shard = self._shards[path]
            marks = os.pread(self._descriptor("blocks", path), HEADER + shard.blocks, 0)
            if marks[:HEADER] != shard.header:
                url = f"{self._bucket.url}/{path}"
                raise ReplacedError(f"{url} was replaced while it was being read", fix="run again")
            absent = wanted[np.frombuffer(marks, np.uint8)[HEADER + wanted] == 0]
            if len(absent):
                missing[path] = absent
        return missing

    def _fetch(self, numbers: Mapping[str, NDArray[np.int64]], missing: dict[str, NDArray[np.int64]]) -> None:
        keep = {self._folder / "blocks" / path for path in numbers}
        room = -1
        while (needed := self._bytes(missing)) != room:  # where the batch's own shards have to go, more is missing
            self._cache.make_room(needed, keep)
            room, missing = needed, self._missing(numbers)
        queue = [(path, run) for path, blocks in missing.items() for run in self._runs(path, blocks)]
        ahead = 2 * self._bucket.options.threads  # what has come waits in memory until it is written
        pending: dict[Future[bytes], tuple[str, NDArray[np.int64]]] = {}
        try:
            while queue or pending:
                while queue and len(pending) < ahead:
                    path, run = queue.pop()
                    pending[self._threads.submit(self._get, path, run)] = (path, run)
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    path, run = pending.pop(future)
                    self._keep(path, run, future.result())
        finally:
            for future in pending:
                future.cancel()

    def _bytes(self, numbers: Mapping[str, NDArray[np.int64]]) -> int:
        return sum(len(blocks) * self._shards[path].block for path, blocks in numbers.items())

    def _runs(self, path: str, blocks: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut ascending block numbers into neighbours that one GET brings."""
        most = max(1, LONGEST_GET // self._shards[path].block)
        runs: list[NDArray[np.int64]] = []
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
            runs += [run[at : at + most] for at in range(0, len(run), most)]
        return runs

    def _get(self, path: str, run: NDArray[np.int64]) -> bytes:
        shard = self._shards[path]
        end = min((int(run[-1]) + 1) * shard.block, shard.info.size)
        return self._bucket.get(path, span=(int(run[0]) * shard.block, end), etag=shard.info.etag)

    def _keep(self, path: str, run: NDArray[np.int64], data: bytes) -> None:
        shard = self._shards[path]
        with self._cache.shared(), self._files.in_use():
            self._missing({path: run})  # still this object's file
            view, offset = memoryview(data), int(run[0]) * shard.block
            while view:
                written = os.pwrite(self._descriptor("files", path), view, offset)
                view, offset = view[written:], offset + written
            self._mark(path, run, 1)

    def _mark(self, path: str, numbers: NDArray[np.int64], value: int) -> None:
        marks = self._descriptor("blocks", path)
        for number in numbers.tolist():  # a byte each: two processes never overwrite each other's
            os.pwrite(marks, bytes([value]), HEADER + number)

    def _descriptor(self, part: str, path: str) -> int:
        return self._files.get((part, path), lambda key: os.open(self._folder.joinpath(*key), os.O_RDWR))
