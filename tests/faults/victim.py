"""A small `featurize`, its episodes labelled, that is made to fail: run by these tests, in a process of its own.

    victim.py crash FOLDER PHASE WHEN STRIDE   the process ends at each file-system operation that changes something
    victim.py error FOLDER PHASE STRIDE   every STRIDE-th operation, reading ones too, fails with an errno
    victim.py kill  FOLDER COUNT SEED     SIGKILL at random moments of a slow run
    victim.py full  FOLDER STRIDE         a disk that fills up at every possible place; FOLDER is a small file system

A phase is `create` (a store without units), `overwrite` (one in the place of another) or `commit` (its units).
VLA_FAULT_FORM is the form of the store: zarr, h5 or zstd. Everything is imported once and each victim is forked, which
makes a hundred deaths a matter of seconds. VLA_FAULT_TOY=1 has the units computed by `featurize` with the toy backbone,
as `kill` always has; otherwise they are made up, which spares each process an import of torch.
Prints one JSON object: what was counted, and `failures`, one line each.
"""

from __future__ import annotations

import errno
import functools
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vla.featurize.sources.registry import open_source
from vla.stores.errors import MachineError, VlaError
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable
from vla.stores.verify import verify_store
from vla.stores.writer import StoreWriter, open_writer

FORM, TOY = os.environ.get("VLA_FAULT_FORM", "zarr"), os.environ.get("VLA_FAULT_TOY") == "1"
SOURCE = open_source("synthetic", episodes=3, length=(5, 9), image_size=8, seed=2)
INDEX = SOURCE.index()
EPISODES = EpisodeTable.plan(*zip(*((e.id, e.length, e.task, {"whole": e.task}) for e in INDEX.episodes), strict=True))
MANIFEST = Manifest(
    rows=EPISODES.rows,
    unit_rows=8,
    fps=INDEX.fps,
    cameras=INDEX.cameras,
    features={"grid": FeatureInfo(shape=(2, 2, 2, 4), dims=("view", "y", "x", "channel"), dtype="float16")},
    steps={
        name: StepInfo.build({"shape": step.shape, "dtype": step.dtype, "role": step.role})
        for name, step in INDEX.steps.items()
    },
    fingerprint={"source": {"digest": SOURCE.digest()}},
    tables={},
    provenance={},
    format="h5" if FORM == "h5" else "zarr",
    compression="zstd" if FORM == "zstd" else "none",
)


def run(root: Path, *, only_create: bool = False, overwrite: bool = False, delay_ms: float | None = None) -> None:
    """Begin the store at `root`, or go on with it, or make it anew. A delay, even of 0, is the toy backbone's."""
    with open_writer(root, MANIFEST, EPISODES, resume=not overwrite, overwrite=overwrite) as writer:
        if only_create:
            return
        if delay_ms is None and not TOY:
            for unit in writer.pending():
                make_up(writer, unit)
            return
        from vla.featurize.backbones.registry import make_backbone
        from vla.featurize.run import featurize

        backbone = make_backbone("toy", grid=2, channels=4, delay_ms=delay_ms or 0.0)
        featurize(SOURCE, backbone, writer, EPISODES, batch_size=3)


def make_up(writer: StoreWriter, unit: int) -> None:
    """Commit a unit of numbers that depend on it alone."""
    buffer = writer.begin(unit)
    rng = np.random.default_rng(unit)
    buffer.put(buffer.rows.start, {"grid": rng.normal(size=(len(buffer.rows), 2, 2, 2, 4)).astype(np.float32)})
    for values in buffer.steps.values():
        values[...] = rng.integers(0, 100, values.shape)
    writer.commit(buffer)


# ---- what goes wrong ----


