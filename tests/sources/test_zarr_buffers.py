"""Replay buffers in zarr v3, and in v2 with checksums, arrays of one number a row, and chunks that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from zarr import codecs

from vla.featurize.caches.replay_buffer import ReplayBufferCache
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.replay_buffer import ReplayBufferSource
from vla.stores.errors import PointerError, SourceError

ACTION = np.arange(24, dtype=np.float32).reshape(12, 2) + 1
PIXELS = np.arange(12 * 4 * 5 * 3).reshape(12, 4, 5, 3).astype(np.uint8) | 1
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def write_buffer(root: Path, form: int = 3, action: Any = ACTION, **how: Any) -> Path:
    """Write a replay buffer of two episodes; `how` goes to zarr for the array of actions."""
    group = zarr.open_group(root, mode="w", zarr_format=form)  # type: ignore[arg-type]
    group.create_array("data/img", data=PIXELS, chunks=(5, 4, 5, 3))
    group.create_array("meta/episode_ends", data=np.array([5, 12]))
    options = {"dtype": action.dtype, "chunks": (5, *action.shape[1:])} | how
    group.create_array("data/action", shape=action.shape, **options)[:] = action
    return root


V3: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "big-endian": {"dtype": ">f4"},
    "doubles": {"dtype": "<f8"},
    "gzip": {"compressors": codecs.GzipCodec()},
    "blosc": {"compressors": codecs.BloscCodec(cname="lz4")},
    "no compressor": {"compressors": None},
    "a checksum": {"compressors": [codecs.ZstdCodec(), codecs.Crc32cCodec()]},
    "a transposition": {"filters": [codecs.TransposeCodec(order=(1, 0))]},
    "shards": {"shards": (10, 2)},
    "names of v2": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "names with dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
}


@pytest.mark.parametrize("how", V3)
def test_a_zarr_v3_buffer_is_read_however_it_is_encoded(how: str, tmp_path: Path) -> None:
    source = open_source(write_buffer(tmp_path / "a.zarr", **V3[how]), fps=10)
    for episode, rows in enumerate((slice(0, 5), slice(5, 12))):
        np.testing.assert_array_equal(source.steps(episode)["action"], ACTION[rows])
        shown = np.stack([images[0] for images in source.frames(episode, 0, rows.stop - rows.start)])
        np.testing.assert_array_equal(shown, PIXELS[rows])
    assert len(source.digest()) == 64


def test_features_of_a_zarr_v3_buffer_are_imported(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr")
    feature = np.arange(48, dtype=np.float16).reshape(12, 4)
    zarr.open_group(root, mode="a").create_array("data/grid", data=feature)
    cache = ReplayBufferCache(root, features={"grid": "grid"})
    assert [episode.length for episode in cache.index().episodes] == [5, 7]
    np.testing.assert_array_equal(cache.features(1, 0, 7)["grid"], feature[5:, None])


def test_a_chunk_of_a_zarr_v3_buffer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", fill_value=0.5)
    (root / "data/action/c/1/0").unlink()
    with pytest.raises(SourceError, match=r"c/1/0.*empty_chunks=fill"):
        ReplayBufferSource(root, fps=10).index()
    filled = ReplayBufferSource(root, fps=10, empty_chunks="fill").steps(1)["action"]
    np.testing.assert_array_equal(filled, [*np.full((5, 2), 0.5), *ACTION[10:]])


def test_a_chunk_that_a_shard_does_not_hold_is_refused(tmp_path: Path) -> None:
    zeros = ACTION.copy()
    zeros[5:10] = 0  # zarr leaves out a chunk that holds the fill value alone
    root = write_buffer(tmp_path / "a.zarr", action=zeros, shards=(10, 2))
    with pytest.raises(SourceError, match=r"c/0/0.*empty_chunks=fill"):
        ReplayBufferSource(root, fps=10).index()
    np.testing.assert_array_equal(ReplayBufferSource(root, fps=10, empty_chunks="fill").steps(1)["action"], zeros[5:])


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", shards=(10, 2))
    file = root / "data/action/c/1/0"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SourceError):
        ReplayBufferSource(root, fps=10).index()


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 8}}},
        {"codecs": [{"name": "vlen-bytes"}]},
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"chunk_grid": {"name": "rectangular", "configuration": {}}},
        {"storage_transformers": [{"name": "x"}]},
        {"codecs": []},
        {"shape": "many"},
    ],
)
def test_zarr_v3_metadata_of_anything_but_numbers_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr")
    file = root / "data/action/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SourceError, match=r"action/zarr\.json"):
        ReplayBufferSource(root, fps=10).index()


@pytest.mark.parametrize("name", ["CRC32", "Adler32", "Fletcher32", "JenkinsLookup3"])
def test_filters_that_add_a_checksum_are_read(name: str, tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", 2, filters=[getattr(numcodecs, name)()])
    np.testing.assert_array_equal(ReplayBufferSource(root, fps=10).steps(1)["action"], ACTION[5:])


@pytest.mark.parametrize("form", [2, 3])
def test_an_array_of_one_number_a_row_is_a_vector_of_one(form: int, tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", form, action=ACTION[:, 0])
    source = ReplayBufferSource(root, fps=10)
    assert source.index().steps["action"].shape == (1,)
    np.testing.assert_array_equal(source.steps(1)["action"], ACTION[5:, :1])
    zarr.open_group(root, mode="a").create_array("data/grid", data=ACTION)
    cache = ReplayBufferCache(root, features={"grid": "grid"})
    assert cache.index().steps["action"].shape == (1,)
    np.testing.assert_array_equal(cache.steps(1)["action"], ACTION[5:, :1])


@pytest.mark.parametrize("form", [2, 3])
def test_ends_of_episodes_that_are_not_there_are_named_as_such(form: int, tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", form)
    chunk = root / "meta/episode_ends" / ("0" if form == 2 else "c/0")
    chunk.write_text(POINTER)
    with pytest.raises(PointerError):
        ReplayBufferSource(root, fps=10).index()
    chunk.unlink()
    with pytest.raises(SourceError, match="missing"):
        ReplayBufferSource(root, fps=10).index()


def test_metadata_that_claim_more_chunks_than_there_are_are_refused_at_once(tmp_path: Path) -> None:
    root = write_buffer(tmp_path / "a.zarr", 2)
    for name in ("action", "img"):
        file = root / f"data/{name}/.zarray"
        found = json.loads(file.read_text())
        file.write_text(
            json.dumps(found | {"shape": [10**12, *found["shape"][1:]], "chunks": [1, *found["chunks"][1:]]})
        )
    zarr.open_array(root / "meta/episode_ends", mode="r+")[:] = [5, 10**12]
    for choice in ("refuse", "fill"):
        with pytest.raises(SourceError, match="zarray"):
            open_source(root, fps=10, empty_chunks=choice).index()


@pytest.mark.parametrize("what", ["data/action", "data/action/zarr.json", "data/action/c", "data/action/c/0/0"])
def test_a_link_out_of_an_array_is_refused(what: str, tmp_path: Path) -> None:
    root, elsewhere = write_buffer(tmp_path / "a.zarr"), tmp_path / "elsewhere"
    (root / what).rename(elsewhere)
    (root / what).symlink_to(elsewhere)
    with pytest.raises(SourceError, match="leads out"):
        ReplayBufferSource(root, fps=10).index()
