"""Embeddings on disk, and which step each belongs to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from vla.featurize.distill.pairing import PairedTeacher, episode_key, pair
from vla.featurize.distill.teacher import open_teacher
from vla.stores.errors import DataError, SourceError, UsageError
from vla.stores.store import open_store
from vla.stores.tables import EpisodeTable

EPISODES = {"episode_000000": 3, "episode_000001": 2}


def table() -> EpisodeTable:
    return EpisodeTable.plan(list(EPISODES), list(EPISODES.values()), ["task"] * len(EPISODES))


def values_of(name: str) -> np.ndarray:
    return np.random.default_rng(len(name) + int(name[-1])).normal(size=(EPISODES[name], 4)).astype(np.float32)


def paired(root: Path, **options: Any) -> PairedTeacher:
    return pair(open_teacher(root), table(), np.ones(len(EPISODES), bool), **options)


def as_npy(root: Path, name: str) -> None:
    np.save(root / f"{name.replace('00000', '')}.npy", values_of(name))


def as_frames(root: Path, name: str) -> None:
    folder = root / name.replace("_00000", "")
    folder.mkdir()
    for frame, values in enumerate(values_of(name)):
        np.save(folder / f"step_{frame:03d}.npy", values)


def as_zarr(root: Path, name: str) -> None:
    group = zarr.open_group(root / f"{name}.zarr", mode="w", zarr_format=2)
    array = group.create_array("per_frame_features", shape=values_of(name).shape, dtype="f4", chunks=(2, 4))
    array[:] = values_of(name)


def filled(root: Path, write: Callable[[Path, str], None]) -> Path:
    root.mkdir(exist_ok=True)
    for name in EPISODES:
        write(root, name)
    return root


@pytest.mark.parametrize("write", [as_npy, as_frames, as_zarr])
def test_every_step_gets_the_embedding_of_its_own_episode_and_frame(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    found = paired(filled(tmp_path / "teacher", write))
    wanted = np.concatenate([values_of(name) for name in EPISODES])
    np.testing.assert_array_equal(found.read(np.arange(5))[:, 0], wanted)
    np.testing.assert_array_equal(found.read(np.array([4, 1]))[:, 0], wanted[[4, 1]])
    assert found.report.model_dump() == {"paired": 5, "unpaired": 0, "surplus": 0, "unused": 0}


def test_a_store_is_a_teacher(tmp_path: Path, make_store: Callable[..., Any]) -> None:
    lengths, provenance = list(EPISODES.values()), {"random_weights": True}
    features = {"pc": ((1, 4), "float16"), "other": ((1, 2), "float32")}
    made = make_store(
        tmp_path / "pc", lengths=lengths, ids=["episode_0", "episode_1"], features=features, provenance=provenance
    )
    with pytest.raises(UsageError, match=r"holds pc, other. Try: --set data.teacher_feature"):
        open_teacher(made.root)
    teacher = open_teacher(made.root, "pc")
    assert teacher.random_weights
    found = pair(teacher, table(), np.ones(2, bool))
    np.testing.assert_array_equal(found.read(np.arange(5)), open_store(made.root).read("pc", np.arange(5)))
    assert teacher.digest() != open_teacher(made.root, "other").digest()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_store_of_any_dtype_is_a_teacher(tmp_path: Path, make_store: Callable[..., Any], dtype: str) -> None:
    made = make_store(
        tmp_path / "pc", lengths=[3, 2], ids=list(EPISODES), features={"pc": ((2, 4), dtype)}, unit_rows=3
    )
    found = pair(open_teacher(made.root), table(), np.ones(2, bool)).read(np.arange(5))
    np.testing.assert_allclose(found, made.features["pc"], atol=0.03)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("episode_000012", "episode12", True),
        ("episode_12", "episode-0012", True),
        ("task/episode_1", "task/episode_000001", True),
        ("task/episode_1", "episode_1", False),
        ("episode_1", "episode_10", False),
        ("demo_1", "demo_01", False),
        ("my_episode_1", "my_episode_01", False),
    ],
)
def test_the_rule_of_episode_names(one: str, other: str, same: bool) -> None:
    assert (episode_key(one) == episode_key(other)) is same


def test_an_unpaired_step_is_refused_by_episode_and_frame_or_skipped_and_counted(tmp_path: Path) -> None:
    root = filled(tmp_path / "teacher", as_frames)
    (root / "episode0" / "step_001.npy").unlink()
    with pytest.raises(DataError, match=r"frame 1 of episode 'episode_000000' has no embedding.*--skip-unpaired"):
        paired(root)
    shutil.rmtree(root / "episode1")
    (root / "episode7").mkdir()
    np.save(root / "episode7" / "0.npy", np.ones(4))
    found = paired(root, skip_unpaired=True)
    assert found.report.model_dump() == {"paired": 2, "unpaired": 3, "surplus": 0, "unused": 1}
    assert found.paired.tolist() == [True, False, True, False, False]
    np.testing.assert_array_equal(found.read(np.array([2]))[0, 0], values_of("episode_000000")[2])


def test_an_episode_without_embeddings_is_refused_never_paired_at_random(tmp_path: Path) -> None:
    root = filled(tmp_path / "teacher", as_npy)
    (root / "episode_1.npy").rename(root / "episode_2.npy")
    with pytest.raises(DataError, match="frame 0 of episode 'episode_000001' has no embedding"):
        paired(root)
    (root / "episode_0.npy").rename(root / "episode_3.npy")
    with pytest.raises(DataError, match="no step has an embedding"):
        paired(root, skip_unpaired=True)


def test_more_embeddings_than_frames_are_refused_or_counted(tmp_path: Path) -> None:
    root = filled(tmp_path / "teacher", as_npy)
    np.save(root / "episode_1.npy", np.ones((4, 4), np.float32))
    with pytest.raises(DataError, match="the teacher has frame 2 of episode 'episode_000001', whose last is 1"):
        paired(root)
    assert paired(root, skip_unpaired=True).report.surplus == 2


def test_two_spellings_of_one_episode_are_refused(tmp_path: Path) -> None:
    root = filled(tmp_path / "teacher", as_npy)
    np.save(root / "episode00.npy", values_of("episode_000000"))
    with pytest.raises(DataError, match="are one episode"):
        paired(root)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: np.save(root / "episode_0.npy", np.full((3, 4), np.nan)), "NaN or infinite"),
        (lambda root: np.save(root / "episode_0.npy", np.eye(4)[:3] * [[1], [0], [1]]), "embedding 1 is all zeros"),
        (lambda root: np.save(root / "episode_0.npy", np.ones((3, 5))), "episodes before"),
        (lambda root: np.save(root / "episode_0.npy", np.ones((3, 4, 1))), "has shape"),
        (lambda root: np.save(root / "episode_0.npy", np.array([{}] * 3), allow_pickle=True), "does not load"),
        (lambda root: (root / "episode_0.npy").write_bytes(b"\x80\x04."), "does not load"),
        (lambda root: (root / "episode_0.npy").write_bytes((root / "episode_0.npy").read_bytes()[:-4]), "episode_0"),
        (lambda root: np.save(root / "episode_0.npy", np.array([["a"] * 4] * 3)), "expected numbers"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    root = filled(tmp_path / "teacher", as_npy)
    spoil(root)
    with pytest.raises(DataError, match=said):
        paired(root)


def test_a_zarr_array_with_a_missing_chunk_is_refused(tmp_path: Path) -> None:
    root = filled(tmp_path / "teacher", as_zarr)
    (root / "episode_000000.zarr" / "per_frame_features" / "1.0").unlink()
    with pytest.raises(SourceError, match=r"1\.0 is missing"):
        paired(root)


def test_folders_without_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        open_teacher(tmp_path / "nothing")
    with pytest.raises(SourceError, match="neither per_frame_features nor"):
        open_teacher(tmp_path)
    (tmp_path / "episode_0").mkdir()
    np.save(tmp_path / "episode_0" / "first.npy", np.ones(3))
    with pytest.raises(SourceError, match="names no frame"):
        open_teacher(tmp_path)


def test_a_teachers_digest_is_of_its_bytes(tmp_path: Path) -> None:
    for write in (as_npy, as_zarr):
        root = filled(tmp_path / write.__name__, write)
        before = open_teacher(root).digest()
        assert open_teacher(root).digest() == before
        file = next(
            path for path in sorted(root.rglob("*")) if path.is_file() and path.name in ("0.0", "episode_0.npy")
        )
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert open_teacher(root).digest() != before
