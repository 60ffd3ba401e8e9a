"""Runs every comparison with upstream code and keeps the outcome: `make parity CHECKOUTS=DIR`.

DIR holds one checkout a project, in a folder of the project's name; see `PROJECTS` or docs/parity.md. The outcome of a
project replaces its last one in docs/parity.json, and docs/parity.md is written anew from that file. A project that
cannot run keeps its last outcome, and its row says why it did not run this time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vla.featurize.backbones import croco, mapanything, vggt_network
from vla.featurize.backbones.checkout import read_commit
from vla.stores.errors import VlaError

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "docs/parity.json", ROOT / "docs/parity.md"


@dataclass(frozen=True)
class Project:
    """Upstream code and the tests that compare with it.

    `name` is the folder below DIR, or the distribution where `url` is empty: a package from the index, which needs no
    checkout. `commit` is the one that was compared. `only` is pytest's -k. `needs` are modules that the code imports
    and that are not among our dependencies.
    """

    name: str
    url: str
    commit: str
    tests: tuple[str, ...]
    only: str = ""
    needs: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """The environment variable that names the checkout to the tests."""
        return f"VLA_{self.name.upper().replace('-', '_')}_CHECKOUT"

    def clone(self, folder: Path) -> str:
        """Return the command that makes the checkout."""
        where = folder / self.name
        return f"git clone {self.url} {where} && git -C {where} checkout {self.commit}"


PARITY = "tests/parity/test_{}_parity.py"
LISTING = "tests/backbones/test_backbone_listing.py"
PROJECTS = (
    Project(
        "croco",
        croco.REPOSITORY.url,
        croco.REPOSITORY.commits[0],
        (PARITY.format("croco"), "tests/backbones/test_croco_backbone.py", LISTING),
        only="croco",
    ),
    Project(
        "vggt",
        vggt_network.REPOSITORY.url,
        vggt_network.REPOSITORY.commits[0],
        (PARITY.format("vggt"), "tests/backbones/test_vggt_backbone.py", LISTING),
        only="vggt",
    ),
    Project(
        "diffusion_policy",
        "https://github.com/real-stanford/diffusion_policy",
        "5ba07ac6661db573af695b419a7947ecb704690f",
        (PARITY.format("diffusion_policy"),),
        needs=("einops",),
    ),
    Project(
        "OpenTrackVLA",
        "https://github.com/om-ai-lab/OpenTrackVLA",
        "d0ec395c2c25f83c202d3f295122e9dbb178bbd7",
        (PARITY.format("opentrackvla"),),
    ),
    Project(
        "LLaVA-3D",
        "https://github.com/ZCMax/LLaVA-3D",
        "91d979dca9998174c8eda50744de8da448e0ba0c",
        (PARITY.format("spatial"),),
        only="llava",
    ),
    Project(
        "map-anything",
        mapanything.REPOSITORY.url,
        mapanything.REPOSITORY.commits[0],
        (PARITY.format("spatial"),),
        only="MapAnything",
        needs=("uniception", "hydra", "jaxtyping", "einops", "timm", "cv2", "torchvision"),
    ),
    Project("depth-anything-3", "", "", (PARITY.format("da3"),), needs=("depth_anything_3",)),
    Project("transformers", "", "", (PARITY.format("dino_siglip"), PARITY.format("siglip_prefix"))),
)


def why_not(project: Project, folder: Path) -> str | None:
    """Return what keeps a project from running, or None."""
    if project.url and not (folder / project.name).is_dir():
        return f"no folder {project.name}"
    missing = [module for module in project.needs if importlib.util.find_spec(module) is None]
    return f"no module {', '.join(missing)}" if missing else None


def run_tests(tests: Sequence[str], only: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return how many tests passed, which failed or could not begin, which figures they measured, and what was skipped.

    Raises `RuntimeError` where pytest itself does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "long or not long", "-p", "no:cacheprovider"]
        # The older family of the format holds what `record_property` measured.
        command += [f"--junit-xml={file}", "-o", "junit_family=xunit1", *(["-k", only] if only else []), *tests]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}: {' '.join(command)}")
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [reason for case in cases for reason in case.iter("skipped")]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": len(skipped),
        "measured": {
            entry.get("name", ""): entry.get("value", "") for case in cases for entry in case.iter("property")
        },
        "skip_reasons": sorted({reason.get("message", "") for reason in skipped}),
    }


def run_project(project: Project, folder: Path) -> dict[str, Any]:
    """Run the tests of a project and return its record."""
    checkout = folder / project.name
    environment = {project.variable: str(checkout.resolve())} if project.url else {}
    commit = read_commit(checkout) if project.url else metadata.version(project.name)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "url": project.url,
        "commit": commit or "none",
        "date": datetime.now(UTC).date().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **versions,
        **run_tests(project.tests, project.only, environment),
    }


def render(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return docs/parity.md."""
    rows = [
        "# Parity with upstream code",
        "",
        "Written by `make parity CHECKOUTS=DIR`, from parity.json; change neither by hand. DIR holds one checkout a",
        "project, in a folder of the name in the first column, at the commit in the second:",
        "",
        "```",
        *(project.clone(Path("DIR")) for project in PROJECTS if project.url),
        "make parity CHECKOUTS=DIR",
        "```",
        "",
        "Importing code runs it: clone what you trust. Nothing of a checkout is installed. map-anything also needs the",
        "packages that [spatial.md](backbones/spatial.md) lists, torchvision among them. A test is skipped where the",
        "upstream code has no counterpart. The last outcome of each project:",
        "",
        "| project | commit or version | date | passed | failed | skipped | not run the last time |",
        "|---|---|---|---|---|---|---|",
    ]
    for project in PROJECTS:
        kept = record.get(project.name, {})
        commit = f"`{kept['commit'][:12]}`" if "commit" in kept else "never run"
        failed = ", ".join(kept.get("failed", ())) or "0"
        cells = [project.name, commit, kept.get("date", ""), kept.get("passed", ""), failed]
        reasons = "; ".join(kept.get("skip_reasons", ()))
        cells += [f"{kept.get('skipped', '')}{f' ({reasons})' if reasons else ''}", kept.get("not_run", "")]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows) + "\n"


def update(record: dict[str, dict[str, Any]], folder: Path, projects: Sequence[Project] = PROJECTS) -> bool:
    """Run the projects that can run, put their outcomes into `record`, and return whether nothing failed."""
    well = True
    for project in projects:
        reason = why_not(project, folder)
        if reason is not None:
            record.setdefault(project.name, {})["not_run"] = reason
            hint = f"; {project.clone(folder)}" if reason.startswith("no folder") else ""
            sys.stderr.write(f"{project.name} is not run: {reason}{hint}\n")
            continue
        record[project.name] = made = run_project(project, folder)
        if project.commit and made["commit"] != project.commit:
            sys.stderr.write(f"{project.name} is at {made['commit']}; {project.commit} was compared before\n")
        well = well and not made["failed"]
    return well


def main() -> int:
    """Return 0, or 1 where a test failed, or 3 where a checkout cannot be read."""
    parser = argparse.ArgumentParser(prog="make parity CHECKOUTS=DIR", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the checkouts")
    folder = parser.parse_args().folder
    if not folder.is_dir():  # else only the packages would be compared, and a misspelt folder would pass
        parser.error(f"no folder {folder}; docs/parity.md says which checkouts it holds")
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    try:
        well = update(record, folder)
    except VlaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(record), encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