class Faults:
    """Counts file-system operations, and calls `strike` at the k-th. `reading` counts those too that change nothing.

    `after`: when the operation has been done, not before.
    """

    def __init__(
        self, at: int, strike: Callable[[str, Callable[[], Any]], Any], *, reading: bool, after: bool = False
    ) -> None:
        self.at, self.strike, self.reading, self.after = at, strike, reading, after
        self.names: list[str] = []
        self._lock = threading.Lock()

    def step(self, name: str, work: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        with self._lock:
            self.names.append(name)
            now = len(self.names) == self.at
        if now and not self.after:
            self.strike(name, half)
        done = work()
        if now and self.after:
            self.strike(name, half)
        return done

    @contextmanager
    def installed(self) -> Iterator[None]:
        changing = ["mkdir", "rename", "replace", "unlink", "rmdir", "link"]
        names = [*changing, "fsync", "stat", "scandir", "listdir"] if self.reading else changing
        saved = {name: getattr(os, name) for name in (*names, "open")}
        saved_open = io.open
        for name in names:
            setattr(os, name, self._counted(name, saved[name]))
        os.open = self._os_open(saved["open"])  # type: ignore[assignment]
        io.open = self._io_open(saved_open)  # type: ignore[assignment]
        try:
            yield
        finally:
            io.open = saved_open
            for name, function in saved.items():
                setattr(os, name, function)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            return self.step(name, lambda: function(*arguments, **options))

        return counted

    def _os_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, flags: int, *rest: Any, **options: Any) -> Any:
            if self.reading or flags & os.O_CREAT:
                return self.step("open", lambda: function(path, flags, *rest, **options))
            return function(path, flags, *rest, **options)

        return counted

    def _io_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            writing = bool(set(mode) & set("wax+"))
            really = functools.partial(function, file, mode, *rest, **options)
            opened = self.step("open", really) if self.reading or writing else really()
            if writing and not isinstance(file, int):
                write = opened.write

                def counted_write(data: Any) -> Any:
                    def half() -> None:
                        write(memoryview(data)[: len(memoryview(data)) // 2])
                        opened.flush()

                    return self.step("write", lambda: write(data), half)

                opened.write = counted_write
            return opened

        return counted


# ---- what must hold afterwards ----


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_survivor(root: Path, reference: dict[str, bytes]) -> str:
    """Say what is wrong with a store after its writer died; nothing where it is whole, partial or absent."""
    if not root.exists():
        return ""
    store = open_store(root, allow_partial=True)
    damage = [line for line in verify_store(root).findings if line.startswith("array")]
    if damage:
        return f"damaged: {damage}"
    for unit, commit in store.commits.items():
        for path in (*commit.files, f"commits/unit-{unit:06d}.json"):
            if (root / path).read_bytes() != reference[path]:
                return f"committed {path} differs"
    return ""


def check_resumed(root: Path, reference: dict[str, bytes], *, only_create: bool = False) -> str:
    """Resume, and say how the store differs from one that was never interrupted."""
    run(root, only_create=only_create)
    found = files_of(root)
    if found != reference:
        wrong = sorted(path for path in found.keys() | reference.keys() if found.get(path) != reference.get(path))
        return f"resumed store differs in {wrong}"
    debris = [path.name for path in root.parent.rglob("*.partial")]
    return f"left {debris}" if debris else ""


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return how it ended: the exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        gc.disable()  # a collection would touch, and so copy, all memory of the parent
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Stage:
    """A phase of the run: what it starts from, and the bytes that it ends with."""

    def __init__(self, folder: Path, phase: str) -> None:
        self.root, self.empty, self.phase = folder / "work" / "s", folder / "empty", phase
        self.only_create = phase != "commit"
        run(self.empty, only_create=True)
        run(folder / "whole", only_create=self.only_create)
        self.reference = files_of(folder / "whole")

    def prepare(self) -> None:
        shutil.rmtree(self.root.parent, ignore_errors=True)
        self.root.parent.mkdir()
        if self.phase != "create":
            shutil.copytree(self.empty, self.root)

    def run(self) -> None:
        run(self.root, only_create=self.only_create, overwrite=self.phase == "overwrite")

    def operations(self, *, reading: bool) -> list[str]:
        self.prepare()
        faults = Faults(0, lambda name, half: None, reading=reading)
        with faults.installed():
            self.run()
        return faults.names

    def finish(self) -> str:
        """Say what is wrong with what is left, now and after resuming."""
        try:
            problem = check_survivor(self.root, self.reference)
            return problem or check_resumed(self.root, self.reference, only_create=self.only_create)
        except VlaError as caught:
            return f"{type(caught).__name__}: {caught}"


WHENS = {"short": ("before", "halfway", "last"), "long": ("before", "halfway", "after")}


def crash(folder: Path, phase: str, when: str, stride: int) -> dict[str, Any]:
    """End the process before each changing operation, in the middle of each write, and after the last or after each.

    Before every `stride`-th operation only, and in the middle of every `stride`-th write, where it is above 1.
    """
    stage = Stage(folder, phase)
    names = stage.operations(reading=False)
    failures, deaths, moments = [], 0, []
    for kind in WHENS[when]:
        every = range(1, len(names) + 1)
        chosen = {"halfway": [at for at in every if names[at - 1] == "write"], "last": [len(names)]}.get(kind, every)
        moments += [(at, kind) for at in chosen[::stride]]
    for at, kind in moments:

        def strike(name: str, half: Callable[[], Any], kind: str = kind) -> None:
            if kind == "halfway":
                half()
            os._exit(7)

        def work(at: int = at, strike: Callable[..., Any] = strike, kind: str = kind) -> None:
            with Faults(at, strike, reading=False, after=kind in ("after", "last")).installed():
                stage.run()

        stage.prepare()
        code = in_child(work)
        deaths += code == 7
        problem = stage.finish() if code in (0, 7) else f"exit code {code}"
        if problem:
            failures.append(f"{names[at - 1]} {at} of {len(names)}, {kind}: {problem}")
    return {"operations": len(names), "moments": len(moments), "deaths": deaths, "failures": failures}


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EINTR, errno.EROFS, errno.EDQUOT)


def error(folder: Path, phase: str, stride: int) -> dict[str, Any]:
    """Let each operation fail: a one-line `MachineError`, and nothing broken."""
    stage = Stage(folder, phase)
    total = len(stage.operations(reading=True))
    failures, raised = [], 0
    for at in range(1, total + 1, stride):
        code = ERRORS[at // stride % len(ERRORS)]

        def strike(name: str, half: Callable[[], Any], code: int = code) -> None:
            if code in (errno.ENOSPC, errno.EDQUOT) and name == "write":
                half()  # a full disk takes what fits
            raise OSError(code, os.strerror(code))

        stage.prepare()
        problem = ""
        try:
            with Faults(at, strike, reading=True).installed():
                stage.run()
        except MachineError as caught:
            raised += 1
            problem = "" if "\n" not in str(caught) else f"more than one line: {caught}"
        except Exception as caught:  # noqa: BLE001 - whatever comes is the finding
            problem = f"{type(caught).__name__}: {caught}"
        problem = problem or stage.finish()
        if problem:
            failures.append(f"operation {at} of {total}, {errno.errorcode[code]}: {problem}")
    return {"operations": total, "raised": raised, "failures": failures}


def kill(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGKILL a slow run at random moments, again and again, until it has been killed `count` times; then resume."""
    rng = random.Random(seed)
    run(folder / "whole")
    reference = files_of(folder / "whole")
    failures: list[str] = []
    kills, commits_seen = 0, set()
    began = time.monotonic()
    in_child(lambda: run(folder / "timed", delay_ms=5.0))
    longest = 1.2 * (time.monotonic() - began)  # on a busy machine a run takes longer, and the kills come later
    while kills < count:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for _ in range(count):  # until one run comes through; each goes on where the one before was killed
            child = os.fork()
            if child == 0:
                try:
                    run(work / "s", delay_ms=5.0)
                finally:
                    os._exit(0)
            time.sleep(rng.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            kills += killed
            try:
                problem = check_survivor(work / "s", reference)
            except VlaError as caught:
                problem = f"{type(caught).__name__}: {caught}"
            if problem:
                failures.append(f"kill {kills}: {problem}")
            commits_seen.add(len(list(work.glob("s/commits/unit-*.json"))))
            if not killed or kills >= count:
                break
        try:
            problem = check_resumed(work / "s", reference)
        except VlaError as caught:
            problem = f"{type(caught).__name__}: {caught}"
        if problem:
            failures.append(f"after kill {kills}: {problem}")
    return {"kills": kills, "commits_seen": sorted(commits_seen), "failures": failures}


def full(folder: Path, stride: int) -> dict[str, Any]:
    """Leave 0, 4, 8, ... KiB free before each run (or every `stride`-th of these), until one comes through."""
    run(folder / "whole")
    reference = files_of(folder / "whole")
    shutil.rmtree(folder / "whole")
    failures, refused, page = [], 0, 4096
    for pages in range(0, 400, stride):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(bytes(max(free - pages * page, 0)))
        through = False
        try:
            run(work / "s")
            through = True
        except MachineError as caught:
            refused += 1
            problem = "" if "the disk is full" in str(caught) and "\n" not in str(caught) else str(caught)
            problem = problem or check_survivor(work / "s", reference)
        (folder / "ballast").unlink()
        if through:
            break
        problem = problem or check_resumed(work / "s", reference)
        if problem:
            failures.append(f"{pages * 4} KiB free: {problem}")
    return {"refused": refused, "through": through, "failures": failures}


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    target = Path(where)
    if command == "crash":
        result = crash(target, rest[0], rest[1], int(rest[2]))
    elif command == "error":
        result = error(target, rest[0], int(rest[1]))
    elif command == "full":
        result = full(target, int(rest[0]))
    else:
        TOY = True
        result = kill(target, int(rest[0]), int(rest[1]))
    sys.stdout.write(json.dumps(result) + "\n")
