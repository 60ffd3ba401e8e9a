"""Named texts of an episode: kept beside its task, absent where there are none, refused where they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import CorruptionError
from vla.stores.fingerprint import digest
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.metadata import table_digests
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable, encode_text
from vla.stores.verify import verify_store
from vla.stores.writer import open_writer

TEXTS: list[Mapping[str, str]] = [
    {"high_level_task": "set the table", "subtask": "pick – ü"},
    {},
    {"subtask": "pick – ü", "high_level_task": "set the table"},
    {"high_level_task": "wipe", "subtask": "pick – ü"},
]


def write(root: Path, texts: list[Mapping[str, str]] | None) -> Path:
    table = EpisodeTable.plan([f"e{n}" for n in range(4)], [2, 3, 1, 2], ["pick – ü"] * 4, texts)
    manifest = Manifest(
        rows=8,
        unit_rows=8,
        fps=10.0,
        cameras=("front",),
        features={"grid": FeatureInfo(shape=(1, 2), dims=("view", "channel"), dtype="float16")},
        steps={"action": StepInfo(shape=(2,), dtype="float32", role="action")},
        fingerprint={"source": {"digest": "a"}},
        tables={},
        provenance={},
    )
    with open_writer(root, manifest, table) as writer:
        buffer = writer.begin(0)
        buffer.put(0, {"grid": np.ones((8, 1, 2), np.float32)})
        buffer.steps["action"][:] = 1
        writer.commit(buffer)
    return root


@pytest.mark.parametrize("form", ["zarr", "h5"])
def test_texts_come_back_by_episode_and_equal_ones_are_kept_once(form: str, tmp_path: Path) -> None:
    root = write(tmp_path / "store", TEXTS)
    if form == "h5":
        options = ConvertOptions.build({"format": "h5"}, where="a test")
        convert_store(root, tmp_path / "h5", options)
        root = tmp_path / "h5"
    table = open_store(root).episodes
    assert [dict(table.texts(episode)) for episode in range(4)] == TEXTS
    assert table.label.tolist() == [0, 1, 0, 2]
    assert table.tasks == ("pick – ü",)
    assert verify_store(root).findings == []


def test_a_store_with_texts_that_was_half_made_is_in_nobodys_way(tmp_path: Path) -> None:
    half = write(tmp_path / "store", TEXTS).rename(tmp_path / "store.partial")
    (half / "commits" / "unit-000000.json").unlink()
    assert verify_store(write(tmp_path / "store", TEXTS)).findings == []
    assert not (tmp_path / "store.partial").exists()


def test_a_store_without_texts_is_the_store_that_it_always_was(tmp_path: Path, files_of: Callable[..., Any]) -> None:
    with_none, with_empty = write(tmp_path / "a", None), write(tmp_path / "b", [{}] * 4)
    assert files_of(with_none) == files_of(with_empty)
    assert not (with_none / "labels").exists()
    assert not (with_none / "episodes/label").exists()
    store = open_store(with_none)
    assert "labels/json" not in store.manifest.tables
    assert store.episodes.texts(2) == {}


def test_other_texts_make_another_store(tmp_path: Path) -> None:
    digests = {
        open_store(write(tmp_path / name, texts)).manifest.sha256()
        for name, texts in {"a": TEXTS, "b": TEXTS[::-1], "c": None}.items()
    }
    assert len(digests) == 3


def test_plain_zarr_with_texts_is_replaced_and_recovers_like_any_other(tmp_path: Path) -> None:
    root, options = write(tmp_path / "store", TEXTS), ConvertOptions(format="plain-zarr")
    convert_store(root, tmp_path / "p", options)
    shutil.copytree(tmp_path / "p", tmp_path / "p.partial")  # of a run that was killed
    shutil.copytree(tmp_path / "p", tmp_path / "p.old.partial")
    convert_store(root, tmp_path / "p", options, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "store"]


def relabel(root: Path, path: str, values: np.ndarray[Any, Any], *, sign: bool) -> None:
    """Replace a table, with valid checksums; `sign` renews the manifest's digests too."""
    raw = values.tobytes()
    file = root / path / ("c" + ".0" * values.ndim)
    file.write_bytes(raw + int(google_crc32c.value(raw)).to_bytes(4, "little"))
    metadata = json.loads((root / path / "zarr.json").read_text())
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(values.shape)
    (root / path / "zarr.json").write_text(json.dumps(metadata))
    if sign:
        document = json.loads((root / "zarr.json").read_text())
        document["attributes"]["vla"]["tables"][path] = table_digests({path: values})[path]
        document["attributes"]["vla_sha256"] = digest(document["attributes"]["vla"])
        (root / "zarr.json").write_text(json.dumps(document))


BAD: dict[str, tuple[str, np.ndarray[Any, Any], bool, str]] = {
    "other labels": ("labels/json", encode_text(["{}"] * 3), False, "labels/json does not match the manifest"),
    "other numbers": ("episodes/label", np.zeros(4, np.int64), False, "episodes/label does not match the manifest"),
    "no json": ("labels/json", encode_text(["{"] * 3), True, "a label in the episode table"),
    "no object": ("labels/json", encode_text(["[]"] * 3), True, "a label in the episode table"),
    "no texts": ("labels/json", encode_text(['{"a": 1}'] * 3), True, "a label in the episode table"),
    "deep": ("labels/json", encode_text(["[" * 100_000] * 3), True, "a label in the episode table"),
    "no utf-8": ("labels/json", np.full((3, 2), 0xFF, np.uint8), True, "no UTF-8"),
    "out of range": ("episodes/label", np.array([0, 1, 2, 3], np.int64), True, "episode table does not fit"),
    "negative": ("episodes/label", np.array([0, 1, -1, 2], np.int64), True, "episode table does not fit"),
    "overlapping": ("episodes/row_start", np.array([0, 1, 5, 6], np.int64), True, "episode table does not fit"),
    "a gap": ("episodes/length", np.array([2, 2, 1, 2], np.int64), True, "episode table does not fit"),
    "too few": ("episodes/label", np.array([0, 1, 2], np.int64), True, "episode table does not fit"),
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_or_lying_texts_are_refused(what: str, tmp_path: Path) -> None:
    path, values, sign, says = BAD[what]
    root = write(tmp_path / "store", TEXTS)
    relabel(root, path, values, sign=sign)
    with pytest.raises(CorruptionError, match=says):
        open_store(root)


@pytest.mark.parametrize("path", ["labels/json", "episodes/label"])
def test_one_of_the_two_tables_alone_is_refused(path: str, tmp_path: Path) -> None:
    root = write(tmp_path / "store", TEXTS)
    document = json.loads((root / "zarr.json").read_text())
    del document["attributes"]["vla"]["tables"][path]
    document["attributes"]["vla_sha256"] = digest(document["attributes"]["vla"])
    (root / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(CorruptionError, match=path):
        open_store(root)
