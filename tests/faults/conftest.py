"""A sound store to damage, and how damage must show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import StoreError
from vla.stores.store import open_store
from vla.stores.verify import verify_store

FEATURES = {"grid": ((1, 3, 4), "float16"), "pooled": ((2, 8), "float32")}


@pytest.fixture(params=["zarr", "h5"])
def form(request: pytest.FixtureRequest) -> str:
    """The form of the store under test: each test runs in both, unless it asks for one (`indirect=["form"]`)."""
    return str(request.param)


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> dict[str, Path]:
    """Stores of three units and two features that nobody touches, by form."""
    roots = {}
    for form in ("zarr", "h5"):
        roots[form] = tmp_path_factory.mktemp(form) / "s"
        make_store(roots[form], lengths=(9, 11, 4), features=FEATURES, form={"format": form})
        _read_everything(roots[form])
        assert verify_store(roots[form]).findings == []
    return roots


@pytest.fixture
def whole(wholes: dict[str, Path], form: str) -> Path:
    """The untouched store of the form under test."""
    return wholes[form]


@pytest.fixture
def make_older(make_store: Callable[..., Any], form: str) -> Callable[..., Any]:
    """`make_older(root)` writes a store of the same plan and sizes with other features, as an older run would."""

    def make(root: Path, **options: Any) -> Any:
        defaults: dict[str, Any] = {"seed": 1, "lengths": (9, 11, 4), "form": {"format": form}}
        return make_store(root, features=FEATURES, **defaults | options)

    return make


@pytest.fixture
def root(whole: Path, memory_path: Path) -> Path:
    """A copy of that store, to damage."""
    shutil.copytree(whole, memory_path / "s")
    return memory_path / "s"


@pytest.fixture
def resume(make_store: Callable[..., Any], form: str) -> Callable[[Path], None]:
    """`resume(root)` computes the missing units of a copy of `whole`, as `featurize` with --resume does."""

    def go_on(root: Path) -> None:
        make_store(root, lengths=(9, 11, 4), features=FEATURES, form={"format": form}, resume=True)

    return go_on


@pytest.fixture(scope="session")
def read_everything() -> Callable[[Path], dict[str, bytes]]:
    """`read_everything(root)` opens a store and returns `{what: bytes}` of all that can be read from it."""
    return _read_everything


@pytest.fixture(scope="session")
def require_noticed() -> Callable[[Path, str, str], None]:
    """`require_noticed(root, path, what)`: reading raises an error that names the file; so does `verify_store`.

    Its finding names array and unit too, where the file belongs to a unit.
    """
    return _require_noticed


@pytest.fixture(scope="session")
def edit_metadata() -> Callable[..., None]:
    """`edit_metadata(file, *path, value=...)` changes one value of a JSON file."""

    def edit(file: Path, *path: str, value: Any) -> None:
        document = at = json.loads(file.read_text())
        for key in path[:-1]:
            at = at[int(key)] if isinstance(at, list) else at[key]
        at[int(path[-1]) if isinstance(at, list) else path[-1]] = value
        file.write_text(json.dumps(document))

    return edit


def _read_everything(root: Path) -> dict[str, bytes]:
    store = open_store(root)
    values: dict[str, bytes] = {"episodes": repr(store.episodes).encode()}
    for name in store.manifest.features:
        values[f"frames/{name}"] = store.read(name, np.arange(store.manifest.rows)).tobytes()
        values[f"stats/{name}"] = store.statistics(name).to_array().tobytes()
    for name in store.manifest.steps:
        values[f"steps/{name}"] = store.steps(name).tobytes()
    return values


def _require_noticed(root: Path, path: str, what: str) -> None:
    with pytest.raises(StoreError) as raised:
        _read_everything(root)
    message = str(raised.value)
    assert path in message, f"{what}: {message!r} does not name {path}"
    assert "\n" not in message
    findings = verify_store(root).findings
    named = [line for line in findings if path in line]
    assert named, f"{what}: {findings} do not name {path}"
    if path.startswith("units/"):
        assert any(f"array {path}, unit 1" in line for line in named), f"{what}: {named}"
    if "/c.1" in path and path.split("/")[0] in ("frames", "steps", "checksums", "stats"):
        array = "/".join(path.split("/")[:2])
        assert any(f"array {array}, unit 1" in line for line in named), f"{what}: {named}"
