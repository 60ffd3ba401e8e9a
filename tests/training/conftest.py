"""`trainee`: the module `support.trainee`, which the tests also run as a script."""

from __future__ import annotations

from types import ModuleType

import pytest

from support import trainee as module


@pytest.fixture(scope="session")
def trainee() -> ModuleType:
    return module
