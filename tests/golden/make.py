"""Make the golden stores and the golden head of this schema version: what later versions of `vla` have to open.

    python tests/golden/make.py [FOLDER]

writes FOLDER/schema-N (FOLDER: the one of this file) by the commands a user types, beside `expected.json` with the
digests and the actions read back right after writing. Run it once a schema version, in the release that introduces it:
what is there was written by the code of its day, and is never made again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla.cli import app
from vla.heads.checkpoint import load_head
from vla.heads.data import DataConfig, open_data
from vla.heads.evaluate import action_error
from vla.stores.errors import UsageError
from vla.stores.fingerprint import digest_array
from vla.stores.manifest import SCHEMA_VERSION
from vla.stores.store import Store, open_store

SOURCE = "synthetic:episodes=4,length=[4,7],cameras=2,image_size=16,seed=7"
BACKBONE = ("--backbone", "toy", "--source", SOURCE, "--set", "options.grid=2", "--set", "store.unit_rows=9")
STORES = {
    "zarr": (),
    "h5": ("--format", "h5"),
    "int8": ("--dtype", "int8"),
    "archive": ("--set", "store.compression=zstd"),
}
"""Name -> what is said beside `BACKBONE`: one store of each way of writing."""

SMALL = {
    "model.hidden": 16,
    "model.layers": 1,
    "model.horizon": 4,
    "model.encoder.dim": 16,
    "model.encoder.components": 8,
    "train.batch_size": 8,
    "train.device": "cpu",
    "data.validation": 0,
}
"""A head of some thousand weights."""

HEAD_STEPS = 60


def digests_of(store: Store) -> dict[str, str]:
    """Return the SHA-256 of every array that can be read from a store, as it is stored."""
    rows = np.arange(store.manifest.rows)
    found = {name: digest_array(values) for name, values in store.episodes.to_arrays().items()}
    for name in store.manifest.features:
        found[f"frames/{name}"] = digest_array(store.read(name, rows))
        found[f"stats/{name}"] = digest_array(store.statistics(name).to_array())
        scales = store.scales(name)
        if scales is not None:
            found[f"scales/{name}"] = digest_array(scales)
    return found | {f"steps/{name}": digest_array(store.steps(name)) for name in store.manifest.steps}


def predictions_of(head: Path, store: Path) -> np.ndarray[Any, Any]:
    """Return the first action that a head predicts for every row of a store, float32 [rows, A], in the data's units."""
    trained = load_head(head)
    data = open_data(DataConfig(stores=(str(store),), validation=0))
    everything = np.arange(len(data.stores.first.episodes))
    return action_error(trained.model, data, everything, device=next(trained.model.parameters()).device).predicted


def make(folder: Path, run: Callable[[list[str]], object]) -> Path:
    """Make `folder/schema-N`, each command by `run`. Raises `UsageError` where it is there."""
    golden = folder / f"schema-{SCHEMA_VERSION}"
    if golden.exists():
        raise UsageError(f"{golden} exists", expected="a new SCHEMA_VERSION; golden files are never made again")
    partial = golden.with_name(golden.name + ".partial")
    partial.mkdir(parents=True)
    with_small = [text for key, value in SMALL.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    before = Path.cwd()
    os.chdir(partial)  # what is written names its inputs by relative paths: nothing of this machine goes into git
    try:
        for name, options in STORES.items():
            run(["featurize", *BACKBONE, *options, "--out", ".", "--name", name])
        run(["train-head", "mlp", "--store", "zarr", "--out", "run", "--steps", str(HEAD_STEPS), *with_small])
        next(Path("run/checkpoints").iterdir()).rename("head")
        shutil.rmtree("run")
        expected = {
            "stores": {name: digests_of(open_store(name)) for name in STORES},
            "predicted": predictions_of(Path("head"), Path("zarr")).tolist(),
        }
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    finally:
        os.chdir(before)
    partial.rename(golden)
    return golden


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    try:
        make(folder, lambda arguments: app(arguments, standalone_mode=False))
    except UsageError as error:
        sys.exit(str(error))
