"""The whole path in five steps, as a new user would type them: `make demo`.

Everything is written under ./demo/ ; a second run reuses what is done. `make clean` removes it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla.stores.errors import VlaError

BACKBONE, SOURCE, ENV = "efficientnet", "examples/push", "metaworld:push-v3"
STEPS, EPISODES = 2500, 10
TRAIN_SETTINGS = ["model.encoder.noise=0.2", "model.n_action=1"]
"""Further settings of the head, each as `--set` takes it, such as "train.lr=1e-3"."""

DEMO = Path("demo")
STORE, RUN = DEMO / "stores" / BACKBONE, DEMO / "runs" / "fm"
EVALUATION, ROLLOUT, VIDEO, REPORT = (
    DEMO / "evaluate.json",
    DEMO / "rollout.json",
    DEMO / "rollout.mp4",
    DEMO / "report",
)
SECONDS_REUSED = 6.0
"""What a step takes that finds its work done: mostly importing torch."""


@dataclass(frozen=True)
class Step:
    """One step: `seconds` on two CPU cores, `done` whether an earlier run left its result, `run` does it."""

    title: str
    seconds: float
    done: Callable[[], bool]
    run: Callable[[], None]


def featurize() -> None:
    """Run the backbone once over the shipped demonstrations."""
    vla("featurize", "--backbone", BACKBONE, "--source", SOURCE, "--out", STORE.parent, "--resume")


def train() -> None:
    """Train a flow-matching head from the store."""
    settings = [word for text in TRAIN_SETTINGS for word in ("--set", text)]
    resume = ["--resume"] if RUN.exists() else []
    vla("train-head", "fm", "--store", STORE, "--out", RUN, "--steps", STEPS, *settings, *resume)


def evaluate() -> None:
    """Compare its actions with those of episodes that it was not trained on."""
    vla("evaluate", RUN, "--json", into=EVALUATION)


def roll_out() -> None:
    """Let backbone and head act in the simulator."""
    filmed = ("--video", VIDEO, "--overwrite")
    vla("rollout", RUN, "--env", ENV, "--episodes", EPISODES, *filmed, "--json", into=ROLLOUT)


def report() -> None:
    """Draw the pictures and write the numbers down."""
    from vla.heads.checkpoint import load_head
    from vla.heads.evaluate import evaluate_head
    from vla.rollout.report import feature_overlay, loss_curve, predicted_against_true, rollout_strip

    pictures: dict[str, Callable[[Path], None]] = {
        "overlay.png": lambda out: feature_overlay(STORE, SOURCE, out),
        "loss.png": lambda out: loss_curve(RUN / "metrics.jsonl", out),
        "actions.png": lambda out: predicted_against_true(evaluate_head(load_head(RUN)), out),
        "rollout.png": lambda out: rollout_strip(VIDEO, out),
    }
    for number, (name, draw) in enumerate(pictures.items(), 1):
        say(f"report: picture {number}/{len(pictures)}, {REPORT / name}")
        draw(REPORT / name)
    (REPORT / "README.md").write_text(readme(), encoding="utf-8")


def store_done() -> bool:
    """Return whether every unit of the store is committed."""
    from vla.stores.store import open_store

    try:
        return open_store(STORE).complete
    except VlaError:  # not there, or not whole: the command will say
        return False


def checkpoint() -> Path:
    """Return the record of the newest checkpoint, which need not exist."""
    return max(RUN.glob("checkpoints/step-????????/complete.json"), default=RUN / "complete.json")


def fresh(*results: Path, after: tuple[Path, ...]) -> bool:
    """Return whether all results exist and none is older than what it was made from."""
    if not all(path.is_file() for path in (*results, *after)):
        return False
    return min(p.stat().st_mtime_ns for p in results) >= max(p.stat().st_mtime_ns for p in after)


PICTURES = tuple(REPORT / f"{name}.png" for name in ("overlay", "loss", "actions", "rollout"))
REUSABLE = "done before, reused"
PLAN = (
    Step("Run the frozen backbone once over 100 demonstrations", 90, store_done, featurize),
    Step("Train a flow-matching head from the store", 110, lambda: checkpoint().parent.name == last_step(), train),
    Step("Compare its actions on held-out episodes", 12, lambda: fresh(EVALUATION, after=(checkpoint(),)), evaluate),
    Step("Let it act in the simulator", 60, lambda: fresh(ROLLOUT, VIDEO, after=(checkpoint(),)), roll_out),
    Step("Draw the report", 12, lambda: fresh(REPORT / "README.md", *PICTURES, after=(EVALUATION, ROLLOUT)), report),
)
ALWAYS_RUN = (featurize, train)
"""These see for themselves, with --resume, that their work is done, and check that it is what was asked for."""


def last_step() -> str:
    """Return the name of the last checkpoint of a finished run."""
    return f"step-{STEPS:08d}"


def main() -> None:
    """Run the steps, then print the summary."""
    pace, expected, taken = 1.0, 0.0, 0.0
    for number, step in enumerate(PLAN, 1):
        done = step.done()
        # What is done is known only as far as this step: a new checkpoint makes later results stale.
        rest = [cost(later, later.done() if done else False) for later in PLAN[number:]]
        here, skip = cost(step, done), done and step.run not in ALWAYS_RUN
        left = pace * ((0.0 if skip else here) + sum(rest))
        say(f"[{number}/{len(PLAN)}] {step.title}", bold=True)
        if skip:
            say(f"      {REUSABLE}; {clock(left)} left overall")
            continue
        say(
            f"      {'done before; a look takes' if done else 'takes'} {clock(pace * here)}; {clock(left)} left overall"
        )
        began = time.monotonic()
        step.run()
        if not done:  # the steps that ran tell how fast this machine is
            taken, expected = taken + time.monotonic() - began, expected + here
            pace = taken / expected
    say("\n" + summary())


def cost(step: Step, done: bool) -> float:
    """Return the seconds that a step should take on the machine that the table was measured on."""
    if not done:
        return step.seconds
    return SECONDS_REUSED if step.run in ALWAYS_RUN else 0.0


def vla(*words: str | int | Path, into: Path | None = None) -> None:
    """Run one command of the installed `vla`, showing it first; its stdout goes `into` a file, whole or not at all.

    Ends the demo with the command's exit code where it fails; the command has said why.
    """
    executable = Path(sys.executable).with_name("vla")  # not resolved: a virtual environment's python is a link
    if not executable.is_file():
        sys.exit(fail(f"{executable} is not there; expected vla installed beside python. Try: make demo", 4))
    arguments = [str(word) for word in words]
    say("      $ " + shlex.join(["vla", *arguments]) + (f" > {into}" if into else ""))
    partial = into.with_name(into.name + ".partial") if into else None
    if partial is None:
        code = wait([str(executable), *arguments], None)
    else:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            code = wait([str(executable), *arguments], file)
    if code:
        if partial is not None:
            partial.unlink()
        sys.exit(code if code > 0 else fail(f"vla {arguments[0]} was ended by signal {-code}", 128 - code))
    if partial is not None and into is not None:
        partial.replace(into)


def wait(command: list[str], stdout: Any) -> int:
    """Run a command to its end. After Ctrl-C, which it got as well, it is given the time to write its checkpoint."""
    process = subprocess.Popen(command, stdout=stdout)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()


def summary() -> str:
    """Return the numbers of the run as Markdown lines."""
    from vla.stores.store import open_store

    manifest = open_store(STORE).manifest
    error, played = json.loads(EVALUATION.read_text()), json.loads(ROLLOUT.read_text())
    latency = played["latency"]
    size = sum(path.stat().st_size for path in STORE.rglob("*") if path.is_file()) / 2**20
    return "\n".join(
        [
            f"- Store: {manifest.rows} frames x {len(manifest.cameras)} cameras, {size:.0f} MiB.",
            f"- Action error on held-out episodes: {error['action_mae']:.3f} over executed steps; always predicting "
            f"the mean action: {error['baseline_mae']:.3f} ({error['windows']} windows, step {error['step']}).",
            f"- Success in {played['environment']}: {played['successes']} of {played['episodes']} unseen scenes; "
            f"95 % Wilson interval {played['low']:.2f} to {played['high']:.2f}.",
            f"- One decision, backbone and head: {latency['p50_ms']:.0f} ms median, {latency['p95_ms']:.0f} ms at the "
            f"95th percentile.",
            f"- Pictures and notes: {REPORT}/README.md; the first three scenes: {VIDEO}.",
        ]
    )


def readme() -> str:
    """Return the report's text."""
    from vla.stores.store import open_store

    known = open_store(STORE).manifest.provenance
    return f"""# What `make demo` did

{summary()}

{EPISODES} rollouts are few: the interval above is wide, and two heads inside it cannot be told apart. What a policy
without pictures reaches (the floor) and one that is told where the puck is (the ceiling) frame any success rate; see
the project's README for both, and for every head, over 100 scenes.

![features](overlay.png)
Frames of one demonstration beside their cached features, the first three principal components as red, green and blue.
Equal colours are places that the backbone finds alike.

![loss](loss.png)
Training loss (left axis, log scale) and the error of sampled actions on held-out episodes (right axis).

![actions](actions.png)
The first action of every held-out window, demonstrated and predicted.

![rollout](rollout.png)
The live policy: the video's first three scenes, one after another, cameras side by side.

Licences: data {known["source_licence"]}; backbone's code {known["code_licence"]}; its weights
{known["weights_licence"]}; this project MIT.
"""


def clock(seconds: float) -> str:
    """Return a duration for people."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


def say(text: str, *, bold: bool = False) -> None:
    """Print a line now; a command's own output follows it."""
    print(f"\033[1m{text}\033[0m" if bold and sys.stdout.isatty() else text, flush=True)


def fail(text: str, code: int) -> int:
    """Print an error in one line and return the exit code."""
    print(f"demo: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    try:
        main()
    except VlaError as error:
        sys.exit(fail(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; the next `make demo` goes on", 130))
