"""The wheel holds exactly the package, and `vla --help` costs nothing."""

import json
import os
import re
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_wheel_holds_every_module_the_demonstrations_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {"vla/__init__.py", "vla/cli.py", "vla/py.typed"}
    for room in ROOMS:
        wanted |= {f"vla/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*.py")}
    wanted |= {
        f"vla/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "examples/push").rglob("*") if path.is_file()
    }
    assert names == wanted
    assert wheel.stat().st_size < 8 * 2**20


@pytest.mark.slow
def test_a_source_that_is_left_out_is_found_from_an_installed_wheel(wheel, tmp_path):
    """In an empty folder, with no checkout on the path: the wheel comes first, the shared packages after it."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    code = "import vla, sys; from vla.cli import main; sys.stderr.write(vla.__file__ + chr(10)); main()"
    command = [sys.executable, "-c", code, "featurize", "--backbone", "toy", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=empty, env=environment, check=False)
    assert done.stderr.startswith(str(installed)), done.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 1995
    assert (empty / "stores/toy/zarr.json").is_file()


def tracked_texts():
    """{path: text} of the files of the repository that are text, this one left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".toml", ".sh", ".txt", ".yml", ""}
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return {
        file: file.read_text(encoding="utf-8", errors="replace")
        for file in files
        if file.is_file() and file.suffix in suffixes and file != Path(__file__)
    }


def test_no_text_installs_this_project_by_its_name_from_the_index():
    """Nobody owns the name there, so anybody could serve another project under it."""
    name = _config()["project"]["name"]
    pattern = re.compile(
        rf"(pip3? install|pip download|uv add|uvx|pipx)\b[^\n]*(?<![\w/.-]){name}(?![\w.-])|{name}\[", re.I
    )
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file, text in tracked_texts().items()
        for match in pattern.finditer(text)
    ]
    assert found == []


def test_every_extra_that_a_hint_names_is_declared():
    extras = set(_config()["project"]["optional-dependencies"])
    named = set()
    for text in tracked_texts().values():
        named |= set(re.findall(r"missing_extra\(['\"](\w+)", text))
        named |= {
            extra for group in re.findall(r"install[^\n]{0,20}\.\[([\w,]+)\]", text) for extra in group.split(",")
        }
    assert {"remote", "sim", "lora", "dist", "bench"} <= named <= extras


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
