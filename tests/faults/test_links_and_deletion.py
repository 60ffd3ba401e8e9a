"""Deleting goes by name and through no link; reading and writing follow no link out of a store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.stores.errors import StoreError, UsageError, VlaError
from vla.stores.owned import DATA_SET, RUN, STORE, debris, foreign, remove_owned, require_name
from vla.stores.repair import repair_store
from vla.stores.store import open_store
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

Files = Callable[[Path], dict[str, bytes]]
SHARD = {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}


def link_away(path: Path, elsewhere: Path) -> None:
    """Move a file or folder out of the store and leave a link, so that its content stays what was committed."""
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "name", ["scales", "frames/other", "units", "notes.partial", "steps.partial", "commits.partial"]
)
def test_a_repair_deletes_nothing_behind_a_linked_folder(
    root: Path, whole: Path, tmp_path: Path, files_of: Files, name: str, form: str
) -> None:
    if form == "h5" and name == "units":
        pytest.skip("the folder of the form's own units")
    other = tmp_path / "mine" / "grid"
    shutil.copytree(whole / "commits", other)
    for file in ("c.0.0.0.0", "c.7", "unit-000009.h5", "x.partial", "thesis.tex"):
        (other / file).write_text("mine")
    before = files_of(other)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(other)
    repair_store(root)
    assert files_of(other) == before
    assert {path: data for path, data in files_of(root).items() if path in files_of(whole)} == files_of(whole)


def test_a_repair_leaves_foreign_names_in_the_folders_of_the_store(root: Path, form: str) -> None:
    folder = root / {"zarr": "frames/grid", "h5": "units"}[form]
    mine = [root / "paper.partial", folder / "old" / Path(SHARD[form]).name, folder / "c.txt", folder / "my.partial"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    repair_store(root)
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)


@pytest.mark.parametrize("what", ["shard", "record", "table", "manifest", "folder"])
def test_a_link_inside_a_store_is_damage_and_is_never_read(root: Path, tmp_path: Path, form: str, what: str) -> None:
    names = {"shard": SHARD[form], "record": "commits/unit-000001.json", "table": "episodes/length/c.0"}
    names |= {"manifest": "zarr.json", "folder": str(Path(SHARD[form]).parent)}
    link_away(root / names[what], tmp_path / "elsewhere")
    assert any(names[what] in line for line in verify_store(root).findings)
    with pytest.raises(VlaError, match=names[what].partition("/")[0]):
        open_store(root).read("grid", np.arange(24))


def test_a_repair_removes_the_link_in_the_place_of_a_shard_and_resumes(
    root: Path, whole: Path, tmp_path: Path, form: str, files_of: Files, resume: Callable[[Path], None]
) -> None:
    link_away(root / SHARD[form], tmp_path / "elsewhere")
    kept = (tmp_path / "elsewhere").read_bytes()
    assert repair_store(root).dropped == [1]
    resume(root)
    assert files_of(root) == files_of(whole)
    assert (tmp_path / "elsewhere").read_bytes() == kept


@pytest.mark.parametrize("form", ["h5"], indirect=True)
def test_a_writer_writes_nothing_through_a_linked_folder(
    root: Path, tmp_path: Path, resume: Callable[[Path], None]
) -> None:
    (root / "commits/unit-000001.json").unlink()
    (root / SHARD["h5"]).unlink()
    link_away(root / "units", tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="units"):
        resume(root)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["unit-000000.h5", "unit-000002.h5"]


@pytest.mark.parametrize("name", ["commits/writer.lock", "commits"])
def test_a_writer_locks_nothing_through_a_link(root: Path, tmp_path: Path, name: str, make_older: Any) -> None:
    shutil.rmtree(root / "commits") if name == "commits" else (root / name).unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (root / name).symlink_to(tmp_path / "elsewhere" / ("new" if name != "commits" else ""))
    with pytest.raises(VlaError, match="commits"):
        make_older(root, overwrite=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_temporary_name_that_is_a_link_is_not_written_through(
    root: Path, tmp_path: Path, make_store: Callable[..., Any], form: str
) -> None:
    (tmp_path / "mine").write_text("mine")
    made = make_store(tmp_path / "s", units=[0], form={"format": form})
    with open_writer(made.root, made.manifest, made.episodes, resume=True) as writer:
        name = {"zarr": "frames/grid/c.1.0.0.0", "h5": "units/unit-000001.h5"}[form]
        (made.root / f"{name}.partial").symlink_to(tmp_path / "mine")
        buffer = writer.begin(1)
        buffer.put(8, {"grid": made.features["grid"][8:16]})
        with pytest.raises(VlaError, match="partial"):
            writer.commit(buffer)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "run/run.json", "frames/grid/notes/c.0", "commits/notes.txt", "empty/"])
def test_overwriting_a_store_refuses_what_is_not_the_stores_by_name(
    root: Path, name: str, files_of: Files, make_older: Callable[..., Any]
) -> None:
    (root / name).mkdir() if name.endswith("/") else (root / name).parent.mkdir(parents=True, exist_ok=True)
    if not name.endswith("/"):
        (root / name).write_text("mine")
    before = files_of(root)
    with pytest.raises(UsageError, match=name.partition("/")[0]):
        make_older(root, overwrite=True)
    assert files_of(root) == before


def test_overwriting_a_store_walks_no_link(
    root: Path, whole: Path, files_of: Files, make_older: Callable[..., Any], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    before = files_of(other)
    (root / "scales").symlink_to(other / "frames") if not (root / "scales").exists() else None
    make_older(root, overwrite=True)
    assert files_of(other) == before
    assert verify_store(root).findings == []


@pytest.mark.parametrize(
    ("layout", "ours", "others"),
    [
        (
            RUN,
            ["run.json", "best.json.partial", "checkpoints/step-00000010/model.safetensors", "vla/hparams.yml"],
            ["store/zarr.json", "notes", "checkpoints/step-1/model.safetensors", "checkpoints/step-00000010/notes"],
        ),
        (
            DATA_SET,
            ["meta/info.json", "videos/observation.images.a/chunk-000/file-000.mp4", "README.md"],
            ["meta/notes.json", "stores/toy/zarr.json", "videos/mine.mp4", "data/chunk-000/backup/file-000.parquet"],
        ),
        (
            STORE,
            ["zarr.json", "frames/grid/c/0/0/0", "labels/json/c.0.0", "units/unit-000001.h5.partial"],
            ["frames/grid/c.x", "c.0", "commits/unit-1.json", "episodes/mine/c.0", ".hidden"],
        ),
    ],
)
def test_a_folder_is_deleted_only_where_every_name_is_of_its_layout(
    tmp_path: Path, layout: Any, ours: list[str], others: list[str]
) -> None:
    for name in ours:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).touch()
    for other in others:
        (tmp_path / "f" / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / other).touch()
        assert len(foreign(tmp_path / "f", layout)) == 1, other
        with pytest.raises(UsageError):
            remove_owned(tmp_path / "f", layout)
        assert all((tmp_path / "f" / name).exists() for name in ours)
        (tmp_path / "f" / other).unlink()
        for folder in sorted((tmp_path / "f" / other).parents, reverse=True):
            if folder != tmp_path / "f" and folder.is_relative_to(tmp_path / "f") and not any(folder.iterdir()):
                folder.rmdir()
    remove_owned(tmp_path / "f", layout)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/abs", "a\\b", "-x", "~", "a\nb", "a\x1b[1m", "a\x9bm", "x.partial"]
)
def test_a_name_that_is_no_name_of_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        require_name(name, "--name")
    assert require_name("push-v3_2.5 späte", "--name") == "push-v3_2.5 späte"


def test_a_named_pipe_in_the_place_of_a_shard_is_damage(root: Path, form: str) -> None:
    (root / SHARD[form]).unlink()
    os.mkfifo(root / SHARD[form])
    assert verify_store(root).damaged == [1]
    assert repair_store(root).dropped == [1]


def test_a_temporary_file_that_a_writer_renames_while_a_store_is_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.fwalk

    def outdated(*arguments: Any, **options: Any) -> Iterator[Any]:
        for at, folders, files, parent in walk(*arguments, **options):
            yield at, folders, [*files, "zarr.json.partial"], parent

    monkeypatch.setattr(os, "fwalk", outdated)
    assert debris(tmp_path, STORE) == []
