"""What a recorded data set says about itself: `meta/recording.json` for programs, `README.md` for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vla.rollout.envs.base import EnvSpec
from vla.rollout.lerobot_writer import Summary

NOISE = 0.1
"""The default standard deviation of what is added to the executed action, in units of its [-1, 1]."""

STEPS_AFTER_SUCCESS = 3
"""A few frames of having succeeded, so that a head also learns to stay there."""


@dataclass(frozen=True)
class Recording:
    """Everything that determines a recording; `cameras` and `image_size` are None where the environment chose."""

    spec: EnvSpec
    licence: str
    packages: tuple[str, ...]
    out: Path
    seed: int
    noise: float
    cameras: tuple[str, ...] | None
    image_size: int | None

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that the bytes of the data depend on."""
        return {package: version(package) for package in (*self.packages, "av", "pyarrow")}

    def command(self, episodes: int) -> str:
        """Return the command line that makes the data set; an absolute `out` shows its last part only."""
        simulator, _, task = self.spec.name.partition(":")
        options = [f"--task {task}", f"--episodes {episodes}"]
        options.append(f"--out {self.out.name if self.out.is_absolute() else self.out.as_posix()}")
        options += [f"--seed {self.seed}"] if self.seed else []
        options += [f"--noise {self.noise:g}"] if self.noise != NOISE else []
        options += [f"--camera {camera}" for camera in self.cameras or ()]
        options += [f"--image-size {self.image_size}"] if self.image_size is not None else []
        return f"vla record {simulator} {' '.join(options)}"

    def provenance(self, kept: Sequence[int], failed: Sequence[int]) -> dict[str, Any]:
        """Return what `meta/recording.json` holds; `kept` and `failed` are environment seeds in order."""
        return {
            "environment": self.spec.name,
            "seed": self.seed,
            "noise": self.noise,
            "steps_after_success": STEPS_AFTER_SUCCESS,
            "environment_seeds": list(kept),
            "failed_environment_seeds": list(failed),
            "versions": self.versions(),
            "license": self.licence,
        }

    def card(self, summary: Summary, failed: int) -> str:
        """Return the README, with the header that the Hugging Face hub reads."""
        spec = self.spec
        versions = ", ".join(f"{package} {number}" for package, number in self.versions().items())
        return f"""---
license: {self.licence.lower()}
task_categories: [robotics]
tags: [LeRobot]
---
# {summary.episodes} demonstrations of {spec.name}: "{spec.task}"

A LeRobot v3.0 data set, made by

    {self.command(summary.episodes)}

- {summary.episodes} episodes, {summary.frames} frames at {spec.fps:g} Hz, {summary.bytes / 2**20:.1f} MiB.
  Failed attempts, which were dropped: {failed}.
- Cameras: {", ".join(spec.cameras)}; {spec.image_size} px, H.264, upright.
- `action` ({", ".join(spec.action_names)}) is the scripted expert's clean action. What was executed is that plus
  Gaussian noise of {self.noise:g}, so that the data show how to come back from small mistakes.
- `observation.state` ({", ".join(spec.state_names)}) is what a real robot would know.
- `observation.environment_state` is simulator truth, marked `"privileged": true` in `meta/info.json`: never an input
  of an honest policy.
- Environment seeds are in `meta/recording.json`. Evaluation uses others: see `vla.rollout.envs.registry`.
- Versions: {versions}. Others may give other bytes.
- SHA-256 of `find data meta videos -type f | LC_ALL=C sort | xargs sha256sum`:
  {summary.sha256}
- Licence of the data: {self.licence}.
"""
