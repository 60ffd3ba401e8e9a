"""What a store holds, said in a few facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vla.stores.store import open_store


def describe(root: Path | str) -> dict[str, Any]:
    """Return JSON-able facts of the store at `root`, complete or not. Raises `StoreError` where there is none."""
    store = open_store(root, allow_partial=True)
    manifest = store.manifest
    rows = store.episodes.length[store.usable]
    sizes = sum(file.size for commit in store.commits.values() for file in commit.files.values())
    return {
        "store": str(root),
        "complete": store.complete,
        "format": manifest.format,
        "units": f"{len(store.commits)} of {manifest.units}, {manifest.unit_rows} frames each",
        "episodes": f"{int(store.usable.sum())} usable of {len(store.episodes)}",
        "frames": int(rows.sum()),
        "fps": manifest.fps,
        "cameras": list(manifest.cameras),
        "picture_sizes": {camera: f"{w} x {h}" for camera, (h, w) in manifest.picture_sizes.items()} or "not known",
        "tasks": list(store.episodes.tasks),
        "features": {
            name: {"shape": list(info.shape), "dims": list(info.dims), "dtype": info.dtype, "bytes": info.row_bytes}
            for name, info in manifest.plain.items()
        },
        "augment": manifest.augment or None,
        "steps": {name: {"shape": list(step.shape), "role": step.role} for name, step in manifest.steps.items()},
        "bytes": sizes,
        "backbone": manifest.fingerprint.get("backbone"),
        "source": manifest.provenance.get("source"),
        "source_licence": manifest.provenance.get("source_licence"),
        "code_licence": manifest.provenance.get("code_licence"),
        "weights_licence": manifest.provenance.get("weights_licence"),
        "random_weights": manifest.random_weights,
        "skipped_episodes": store.skipped_episodes,
        "manifest_sha256": manifest.sha256(),
    }
