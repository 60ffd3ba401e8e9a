"""Planning a store before any pixel is decoded: rows, units, fingerprint, bytes, files."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
from pydantic import Field

from vla.featurize.augment import NO_COPIES, AugmentConfig, require_augmentable
from vla.featurize.backbones.base import BackboneSpec
from vla.featurize.sources.base import SourceIndex
from vla.stores.dtypes import INTEGERS, STORED, DtypeName, FloatName
from vla.stores.errors import UsageError
from vla.stores.formats.registry import unit_files
from vla.stores.manifest import SCHEMA_VERSION, Compression, FeatureInfo, FormatName, Manifest, StepInfo, copy_name
from vla.stores.settings import Settings
from vla.stores.tables import EpisodeTable

MIN_UNIT_ROWS, MAX_UNIT_ROWS = 16, 1024
"""A unit is the work a crash loses: at most 1024 frames, however small the features; at least 16 per file."""


class StoreOptions(Settings):
    """How the store is cut and kept. None of these but `dtype` changes a feature's value.

    `format`: "zarr" or "h5" (one HDF5 file a unit). `dtype`: float16, float32, bfloat16 or int8 (one scale a channel
    and unit), over the backbone's choice. `compression`: "zstd" makes an archive: some bytes less, read far slower.
    `unit_mb`: size aimed at for one unit over all features; larger units make fewer files, smaller ones lose less work
    in a crash. `unit_rows`: rows a unit, instead of `unit_mb`.
    """

    unit_mb: float = Field(64.0, gt=0, allow_inf_nan=False)
    unit_rows: int | None = Field(None, ge=1)
    dtype: FloatName | None = None
    format: FormatName = "zarr"
    compression: Compression = "none"


@dataclass(frozen=True)
class Plan:
    """What `featurize` is about to write. `bytes` and `files` count the whole store.

    `skipped`, `filtered`, `assumed` and `warnings` are the source's; see `SourceIndex`.
    """

    manifest: Manifest
    episodes: EpisodeTable
    skipped: dict[str, str]
    bytes: int
    files: int
    warnings: tuple[str, ...] = ()
    filtered: frozenset[str] = frozenset()
    assumed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the figures of `--dry-run`."""
        manifest = self.manifest
        return {
            "backbone": manifest.fingerprint["backbone"]["name"],
            "episodes": len(self.episodes),
            "frames": manifest.rows,
            "views": len(manifest.cameras),
            "features": {name: [*info.shape, info.dtype] for name, info in manifest.features.items()},
            "units": manifest.units,
            "unit_rows": manifest.unit_rows,
            "format": manifest.format,
            "bytes": self.bytes,
            "files": self.files,
            "skipped_episodes": self.skipped,
            "assumed": dict(self.assumed),
            "weights_licence": manifest.provenance["weights_licence"],
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }


def make_plan(
    index: SourceIndex,
    source_digest: str,
    spec: BackboneSpec,
    recipe: Mapping[str, Any],
    options: StoreOptions,
    augment: AugmentConfig = NO_COPIES,
) -> Plan:
    """Lay out the store that `spec` makes of a source.

    `recipe` is what rebuilds the backbone for a live policy, {"name", "weights", "options"}, and opens the
    demonstrations again, "source"; it goes to provenance.
    Raises `UsageError` where augmented copies are asked of a backbone that reads more than pictures.
    """
    views = len(index.cameras)
    if augment.copies:
        require_augmentable(spec)
    features = {
        copy_name(name, copy): FeatureInfo(
            shape=(views, *feature.shape), dims=("view", *feature.dims), dtype=_dtype(feature.dtype, options.dtype)
        )
        for name, feature in spec.features.items()
        for copy in range(augment.copies + 1)
    }
    steps = {
        name: StepInfo.build({"shape": step.shape, "dtype": step.dtype, "role": step.role, "names": step.names})
        for name, step in index.steps.items()
    }
    episodes = EpisodeTable.plan(
        [episode.id for episode in index.episodes],
        [episode.length for episode in index.episodes],
        [episode.task for episode in index.episodes],
        [episode.texts for episode in index.episodes],
    )
    row_bytes = sum(info.row_bytes for info in features.values())
    # What a unit takes in memory: int8 rows wait as float32 until their scales are known.
    held = sum(info.row_bytes * (4 if info.dtype == "int8" else 1) for info in features.values())
    unit_rows = options.unit_rows or int(np.clip(options.unit_mb * 2**20 // held, MIN_UNIT_ROWS, MAX_UNIT_ROWS))
    manifest = Manifest(
        rows=episodes.rows,
        unit_rows=min(unit_rows, episodes.rows),
        format=options.format,
        compression=options.compression,
        fps=index.fps,
        cameras=index.cameras,
        features=features,
        steps=steps,
        fingerprint={
            "schema_version": SCHEMA_VERSION,
            "backbone": {"name": spec.name, **spec.identity},
            "features": {name: info.model_dump(mode="json") for name, info in features.items()},
            "context": spec.context,
            "source": {
                "kind": index.kind,
                "digest": source_digest,
                "mapping": dict(index.mapping),
                "cameras": list(index.cameras),
            },
            **({"augment": augment.identity()} if augment.copies else {}),
        },
        tables={},
        provenance={
            "source": index.root,
            "source_licence": index.licence,
            "code_licence": spec.code_licence,
            "weights_licence": spec.weights_licence,
            "random_weights": spec.random_weights,
            "parameters": spec.parameters,
            "backbone": dict(recipe),
            "versions": {name: metadata.version(name) for name in ("vla-feature-cache", "torch", "zarr", "numpy")},
            "python": platform.python_version(),
            "skipped_episodes": dict(index.skipped),
            **({"assumed": dict(index.assumed)} if index.assumed else {}),
            # Not in the fingerprint: the source's digest decides it already, and older stores keep theirs.
            "picture_sizes": {name: list(index.sizes[name]) for name in index.cameras if name in index.sizes},
        },
    )
    size = (
        row_bytes + sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in steps.values()) + 24 * len(features)
    )
    files = manifest.units * (len(unit_files(manifest, 0)) + 1) + 20
    skipped, size = dict(index.skipped), size * episodes.rows
    return Plan(manifest, episodes, skipped, size, files, index.warnings, index.filtered, index.assumed)


def _dtype(name: str, wanted: FloatName | None) -> DtypeName:
    """What a backbone's dtype is kept as where the user wants another: masks and ids are never rounded."""
    if name not in STORED:
        raise UsageError(f"a feature of dtype {name!r}", expected=f"one of {', '.join(STORED)}")
    return name if name in INTEGERS else wanted or name
