"""Reading a remote store back from the bucket, past the cache: is each object what was committed?"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vla.stores.commits import FileRecord, record_unit
from vla.stores.errors import CorruptionError, VlaError
from vla.stores.formats.registry import format_of, unit_files
from vla.stores.remote.blocks import LONGEST_GET
from vla.stores.remote.bucket import Bucket, ObjectInfo
from vla.stores.remote.mirror import INDEX, mirror_metadata, require_store, require_supported
from vla.stores.remote.naming import named
from vla.stores.remote.options import RemoteOptions
from vla.stores.store import Store, open_damaged
from vla.stores.verify import VerifyReport, ranges


def verify_remote(url: str, options: RemoteOptions, progress: Callable[[int, int], None]) -> VerifyReport:
    """Compare every committed object with the size and the SHA-256 in its record; see `verify_store`.

    Nothing is kept on disk but the metadata, for as long as this takes. The digests cover every byte of every row.
    """
    bucket = Bucket(url, options)
    objects = bucket.objects()
    require_store(bucket, objects)
    try:
        store, lying = open_listed(bucket, objects)
    except CorruptionError as error:
        return VerifyReport(bucket.url, findings=[str(error)])
    return verify_listed(bucket, objects, store, lying, progress)


def open_listed(bucket: Bucket, objects: Mapping[str, ObjectInfo]) -> tuple[Store, dict[Path, CorruptionError]]:
    """Like `open_damaged`, of what `Bucket.objects` returned; the store's folder is gone again: only metadata count."""
    with tempfile.TemporaryDirectory(prefix="vla-verify-") as folder:
        files = Path(folder) / "store"
        with named(bucket.url, files):
            mirror_metadata(bucket, objects, files, Path(folder) / INDEX)
            store, lying = open_damaged(files)
            require_supported(store.manifest, bucket.url)
            lies = {path: CorruptionError(str(lie).replace(str(files), bucket.url)) for path, lie in lying.items()}
    return store, lies


def verify_listed(
    bucket: Bucket,
    objects: Mapping[str, ObjectInfo],
    store: Store,
    lying: Mapping[Path, CorruptionError],
    progress: Callable[[int, int], None],
) -> VerifyReport:
    """Like `verify_remote`, of what `open_listed` returned."""
    report = VerifyReport(bucket.url)
    report.units, report.committed = store.manifest.units, len(store.commits)
    for file, lie in lying.items():
        report.add(record_unit(file), str(lie))
    there = {*store.commits, *report.damaged}
    report.missing = [unit for unit in range(report.units) if unit not in there]
    if report.missing:
        line = f"units {ranges(report.missing)} of {bucket.url} are not committed (vla featurize … --resume)"
        report.findings.append(line)
    with ThreadPoolExecutor(bucket.options.threads, thread_name_prefix="vla-fetch") as threads:
        for done, (unit, commit) in enumerate(sorted(store.commits.items())):
            records = sorted(commit.files.items())
            problems = threads.map(lambda item: _compare(bucket, item[0], item[1], objects.get(item[0])), records)
            for (path, record), (problem, cause) in zip(records, problems, strict=True):
                if problem:
                    array = "/".join(path.split("/")[:2])
                    report.add(unit, f"array {array}, unit {unit}: {bucket.url}/{path} {problem}", cause)
                else:
                    report.files += 1
                    report.bytes += record.size
            progress(done + 1, len(store.commits))
    owners = {*store.commits, *(unit for unit in report.damaged if unit < report.units)}
    known = {path for unit in owners for path in unit_files(store.manifest, unit)}
    folders = tuple(f"{folder}/" for folder in format_of(store.manifest).folders)
    for path in sorted(path for path in objects if path.startswith(folders) and path not in known):
        if not path.endswith("zarr.json"):
            report.debris.append(path)
            report.findings.append(
                f"{bucket.url}/{path} belongs to no committed unit (harmless; vla verify --repair removes it)"
            )
    return report


def _compare(bucket: Bucket, path: str, record: FileRecord, info: ObjectInfo | None) -> tuple[str, VlaError | None]:
    """Say what is wrong with an object, and the error if reading failed; nothing where it is as committed."""
    if info is None:
        return "is missing", None
    if info.size != record.size:
        return f"has {info.size} bytes, not {record.size}", None
    try:
        # Twice before it is called damaged: it may have been the way.
        sound = any(_digest(bucket, path, info) == record.sha256 for _ in range(2))
    except VlaError as error:
        return f"cannot be read ({error.found})", error
    return ("" if sound else "differs from its commit"), None


def _digest(bucket: Bucket, path: str, info: ObjectInfo) -> str:
    digest = hashlib.sha256()
    for start in range(0, info.size, LONGEST_GET):
        digest.update(bucket.get(path, span=(start, min(start + LONGEST_GET, info.size)), etag=info.etag))
    return digest.hexdigest()
