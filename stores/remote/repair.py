"""Dropping what is damaged from a remote store, so that `--resume` uploads just that again."""

from __future__ import annotations

from collections.abc import Callable

from vla.stores.errors import CorruptionError
from vla.stores.formats.registry import unit_files
from vla.stores.layout import commit_file
from vla.stores.remote.bucket import Bucket
from vla.stores.remote.lease import writer_lease
from vla.stores.remote.mirror import require_store
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.verify import open_listed, verify_listed
from vla.stores.repair import RepairReport, nothing_dropped, unreadable


def repair_remote(url: str, options: RemoteOptions, progress: Callable[[int, int], None]) -> RepairReport:
    """Verify the store at `url` and drop every damaged unit and all debris; see `repair_store`. Holds the lease."""
    bucket = Bucket(url, options)
    require_store(bucket, bucket.objects())  # before the lease: what is no store gets none
    with writer_lease(bucket) as lease:
        objects = bucket.objects()
        try:
            store, lying = open_listed(bucket, objects)
        except CorruptionError as error:
            raise nothing_dropped(error) from None
        report = verify_listed(bucket, objects, store, lying, progress)
        if report.unreadable:
            raise unreadable(report)
        lease.require()
        # The records first: a unit whose files are going is no longer committed.
        bucket.delete([path for unit in report.damaged if (path := commit_file(unit)) in objects])
        planned = [path for unit in report.damaged if unit < report.units for path in unit_files(store.manifest, unit)]
        removed = sorted({path for path in (*planned, *report.debris) if path in objects})
        bucket.delete(removed)
    pending = sorted({*report.missing, *(unit for unit in report.damaged if unit < report.units)})
    return RepairReport(bucket.url, sorted(report.damaged), removed, pending, report)
