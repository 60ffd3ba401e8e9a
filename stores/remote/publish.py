"""Writing a store to an object store: the local writer in a staging folder, and each unit uploaded as it is committed.

The order is the local one. A new store: every object of its metadata, the root's `zarr.json` last. A unit: its files,
then its commit record, created and never replaced. A writer that dies leaves units that are committed whole, and
objects that no record names, which the next writer makes again, byte for byte.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vla.stores.commits import Commit
from vla.stores.errors import StoreError, UsageError
from vla.stores.filesystem import explaining, writer_lock
from vla.stores.layout import CLAIMS, COMMITS, LOCK, commit_file
from vla.stores.manifest import Manifest
from vla.stores.metadata import read_manifest
from vla.stores.owned import STORE
from vla.stores.remote.bucket import Bucket, ObjectInfo, TakenError
from vla.stores.remote.lease import LEASE, Lease, writer_lease
from vla.stores.remote.mirror import INDEX, ROOT, mirror_metadata, require_store, require_supported
from vla.stores.remote.naming import named
from vla.stores.remote.options import RemoteOptions
from vla.stores.tables import EpisodeTable
from vla.stores.unit_buffer import UnitBuffer
from vla.stores.writer import StoreWriter, open_writer


class RemoteWriter(StoreWriter):
    """A `StoreWriter` whose units count once they are in the bucket. Use `open_remote_writer`."""

    def __init__(self, root: Path, manifest: Manifest, bucket: Bucket, lease: Lease) -> None:
        super().__init__(root, manifest)
        self._bucket, self._lease = bucket, lease

    def commit(self, buffer: UnitBuffer) -> Commit:
        """Write a filled unit, upload it, and drop the local files. Raises `MachineError` where it does not get up."""
        commit = super().commit(buffer)
        self._lease.require()
        upload(self._bucket, self.root, list(commit.files))
        self._lease.require()
        record = commit_file(commit.unit)
        try:
            self._bucket.create(record, (self.root / record).read_bytes())
        except TakenError as error:
            raise StoreError(f"{error.found} and differs", expected="one writer a store") from None
        for path in commit.files:
            (self.root / path).unlink()
        return commit


@contextmanager
def open_remote_writer(
    url: str,
    manifest: Manifest,
    episodes: EpisodeTable,
    options: RemoteOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[StoreWriter]:
    """Create the store at `url`, or go on with it, and hold the claim to write it.

    Raises what `open_writer` raises, and `MachineError` where the bucket is out of reach.
    """
    require_supported(manifest, url)
    bucket = Bucket(url, options)
    _require_usable(bucket, bucket.objects(), resume=resume, overwrite=overwrite)
    staging = options.folder / "staging" / hashlib.sha256(bucket.url.encode()).hexdigest()[:32]
    root = staging / "store"
    with explaining(staging):
        (staging / COMMITS).mkdir(parents=True, exist_ok=True)
    with named(bucket.url, root), named(bucket.url, staging), writer_lock(staging), writer_lease(bucket) as lease:
        objects = bucket.objects()
        _require_usable(bucket, objects, resume=resume, overwrite=overwrite)  # nobody else changes it from here on
        with explaining(staging):
            shutil.rmtree(root, ignore_errors=True)
            (staging / INDEX).unlink(missing_ok=True)
            if ROOT in objects:
                require_store(bucket, objects)
                mirror_metadata(bucket, objects, root, staging / INDEX)
            if ROOT in objects and overwrite:
                read_manifest(root)
                shutil.rmtree(root)
                _remove(bucket, objects)
        new = not root.exists()
        try:
            with open_writer(root, manifest, episodes, resume=not new) as local:
                if new:
                    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
                    upload(bucket, root, [path for path in files if path not in (ROOT, LOCK, CLAIMS)])
                    lease.require()
                    bucket.create(ROOT, (root / ROOT).read_bytes())
                yield RemoteWriter(local.root, local.manifest, bucket, lease)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def upload(bucket: Bucket, root: Path, paths: list[str]) -> None:
    """Upload files of the folder `root`, several at a time, large ones in parts."""
    with ThreadPoolExecutor(bucket.options.threads, thread_name_prefix="vla-upload") as threads:
        for _ in threads.map(lambda path: bucket.put(path, root / path), paths):
            pass


def _require_usable(bucket: Bucket, objects: Mapping[str, ObjectInfo], *, resume: bool, overwrite: bool) -> None:
    if ROOT in objects and not (resume or overwrite):
        fix = "--resume to go on with it, --overwrite to replace it, or another --out"
        raise UsageError(f"{bucket.url} exists", fix=fix)
    foreign = sorted(path for path in objects if not STORE.has_file(path))
    if ROOT in objects:
        if foreign and overwrite and not resume:
            found = f"--overwrite of {bucket.url} would delete {', '.join(foreign[:3])}"
            raise UsageError(found, expected="nothing but a store", fix="move that away first, or another --out")
        return
    # Without a root `zarr.json`, a store whose writing or deletion was cut short may be here, and nothing else.
    if foreign:
        found = f"{bucket.url} {'holds' if ROOT in objects else 'is no store and holds'} {foreign[0]}"
        raise StoreError(found, expected="objects of a store alone", fix="another --out or --name")


def _remove(bucket: Bucket, objects: Mapping[str, ObjectInfo]) -> None:
    """Delete a store: the commits first, so that no unit ever lacks a file; then what makes it a store; the rest."""
    owned = [path for path in objects if STORE.has_file(path) and path not in (ROOT, LEASE, LOCK)]
    commits = [path for path in owned if path.startswith(f"{COMMITS}/")]
    rest = [path for path in owned if not path.startswith(f"{COMMITS}/")]
    bucket.delete(commits)
    bucket.delete([ROOT])
    bucket.delete(rest)
