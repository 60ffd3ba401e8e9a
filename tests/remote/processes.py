"""What a process of its own does to a remote store: `write` copies a local store to a URL, `read` digests all of it.

    python processes.py write LOCAL URL OPTIONS
    python processes.py read URL OPTIONS

OPTIONS is the JSON of `RemoteOptions`. A process, not a fork: the client library does not survive one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from vla.stores.errors import VlaError
from vla.stores.remote.options import RemoteOptions
from vla.stores.remote.publish import open_remote_writer
from vla.stores.store import Store, open_store


def write(local: str, url: str, options: RemoteOptions) -> None:
    """Write what is pending; say which units were."""
    store = open_store(Path(local))
    steps = {name: store.steps(name) for name in store.manifest.steps}
    with open_remote_writer(url, store.manifest, store.episodes, options, resume=True) as writer:
        pending = writer.pending()
        for unit in pending:
            buffer = writer.begin(unit)
            rows = np.arange(buffer.rows.start, buffer.rows.stop)
            values = {name: store.read(name, rows).astype(np.float32) for name in store.manifest.features}
            buffer.put(buffer.rows.start, values)
            for name, array in steps.items():
                buffer.steps[name][: len(rows)] = array[rows]
            writer.commit(buffer)
    sys.stdout.write(f"wrote {pending}\n")


def digest(store: Store) -> str:
    """SHA-256 of every row, read one at a time in a shuffled order, and of every step array."""
    found = hashlib.sha256()
    for name in store.manifest.features:
        rows = np.random.default_rng(0).permutation(store.manifest.rows)
        reader, info = store.reader(name), store.feature_info(name)
        out = np.empty((1, *info.shape), info.stored)
        for row in rows:
            reader.read(np.array([row]), out)
            found.update(out.tobytes())
        reader.close()
    for name in store.manifest.steps:
        found.update(store.steps(name).tobytes())
    return found.hexdigest()


def main(task: str, *arguments: str) -> None:
    options = RemoteOptions.model_validate_json(arguments[-1])
    try:
        if task == "write":
            write(*arguments[:-1], options)  # type: ignore[call-arg, arg-type]
        else:
            sys.stdout.write(digest(open_store(arguments[0], remote=options)) + "\n")
    except VlaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
