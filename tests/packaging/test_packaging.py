"""The wheel holds exactly the package, and `vla --help` costs nothing."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("stores", "training", "pretrained", "featurize", "heads", "rollout", "terminal")


def _config():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_package_list_matches_the_tree():
    found = {"vla"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add(".".join(("vla", *init.parent.relative_to(ROOT).parts)))
    setup = _config()["tool"]["setuptools"]
    assert set(setup["packages"]) == found
    assert {name: name.removeprefix("vla").strip(".").replace(".", "/") or "." for name in found} == setup[
        "package-dir"
    ]


def test_only_the_named_modules_stand_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {"vla/__init__.py", "vla/cli.py", "vla/py.typed"}
    for room in ROOMS:
        wanted |= {f"vla/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*.py")}
    assert names == wanted


def test_the_command_line_imports_no_heavy_module():
    code = (
        "import sys, vla.cli;"
        "heavy = {'torch', 'zarr', 'transformers', 'pandas', 'numpy', 'diffusers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_constraints_pin_torch_first_and_every_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("torch==")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = _config()["project"]
    needed = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        needed += extra
    names = {name.split(">")[0].split("=")[0].split("<")[0].lower().replace("_", "-") for name in needed}
    assert names <= pinned
