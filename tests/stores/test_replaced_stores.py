"""A reader reads one store: what was put in its place while it reads is refused, never mixed in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import StoreError
from vla.stores.join import join_stores
from vla.stores.store import open_store

ROWS = np.arange(20)


@pytest.fixture(params=[("zarr", "none"), ("zarr", "zstd"), ("h5", "none")], ids=["zarr", "zstd", "h5"])
def form(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"format": request.param[0], "compression": request.param[1]}


def few_files(reader: Any) -> Any:
    """Have a reader open a file again for every unit."""
    reader.files.most = 1
    return reader


@pytest.mark.parametrize("how", ["moved", "overwritten", "copied over", "behind a link", "gone"])
@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_store_replaced_while_it_is_read_is_refused_by_name(
    tmp_path: Path, make_store: Callable[..., Any], form: dict[str, str], how: str, verify: Any
) -> None:
    made = make_store(tmp_path / "s", form=form)
    other = make_store(tmp_path / "other", seed=1, form=form)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    store = open_store(tmp_path / "link" if how == "behind a link" else made.root)
    reader = few_files(store.reader("grid", verify))
    out = np.empty_like(made.features["grid"])
    reader.read(ROWS, out)
    if how == "overwritten":
        make_store(made.root, seed=1, form=form, overwrite=True)
    elif how == "copied over":
        shutil.copytree(other.root, made.root, dirs_exist_ok=True)
    elif how == "behind a link":
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to(other.root)
    else:
        made.root.rename(tmp_path / "old")
        other.root.rename(made.root if how == "moved" else tmp_path / "nowhere")
    with pytest.raises(StoreError, match="link" if how == "behind a link" else "s"):
        reader.read(ROWS, out)
    reader.close()


def test_a_unit_replaced_by_an_equal_file_is_read_on(
    tmp_path: Path, make_store: Callable[..., Any], form: dict[str, str]
) -> None:
    made = make_store(tmp_path / "s", form=form)
    store = open_store(made.root)
    reader, out = few_files(store.reader("grid", "first")), np.empty_like(made.features["grid"])
    reader.read(ROWS, out)
    for path in store.commits[1].files:
        shutil.copy(made.root / path, tmp_path / "copy")
        (tmp_path / "copy").replace(made.root / path)
    reader.read(ROWS, out)
    np.testing.assert_array_equal(out, made.features["grid"])
    reader.close()


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_unit_replaced_by_another_file_is_refused_by_name(
    tmp_path: Path, make_store: Callable[..., Any], form: dict[str, str], verify: Any
) -> None:
    made, other = make_store(tmp_path / "s", form=form), make_store(tmp_path / "other", seed=1, form=form)
    store = open_store(made.root)
    reader, out = few_files(store.reader("grid", verify)), np.empty_like(made.features["grid"])
    reader.read(ROWS, out)
    name = next(path for path in store.commits[1].files if path.startswith(("frames", "units")))
    times = (made.root / name).stat()
    shutil.copy(other.root / name, tmp_path / "copy")
    os.utime(tmp_path / "copy", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "copy").replace(made.root / name)
    with pytest.raises(StoreError, match=Path(name).name):
        reader.read(ROWS, out)
    reader.close()


def test_a_store_replaced_between_opening_and_reading_is_refused(
    tmp_path: Path, make_store: Callable[..., Any], form: dict[str, str]
) -> None:
    made, other = make_store(tmp_path / "s", form=form), make_store(tmp_path / "other", seed=1, form=form)
    store = open_store(made.root)
    made.root.rename(tmp_path / "old")
    other.root.rename(made.root)
    with pytest.raises(StoreError, match="replaced"):
        store.read("grid", ROWS)
    with pytest.raises(StoreError):
        store.statistics("grid")


def test_of_joined_stores_the_replaced_one_is_named(
    tmp_path: Path, make_store: Callable[..., Any], form: dict[str, str]
) -> None:
    first = make_store(tmp_path / "first", form=form)
    second = {"features": {"pooled": ((2, 8), "float32")}, "form": form}
    made, other = make_store(tmp_path / "second", **second), make_store(tmp_path / "other", seed=1, **second)
    joined = join_stores([open_store(first.root), open_store(made.root)])
    reader, out = joined.reader("pooled"), np.empty_like(made.features["pooled"])
    reader.limit_files(1)
    reader.read(ROWS, out)
    made.root.rename(tmp_path / "old")
    other.root.rename(made.root)
    with pytest.raises(StoreError, match="second"):
        reader.read(ROWS, out)
    reader.close()
