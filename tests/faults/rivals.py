"""Processes that want one store at the same time: run by test_concurrency.py, in a process of its own.

    rivals.py FOLDER ROUNDS SEED

In each round four writers begin or resume one store at once while two readers open it again and again. Prints one JSON
object: how often a writer was refused, how many commits the readers met, and `failures`, one line each.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import victim

from vla.stores.errors import StoreError, VlaError
from vla.stores.store import open_store
from vla.stores.writer import open_writer

WRITERS, READERS = 4, 2
WROTE, REFUSED, WRONG = 0, 3, 1
"""Exit codes of a writer; a reader's are 10 + the largest number of commits it met, or `WRONG`."""


def write(root: Path, pause: float) -> int:
    """Write what is missing, slowly. A refusal is an error of the store in one line."""
    try:
        with open_writer(root, victim.MANIFEST, victim.EPISODES, resume=True) as writer:
            for unit in writer.pending():
                time.sleep(pause)
                victim.make_up(writer, unit)
    except StoreError as error:
        if "another process" in str(error) and "\n" not in str(error):
            return REFUSED
        raise
    return WROTE


def read(root: Path, reference: dict[str, bytes]) -> int:
    """Open the store until it is whole; whatever is committed has the bytes that it will always have."""
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) < victim.MANIFEST.units:
        if time.monotonic() > deadline:
            sys.stderr.write(f"after a minute only units {seen} were committed\n")
            return WRONG
        time.sleep(0.002)  # readers that never wait leave writers no core, on a machine that does something else
        if not root.exists():
            continue
        problem = victim.check_survivor(root, reference)
        commits = set(open_store(root, allow_partial=True).commits)
        if problem or not seen <= commits:
            sys.stderr.write(f"{problem or f'units {seen - commits} are gone'}\n")
            return WRONG
        seen = commits
    return 10 + len(seen)


def fork(work: Any) -> int:
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            code = work()
        except VlaError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    victim.run(folder / "whole")
    reference = victim.files_of(folder / "whole")
    wrote, refused, failures = 0, 0, []
    for number in range(rounds):
        shutil.rmtree(folder / "work", ignore_errors=True)
        root = folder / "work" / "s"
        root.parent.mkdir()
        if number % 2:  # every other round begins with a store without units: they do not meet while it is made
            victim.run(root, only_create=True)
        pauses = [rng.uniform(0.0, 0.02) for _ in range(WRITERS)]
        readers = [fork(functools.partial(read, root, reference)) for _ in range(READERS)]
        writers = [fork(functools.partial(write, root, pause)) for pause in pauses]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in writers]
        wrote, refused = wrote + codes.count(WROTE), refused + codes.count(REFUSED)
        if set(codes) - {WROTE, REFUSED} or WROTE not in codes:
            failures.append(f"round {number}: writers ended with {codes}")
        problem = victim.check_resumed(root, reference)
        if problem:
            failures.append(f"round {number}: {problem}")
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in readers]
        if ends != [10 + victim.MANIFEST.units] * READERS:
            failures.append(f"round {number}: readers ended with {ends}")
    return {"rounds": rounds, "wrote": wrote, "refused": refused, "failures": failures}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
