"""`trainee`: the module of that name in this folder, which the tests also run as a script."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def trainee() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vla_trainee", Path(__file__).with_name("trainee.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vla_trainee"] = module
    spec.loader.exec_module(module)
    return module
