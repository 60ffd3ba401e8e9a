"""One writer a remote store, as far as an object store can hold that.

There is no lock in an object store that is gone with its holder. Instead an object, `commits/writer.lease`, names the
writer and when its claim ends; the writer renews it while it lives, and looks at it before each commit. A claim that
has ended, or whose process on this machine is dead, may be taken over. Clocks that differ by more than the lease, or
a server without conditional puts, let two writers in; even then neither replaces a commit record of the other, because
records are only ever created, and units of equal fingerprints are equal.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vla.stores.documents import parse_json
from vla.stores.errors import StoreError, VlaError
from vla.stores.layout import COMMITS
from vla.stores.remote.bucket import Bucket, ReplacedError, TakenError

LEASE = f"{COMMITS}/writer.lease"
RENEWALS = 3
"""Renewed this often in its lifetime: one or two lost requests do not end it."""


class Lease:
    """The claim of this process. Use `writer_lease`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._seconds = bucket, bucket.options.lease_s
        self._id, self._tag, self._until = uuid.uuid4().hex, "", 0.0
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="vla-lease", daemon=True)

    def acquire(self) -> None:
        """Claim the store. Raises `StoreError` where another writer has it."""
        until = time.time() + self._seconds
        try:
            self._tag = self._bucket.create(LEASE, self._text(until))
        except TakenError:
            tag = self._bucket.head(LEASE).etag
            other = _parse(self._bucket.get(LEASE))
            left = float(other.get("until", 0.0)) - time.time()
            if left > 0 and not _is_dead(other):
                where = f"{self._bucket.url} is being written by {other.get('host')}, process {other.get('pid')}"
                raise StoreError(
                    f"{where}, whose claim ends in {left:.0f} s unless renewed", expected="one writer a store"
                ) from None
            try:
                self._tag = self._bucket.replace(LEASE, self._text(until), tag)
            except ReplacedError:
                what = f"{self._bucket.url} was claimed by another writer just now"
                raise StoreError(what, expected="one writer a store") from None
        self._until = until
        self._thread.start()

    def require(self) -> None:
        """Raise `StoreError` where the claim has been lost."""
        if not self._lost and time.time() > self._until:
            self._lost = "could not be renewed in time"
        if self._lost:
            found = f"the claim to write {self._bucket.url} {self._lost}"
            raise StoreError(found, expected="one writer a store", fix="--resume, when no other writer runs")

    def release(self) -> None:
        """Give the claim up, where it is still this one."""
        self._stop.set()
        self._thread.join()
        if not self._lost and _parse(self._bucket.get(LEASE)).get("id") == self._id:
            self._bucket.delete([LEASE])

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / RENEWALS):
            until = time.time() + self._seconds
            try:
                self._tag = self._bucket.replace(LEASE, self._text(until), self._tag)
            except ReplacedError:
                self._check_replaced(until)
            except VlaError:  # out of reach: the next renewal may get through; `require` sees where none did
                continue
            if self._lost:
                return
            self._until = until

    def _check_replaced(self, until: float) -> None:
        """Tell a renewal whose answer got lost from a claim by another writer."""
        try:
            tag = self._bucket.head(LEASE).etag
            mine = self._bucket.get(LEASE, etag=tag) == self._text(until)
        except VlaError:
            mine = False
        if mine:
            self._tag = tag
        else:
            self._lost = "was taken over by another writer"

    def _text(self, until: float) -> bytes:
        return json.dumps({"id": self._id, **_process(os.getpid()), "until": until}).encode()


@contextmanager
def writer_lease(bucket: Bucket) -> Iterator[Lease]:
    """Hold the claim to write the store below a URL. Raises `StoreError` where another writer holds it."""
    lease = Lease(bucket)
    lease.acquire()
    try:
        yield lease
    except BaseException:
        with suppress(VlaError):  # the first error is the one to tell; the claim ends by itself
            lease.release()
        raise
    lease.release()


def _process(pid: int) -> dict[str, Any]:
    """Say which process, so that the same machine (and container) can tell whether it lives; see proc(5)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    where = f"{boot.read_text().strip() if boot.is_file() else ''} {space.readlink() if space.is_symlink() else ''}"
    return {"host": socket.gethostname(), "machine": where, "pid": pid}


def _is_dead(other: dict[str, Any]) -> bool:
    pid = other.get("pid")
    if not isinstance(pid, int) or _process(pid) != {key: other.get(key) for key in ("host", "machine", "pid")}:
        return False
    return Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
