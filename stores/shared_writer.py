"""Several processes filling one store: each claims a unit, computes it, commits it, and nobody else does.

Sharers hold the writer lock together (any other writer waits outside) and claim units by byte-range locks on one more
file, byte u for unit u: the kernel takes them back from a process that dies, on one machine and over NFS alike, and
what it had in hand is free for others. A claim lasts from before the first byte of a unit is computed until its commit
record is durable, so no file of a unit ever has two writers, whichever programs they run in.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vla.stores.commits import Commit, read_commit
from vla.stores.errors import StoreError
from vla.stores.filesystem import explaining, translate_lock_errors, writer_lock
from vla.stores.layout import CLAIMS
from vla.stores.manifest import Manifest
from vla.stores.owned import STORE, sweep
from vla.stores.remote.options import require_folder
from vla.stores.tables import EpisodeTable
from vla.stores.unit_buffer import UnitBuffer
from vla.stores.writer import StoreWriter, begin_store, require_store, with_tables

PATIENCE = 10.0
"""Seconds to wait for another process that is making the store just now, or sweeping it: both are quick."""


class SharedWriter(StoreWriter):
    """One of several writers of a store, one a process. Use `open_shared_writer`. Safe to use from several threads."""

    def __init__(self, root: Path, manifest: Manifest, claims: int) -> None:
        super().__init__(root, manifest)
        self._claims, self._claimed, self._threads = claims, set[int](), threading.Lock()
        self._sha256 = manifest.sha256()
        self.made: set[int] = set()
        """Units that this writer committed."""

    def claim(self, unit: int) -> bool:
        """Take a unit, unless it is committed or somebody else's."""
        with self._threads, explaining(self.root / CLAIMS):
            if unit in self._claimed or self.committed(unit):
                return False
            try:
                with translate_lock_errors(self.root / CLAIMS):
                    fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
            except (BlockingIOError, PermissionError):  # EACCES and EAGAIN both say "held" (fcntl(2))
                return False
            if self.committed(unit):  # between looking and claiming
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, unit)
                return False
            self._claimed.add(unit)
            return True

    def release(self, unit: int | None = None) -> None:
        """Give a unit back, committed or not; None: all that are claimed here."""
        with self._threads:
            for one in (self._claimed if unit is None else self._claimed & {unit}).copy():
                self._claimed.remove(one)
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, one)

    def committed(self, unit: int) -> bool:
        """Return whether a unit is committed by now, by whomever."""
        if unit not in self.commits:
            commit = read_commit(self.root, self.manifest, unit, self._sha256)
            if commit is not None:
                self.commits[unit] = commit
        return unit in self.commits

    def pending(self) -> list[int]:
        """Units that nobody has committed by now."""
        return [unit for unit in range(self.manifest.units) if not self.committed(unit)]

    def in_place(self) -> bool:
        """Return whether the store at `root` is the one that was joined, neither deleted nor replaced since."""
        try:  # by the file held open: the number of one that is deleted goes to another soon
            return os.path.samestat(os.fstat(self._claims), (self.root / CLAIMS).stat())
        except FileNotFoundError:
            return False

    def begin(self, unit: int) -> UnitBuffer:
        """See `StoreWriter.begin`. Raises `StoreError` for a unit that was not claimed."""
        self._require_claimed(unit)
        return super().begin(unit)

    def commit(self, buffer: UnitBuffer) -> Commit:
        """See `StoreWriter.commit`. Raises `StoreError` for a unit that was not claimed."""
        self._require_claimed(buffer.unit)
        commit = super().commit(buffer)
        self.made.add(buffer.unit)
        self.release(buffer.unit)
        return commit

    def _require_claimed(self, unit: int) -> None:
        if unit not in self._claimed:
            raise StoreError(f"unit {unit} of {self.root} was not claimed", expected="claim(unit) first")


@contextmanager
def open_shared_writer(
    root: Path | str, manifest: Manifest, episodes: EpisodeTable, *, resume: bool = True, overwrite: bool = False
) -> Iterator[SharedWriter]:
    """Join the writers of the store at `root`; make it where it is not there.

    Raises `UsageError` where there is one and neither flag is given, `FingerprintError` where it was
    made with other settings, `StoreError` where a writer that does not share holds it, `MachineError` where the file
    system knows no locks.
    """
    root = Path(root)
    with explaining(require_folder(root)):
        root = root.resolve()
        manifest = with_tables(manifest, episodes)
        if overwrite or not resume:
            begin_store(root, manifest, episodes, resume=resume, overwrite=overwrite)
        _join(root, manifest, episodes)
        try:
            with writer_lock(root):  # nobody else is at work: what is unfinished will stay so
                sweep(root, STORE)
        except StoreError:
            pass
    with _shared_lock(root), explaining(root):
        found = require_store(root, manifest)
        claims = os.open(root / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            yield SharedWriter(root, found, claims)
        finally:
            os.close(claims)


@contextmanager
def _shared_lock(root: Path) -> Iterator[None]:
    """Hold a sharer's place; wait for one who sweeps. Raises `StoreError` where a writer that does not share stays."""
    deadline = time.monotonic() + PATIENCE
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(writer_lock(root, shared=True))
                break
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def _join(root: Path, manifest: Manifest, episodes: EpisodeTable) -> None:
    """Make the store, or wait for the process that is making it."""
    deadline = time.monotonic() + PATIENCE
    while not root.exists():
        try:
            begin_store(root, manifest, episodes, resume=True)  # it may be there by now
        except StoreError:
            if time.monotonic() > deadline and not root.exists():
                raise
            time.sleep(0.05)
