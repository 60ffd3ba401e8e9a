"""Opens artefacts as `vla` would, each in a forked process that may take 500 MB more, and says how it ended.

Standard input: [[name, how, path], …] as JSON. Standard output: {name: {"ended", "said", "grown_mb", "cpu_s"}}.
`ended` is the class of the `VlaError` that refused, "opened", "killed by N" (by its own alarm: it did not come back),
or any other exception's class. Run as a script: forking a process that has neither threads nor pytest's memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vla.featurize.caches import arrays, opentrackvla, replay_buffer  # noqa: F401  # before the fork, not in it
from vla.featurize.caches.job import ImportConfig
from vla.featurize.caches.job import prepare as prepare_import
from vla.featurize.job import FeaturizeConfig, prepare
from vla.featurize.sources import lerobot, robomimic, robotwin  # noqa: F401
from vla.featurize.sources import replay_buffer as replay_buffer_source  # noqa: F401
from vla.heads.checkpoint import load_head
from vla.pretrained.weights import read_tensors
from vla.stores.config_files import read_config
from vla.stores.errors import VlaError
from vla.stores.store import open_store
from vla.stores.verify import verify_store

GOLDEN_HEAD = Path(__file__).parents[1] / "golden/schema-1/head"
MORE_MB = 500
SECONDS = 20
"""Refusing takes some hundredths of a second: this is for a busy machine."""


def read_store(path: Path) -> None:
    """Verify a store, which may find but never fail or hang; then read all of it."""
    try:
        found = bool(verify_store(path).findings)
    except VlaError:
        found = True
    store = open_store(path, allow_partial=True)
    for name in store.manifest.features:
        store.read(name, np.arange(store.manifest.rows))
        store.statistics(name)
        store.scales(name)
    for name in store.manifest.steps:
        store.steps(name)
    if found:
        raise RuntimeError("verify finds damage, and everything reads")


def import_cache(kind: str, **options: Any) -> Callable[[Path], object]:
    source = {"episodes": 1, "length": [9, 9]}
    asked = {"kind": kind, "options": options, "source": "synthetic", "source_options": source}
    return lambda path: prepare_import(ImportConfig.build({**asked, "path": path}))


def verify_and_read(path: Path) -> None:
    """Verify a store that nothing contradicts, and read its steps: one of the two refuses."""
    verify_store(path)
    store = open_store(path, allow_partial=True)
    store.steps("action")


WAYS: dict[str, Callable[[Path], object]] = {
    "empty store": verify_and_read,
    "replay buffer": lambda path: prepare(
        FeaturizeConfig.build({"backbone": "toy", "source": str(path), "source_options": {"fps": 10}})
    ),
    "replay buffer cache": import_cache("replay-buffer", features={"grid": "img"}),
    "robomimic filter": lambda path: prepare(
        FeaturizeConfig.build({"backbone": "toy", "source": str(path), "source_options": {"filter": "train"}})
    ),
    "robomimic cache": import_cache("robomimic", features={"grid": "grid"}),
    "store": read_store,
    "head": load_head,
    "weights": read_tensors,
    "config": read_config,
    "arrays": import_cache("arrays"),
    "source": lambda path: prepare(FeaturizeConfig(backbone="toy", source=str(path))),
}


def attempt(how: str, path: Path, answer: int) -> None:
    """Open one artefact, in a process of its own, and write how it ended."""
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (MORE_MB << 20),) * 2)
    ended, said = "opened", ""
    try:
        WAYS[how](path)
    except VlaError as error:
        ended, said = type(error).__name__, str(error)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the test has to hear of it
        ended, said = f"crashed with {type(error).__name__}", str(error)[:500]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"ended": ended, "said": said, "grown_mb": grown, "cpu_s": time.process_time()}
    os.write(answer, json.dumps(found).encode())


def fork_and_open(how: str, path: Path) -> dict[str, Any]:
    """Return what `attempt` wrote, or by which signal it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        attempt(how, path, writing)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return {"ended": f"killed by {os.WTERMSIG(status)}", "said": "", "grown_mb": 0.0, "cpu_s": SECONDS}
    found: dict[str, Any] = json.loads(said)
    return found


if __name__ == "__main__":
    load_head(GOLDEN_HEAD)  # before the fork: the first network of a process imports 800 modules
    artefacts = json.load(sys.stdin)
    sys.stdout.write(json.dumps({name: fork_and_open(how, Path(path)) for name, how, path in artefacts}))
