"""The declared minimums: one for every requirement, read by the script that installs them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
floors = runpy.run_path(str(Path(__file__).with_name("floors.py")))["floors"]


def test_every_requirement_of_a_user_declares_a_minimum() -> None:
    pins = floors(ROOT / "pyproject.toml")
    assert {"av==15", "zarr==3.1", "efficientnet-lite-pytorch==0.1.0", "packaging==22"} <= set(pins)
    assert len({pin.partition("==")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize("requirement", ["packaging", "numpy<3", "numpy>=2; python_version < '3.12'"])
def test_a_requirement_without_a_minimum_is_an_error(requirement: str, tmp_path: Path) -> None:
    extras = "\n".join(f"{name} = []" for name in ("bench", "dist", "lora", "remote", "sim"))
    text = f'[project]\ndependencies = ["{requirement}"]\n[project.optional-dependencies]\n{extras}\n'
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match=requirement.partition(";")[0]):
        floors(tmp_path / "pyproject.toml")
