"""Opening a remote store: its small files come whole into the cache, its shards as sparse files without content.

Small are the metadata, the tables, the commit records, and what a unit has besides its shards (checksums, statistics,
steps). Metadata are taken again where the bucket lists another entity tag; the rest is compared with the digest in
its commit record every time a store is opened, so that a damaged cache mends itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vla.stores.commits import FileRecord
from vla.stores.documents import parse_json
from vla.stores.errors import CorruptionError, StoreError
from vla.stores.filesystem import explaining, translate_lock_errors
from vla.stores.formats.registry import format_of
from vla.stores.layout import COMMITS, METADATA, is_metadata
from vla.stores.manifest import Manifest
from vla.stores.metadata import MAX_METADATA_BYTES
from vla.stores.remote.blocks import Shard, prepare
from vla.stores.remote.bucket import Bucket, ObjectInfo
from vla.stores.remote.cache import CACHE_FIX, CacheFolder
from vla.stores.remote.naming import named
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.reader import readers_of
from vla.stores.store import Store, open_store

ROOT = METADATA
INDEX = "index.json"


def open_remote(url: str, options: RemoteOptions, *, allow_partial: bool = False) -> Store:
    """Open the store at `url`; raises what `open_store` raises, and `MachineError` where the bucket is out of reach."""
    bucket = Bucket(url, options)
    objects = bucket.objects()
    require_store(bucket, objects)
    with explaining(options.folder):
        folder = _folder(options.folder, bucket.url, bucket.get(ROOT, etag=objects[ROOT].etag))
        files = folder / "files"
        with _opening(folder), named(bucket.url, files):
            mirror_metadata(bucket, objects, files, folder / INDEX)
            try:
                store = open_store(files, allow_partial=allow_partial)
            except CorruptionError:  # of the bucket, or of this cache: only fresh files can tell
                (folder / INDEX).unlink(missing_ok=True)
                mirror_metadata(bucket, objects, files, folder / INDEX)
                store = open_store(files, allow_partial=allow_partial)
            require_supported(store.manifest, bucket.url)
            shards = _mirror_units(bucket, objects, store, folder)
    return replace(store, url=bucket.url, remote_reader=readers_of(bucket, folder, shards))


def require_store(bucket: Bucket, objects: Mapping[str, ObjectInfo]) -> None:
    """Raise `StoreError` where what is listed below the URL is no store, saying what is there.

    Raises `CorruptionError` for JSON larger than any of ours: objects are fetched whole into memory.
    """
    if ROOT not in objects:
        listing = ", ".join(sorted({path.partition("/")[0] for path in objects})[:4]) or "nothing"
        raise StoreError(f"{bucket.url} is no store (holds {listing})", expected="zarr.json", fix="the store's own URL")
    for path, info in objects.items():
        if is_metadata(path) and path.endswith(".json") and info.size > MAX_METADATA_BYTES:
            found = f"{bucket.url}/{path} has {info.size} bytes"
            raise CorruptionError(found, expected=f"metadata of at most {MAX_METADATA_BYTES} bytes")


def require_supported(manifest: Manifest, url: str) -> None:
    """Raise `StoreError` for the h5 form: what a reader needs first lies all over its files, so blocks save nothing."""
    if manifest.format != "zarr":
        found = f"{url} is of the form {manifest.format}"
        fix = "make it with --format zarr, or `vla convert STORE OUT --format zarr` on a disk and upload OUT"
        raise StoreError(found, expected="the form zarr on an object store", fix=fix)


def mirror_metadata(bucket: Bucket, objects: Mapping[str, ObjectInfo], files: Path, index: Path) -> None:
    """Bring metadata, tables and commit records into the folder `files`; drop records that the bucket has no longer.

    `index` remembers the tags of what is there.
    """
    wanted = {path: info for path, info in objects.items() if is_metadata(path)}
    known = _read_index(index)
    stale = [path for path, info in wanted.items() if known.get(path) != info.etag or not (files / path).is_file()]
    (files / COMMITS).mkdir(parents=True, exist_ok=True)
    for record in files.glob(f"{COMMITS}/*.json"):
        if record.relative_to(files).as_posix() not in wanted:
            record.unlink()
    for path, data in fetch_all(bucket, {path: wanted[path].etag for path in stale}):
        _write(files / path, data)
    _write(index, json.dumps({path: info.etag for path, info in wanted.items()}).encode())


def _mirror_units(bucket: Bucket, objects: Mapping[str, ObjectInfo], store: Store, folder: Path) -> dict[str, Shard]:
    """Bring the small files of every commit; make the sparse shards. Return the shards by path."""
    shards, missing, form = {}, {}, format_of(store.manifest)
    for commit in store.commits.values():
        rows = {form.feature_file(store.manifest, name, commit.unit) for name in store.manifest.features}
        for path, record in commit.files.items():
            info = objects.get(path)
            if info is None or info.size != record.size:
                what = "is missing" if info is None else f"has {info.size} bytes, not {record.size}"
                array = "/".join(path.split("/")[:2])
                where = f"array {array}, unit {commit.unit}: {bucket.url}/{path}"
                raise CorruptionError(f"{where} {what}", fix=f"vla verify {bucket.url}")
            if path in rows:
                shards[path] = Shard(path, info, record.sha256, bucket.options.block_bytes)
            elif not _matches(store.root / path, record):
                missing[path] = record
    for path, data in fetch_all(bucket, {path: objects[path].etag for path in missing}):
        if hashlib.sha256(data).hexdigest() != missing[path].sha256:
            data = bucket.get(path, etag=objects[path].etag)  # once more: it may have been the way, not the object
        if hashlib.sha256(data).hexdigest() != missing[path].sha256:
            raise CorruptionError(f"{bucket.url}/{path} differs from its commit", fix=f"vla verify {bucket.url}")
        _write(store.root / path, data)
    cache = CacheFolder(bucket.options)
    try:
        with cache.exclusive():
            for shard in shards.values():
                prepare(folder, shard)
    finally:
        cache.close()
    return shards


def fetch_all(bucket: Bucket, etags: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of small objects `{path: tag}`, several on their way at a time."""
    with ThreadPoolExecutor(bucket.options.threads, thread_name_prefix="vla-fetch") as threads:
        paths = list(etags)
        yield from zip(paths, threads.map(lambda path: bucket.get(path, etag=etags[path]), paths), strict=True)


def _matches(file: Path, record: FileRecord) -> bool:
    if not file.is_file() or file.stat().st_size != record.size:
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256


def _folder(cache: Path, url: str, manifest: bytes) -> Path:
    """Return the folder of one store: another manifest, or another server, is another store."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    key = hashlib.sha256(f"{endpoint} {url} ".encode() + manifest).hexdigest()[:32]
    folder = cache / "stores" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """One process at a time brings a store's small files; the next finds them there."""
    with (folder / "opening.lock").open("wb") as file:
        with translate_lock_errors(folder, CACHE_FIX):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_index(index: Path) -> dict[str, Any]:
    try:
        known = parse_json(index.read_bytes())
    except (FileNotFoundError, ValueError):  # none yet, or cut short: everything is fetched
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, data: bytes) -> None:
    """Write a file of the cache whole. Not fsynced: what a power loss damages is found and fetched again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
