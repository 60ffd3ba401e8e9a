"""One form of a store into another, bit for bit: the same manifest but for the form, the same commits unit by unit.

Converting there and back gives the files that one began with. Rows are verified as they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla.stores.errors import CorruptionError
from vla.stores.formats.registry import format_of
from vla.stores.manifest import Compression, FormatName
from vla.stores.owned import refuse_overlap
from vla.stores.plain_zarr import write_plain
from vla.stores.remote.options import require_folder
from vla.stores.settings import Settings
from vla.stores.statistics import ChannelStatistics
from vla.stores.store import Store, open_store
from vla.stores.unit_buffer import UnitBuffer
from vla.stores.writer import open_writer

Progress = Callable[[int, int], None]


class ConvertOptions(Settings):
    """Into what: `format` "zarr", "h5" or "plain-zarr" (see plain_zarr.py), `compression` "none" or "zstd"."""

    format: Literal["zarr", "h5", "plain-zarr"]
    compression: Compression = "none"


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion wrote: units and committed rows of this run, bytes of all files in the result."""

    store: str
    out: str
    format: str
    compression: str
    units: int
    rows: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)


def convert_store(
    root: Path | str,
    out: Path | str,
    options: ConvertOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ConvertReport:
    """Write the complete store at `root`, a folder or a URL, in another form at `out`.

    Raises `UsageError` where `out` exists and neither flag is given, or lies in the store; `StoreError` where units
    are missing; `CorruptionError` where a row differs from its commit: what is damaged is not carried on.
    """
    out = Path(out)
    out = require_folder(out)
    store = open_store(root)
    refuse_overlap(out, [store.root])
    how: Any = {"resume": resume, "overwrite": overwrite, "progress": progress}
    if options.format == "plain-zarr":
        units = write_plain(store, out, options.compression, **how)
    else:
        units = _write_store(store, out, options.format, options.compression, **how)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = sum(len(run) for unit in units for run in store.present_runs(unit))
    return ConvertReport(str(root), str(out), options.format, options.compression, len(units), rows, size)


def _write_store(
    store: Store,
    out: Path,
    target: FormatName,
    compression: Compression,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
) -> list[int]:
    manifest = store.manifest.model_copy(update={"format": target, "compression": compression})
    readers = {name: store.reader(name, "always") for name in manifest.features}
    scales = {name: store.scales(name) for name in manifest.features}
    try:
        with open_writer(out, manifest, store.episodes, resume=resume, overwrite=overwrite) as writer:
            pending = writer.pending()
            for done, unit in enumerate(pending):
                buffer = writer.begin(unit)
                _fill_parts(store, buffer)
                of_unit = {name: values[unit] for name, values in scales.items() if values is not None}
                for rows in store.present_runs(unit):
                    features = {}
                    for name, reader in readers.items():
                        features[name] = np.empty((len(rows), *reader.info.shape), reader.info.stored)
                        reader.read(rows, features[name])
                    buffer.put_stored(int(rows[0]), features, of_unit)
                writer.commit(buffer)
                progress(done + 1, len(pending))
    finally:
        for reader in readers.values():
            reader.close()
    return pending


def _fill_parts(store: Store, buffer: UnitBuffer) -> None:
    """Take over all of a unit but its rows: steps, statistics, and which episodes were left out."""
    form, commit = format_of(store.manifest), store.commits[buffer.unit]
    for name, values in buffer.steps.items():
        values[: len(buffer.rows)] = form.read_part(store.root, store.manifest, commit, f"steps/{name}")
    for name in buffer.features:
        moments = form.read_part(store.root, store.manifest, commit, f"stats/{name}")
        buffer.statistics[name] = ChannelStatistics.from_array(moments)
    buffer.rounding |= commit.rounding
    for episode, reason in commit.skipped.items():
        if episode not in store.episodes.position:
            raise CorruptionError(f"unit {buffer.unit} of {store.root} leaves out {episode!r}, which is no episode")
        buffer.leave_out(episode, store.episodes.rows_in(store.episodes.position[episode], buffer.rows), reason)
