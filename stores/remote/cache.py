"""The folder of cached blocks: who may read and write when, and what goes when it is full.

    lock                              flock: shared while blocks are read or written, exclusive while they are dropped
    stores/<key>/files/...            the store's small files, whole; its shards, sparse
    stores/<key>/blocks/<shard>       128 bytes that say which object it is, then one byte a block: 1 = fetched

A block is written before its byte, both under the shared lock, so that a process that dies leaves no block that only
seems to be there; after a power loss one may, and the checksum of its rows finds it. Shards are emptied in place,
never replaced: a reader's open file stays the file. The time of the last use is the `blocks` file's modification time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from vla.stores.errors import MachineError
from vla.stores.filesystem import translate_lock_errors
from vla.stores.remote.options import RemoteOptions

HEADER = 128
CACHE_FIX = "export VLA_CACHE=DIR, a folder on a local disk"
ROOM = 0.9
"""Once full, emptied to nine tenths: not every fetch after that has to drop something."""


def emptied(blocks: Path, shard: Path) -> None:
    """Drop all blocks of a shard. The marks go first: a crash in between leaves bytes that nobody believes."""
    size, marks = shard.stat().st_size, blocks.stat().st_size - HEADER
    with blocks.open("r+b") as file:
        file.seek(HEADER)
        file.write(bytes(marks))
    os.truncate(shard, 0)
    os.truncate(shard, size)


class CacheFolder:
    """The lock and the size of one cache folder. One object a thread; several processes may share the folder."""

    def __init__(self, options: RemoteOptions) -> None:
        self.path, self._limit = options.folder, options.limit_bytes
        (self.path / "stores").mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Close the lock's file."""
        os.close(self._descriptor)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep every block that is there, for as long as this lasts: milliseconds."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only one to touch blocks."""
        with self._locked(fcntl.LOCK_EX):
            yield

    def make_room(self, needed: int, keep: Set[Path]) -> None:
        """Drop the least recently used shards until `needed` bytes fit. Those whose marks are in `keep` go last.

        Raises `MachineError` where `needed` alone is above the limit.
        """
        if needed > self._limit:
            raise MachineError(
                f"one batch needs {needed / 2**20:.1f} MiB of blocks in {self.path}",
                expected=f"at most {self._limit / 2**20:.1f} MiB",
                fix="--set data.remote.limit_gb=N, a larger N, or a smaller train.batch_size",
            )
        with self.exclusive():
            found = [entry for entry in self._shards() if entry[2]]
            total = sum(size for *_, size in found)
            if total + needed <= self._limit:
                return
            for blocks, shard, size in sorted(found, key=lambda entry: (entry[0] in keep, entry[0].stat().st_mtime_ns)):
                if total + needed <= (1.0 if blocks in keep else ROOM) * self._limit:
                    break
                emptied(blocks, shard)
                total -= size

    def used_bytes(self) -> int:
        """Bytes of feature blocks on disk, over all stores."""
        return sum(size for *_, size in self._shards())

    def _shards(self) -> list[tuple[Path, Path, int]]:
        """Return (marks, shard, bytes on disk) of every cached shard."""
        entries = []
        for store in (self.path / "stores").iterdir():
            for folder, _, names in os.walk(store / "blocks"):
                for name in names:
                    blocks = Path(folder) / name
                    shard = store / "files" / blocks.relative_to(store / "blocks")
                    entries.append((blocks, shard, shard.stat().st_blocks * 512))
        return entries

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        with translate_lock_errors(self.path, CACHE_FIX):
            fcntl.flock(self._descriptor, kind)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
