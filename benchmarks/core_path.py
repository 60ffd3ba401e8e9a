"""How much code a person has to read: files, functions and lines that the core path enters.

Runs the commands a user runs (toy backbone, synthetic source, head `fm`) in this process under a profiler hook that
records every function of the package that is entered, on every thread. A function counts with its whole source, from
its `def` to its last line, docstring included; a function nested in another counts inside the outer one only. Module
bodies and class bodies do not count. Imports count where they call a function.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import measure
import numpy as np

import vla
from vla.cli import app

PACKAGE = Path(vla.__file__).resolve().parent
STEPS = 20


class Trace:
    """The code objects of the package that were entered, by stage."""

    def __init__(self) -> None:
        self.entered: dict[str, set[CodeType]] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record what runs inside, on this thread and on threads begun inside."""
        seen = self.entered.setdefault(name, set())

        def record(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                seen.add(frame.f_code)

        threading.setprofile(record)
        sys.setprofile(record)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]  # None removes the hook


def spans(codes: set[CodeType]) -> dict[Path, set[tuple[int, int]]]:
    """Return first and last line of each function entered, by file relative to the package."""
    found: dict[Path, set[tuple[int, int]]] = {}
    for code in codes:
        file = Path(code.co_filename).resolve()
        if not file.is_relative_to(PACKAGE) or file.is_relative_to(PACKAGE / ".venv"):
            continue
        file = file.relative_to(PACKAGE)
        if file.parts[0] in ("benchmarks", "tests", "examples") or code.co_name in ("<module>", "__annotate__"):
            continue
        if not code.co_flags & 0x2:  # CO_NEWLOCALS alone marks functions; a class body has no optimised locals
            continue
        last = max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
        found.setdefault(file, set()).add((code.co_firstlineno, last))
    return {file: _outermost(lines) for file, lines in found.items()}


def _outermost(lines: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return {span for span in lines if not any(o != span and o[0] <= span[0] and span[1] <= o[1] for o in lines)}


def counted(codes: set[CodeType]) -> dict[str, int]:
    """Return how many files, functions and lines were entered."""
    by_file = spans(codes)
    functions = [span for lines in by_file.values() for span in lines]
    return {"files": len(by_file), "functions": len(functions), "lines": sum(b - a + 1 for a, b in functions)}


def run(*arguments: str) -> None:
    """Run one command of the command line in this process; its output is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        app(list(arguments), standalone_mode=False)


def one_decision(trace: Trace, run_dir: Path) -> None:
    """Record one `Policy.act`; loading the policy does not count."""
    from vla.rollout.envs.base import Observation
    from vla.rollout.policy import Policy

    policy = Policy.from_run(run_dir)
    cameras = policy.env_options()["cameras"]
    image = np.zeros((64, 64, 3), np.uint8)
    state = np.zeros(policy.head.artefact.io.state_dim, np.float32)
    observation = Observation(images=dict.fromkeys(cameras, image), state=state, privileged=state)
    with trace.stage("one decision"):
        policy.act(observation)


def main() -> None:
    """Trace the four stages and report."""
    options = measure.arguments(__doc__)
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        store, run_dir = f"{folder}/toy", f"{folder}/run"
        stages: dict[str, Callable[[], None]] = {
            "featurize": lambda: run(
                *("featurize", "--backbone", "toy", "--source", "synthetic:image_size=64", "--out", folder, "--json")
            ),
            "train": lambda: run(
                "train-head", "fm", "--store", store, "--out", run_dir, "--steps", str(STEPS), "--json"
            ),
            "evaluate": lambda: run("evaluate", run_dir, "--json"),
        }
        for name, stage in stages.items():
            with trace.stage(name):
                stage()
        one_decision(trace, Path(run_dir))
    figures: dict[str, Any] = {name: counted(codes) for name, codes in trace.entered.items()}
    union = set().union(*trace.entered.values())
    figures["union"] = counted(union)
    by_file = sorted(spans(union).items(), key=lambda item: -sum(b - a + 1 for a, b in item[1]))
    figures["largest"] = {str(file): sum(b - a + 1 for a, b in lines) for file, lines in by_file}
    measure.report(figures, as_json=options.json)


if __name__ == "__main__":
    main()
