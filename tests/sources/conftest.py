"""Both versions of LeRobot's layout."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["v3.0", "v2.1"])
def version(request: pytest.FixtureRequest) -> str:
    """Both layouts on disk."""
    return str(request.param)
