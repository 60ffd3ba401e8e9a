"""What a store holds, said in a few facts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vla.stores.instructions import same_instructions
from vla.stores.notes import store_notes
from vla.stores.store import Store, open_store


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
        "spellings_of_one_task": same_instructions(store.episodes.tasks) or None,
        "features": {
            name: {
                "shape": list(info.shape),
                "dims": list(info.dims),
                "dtype": info.dtype,
                "bytes": info.row_bytes,
                **_rounding(store, name),
            }
            for name, info in manifest.plain.items()
        },
        "augment": manifest.augment or None,
        "steps": {name: {"shape": list(step.shape), "role": step.role} for name, step in manifest.steps.items()},
        "notes": store_notes(store) or None,
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


def rounding_of(root: Path | str) -> dict[str, Any]:
    """Return `{feature: the fields of `Rounding`}` of the int8 features that the store at `root` holds so far."""
    store = open_store(root, allow_partial=True)
    found = {name: store.rounding(name) for name in store.manifest.plain}
    return {name: asdict(cost) for name, cost in found.items() if cost is not None}


def _rounding(store: Store, feature: str) -> dict[str, Any]:
    """Return what int8 cost a feature: {"rounding": the fields of `Rounding`}; {} for other dtypes.

    Of stores written before that was recorded the error is an estimate from grid and statistics, and the others None.
    """
    if store.feature_info(feature).dtype != "int8":
        return {}
    found = store.rounding(feature)
    if found is not None:
        return {"rounding": asdict(found)}
    scales, statistics = store.scales(feature), store.statistics(feature)
    assert scales is not None
    # Rounding to a grid of step s costs s^2 / 12 on average.
    lost = float((scales[sorted(store.commits)].astype(np.float64) ** 2).mean() / 12) if store.commits else 0.0
    power = float((statistics.mean**2 + statistics.std**2).mean())
    return {
        "rounding": {
            "error": (lost / power) ** 0.5 if power else 0.0,
            "saturated": None,
            "erased": None,
            "estimated": True,
        }
    }
