"""The shipped demonstrations as the stores that the benchmarks share; made once, kept in `demo/benchmarks/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.plan import StoreOptions
from vla.stores.errors import StoreError
from vla.stores.store import open_store

ROOT = Path(__file__).parents[1]
PUSH = ROOT / "examples" / "push"
KEPT = ROOT / "demo" / "benchmarks"


def store_of(backbone: str, name: str | None = None, dtype: str | None = None, **options: Any) -> Path:
    """Return the store of examples/push made with a backbone; make it, or the rest of it, where it is not complete.

    `dtype` is what it keeps (None: the backbone's choice); `name` the folder's, where not the backbone's.
    """
    root = KEPT / (name or backbone)
    try:
        open_store(root)
    except StoreError:
        sys.stderr.write(f"making {root}\n")
        job = prepare(
            FeaturizeConfig(source=str(PUSH), backbone=backbone, options=options, store=StoreOptions(dtype=dtype))
        )
        run(job, root, resume=root.exists())
    return root
