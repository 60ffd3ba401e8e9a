"""Caches as others write them: other encodings of the same numbers, files beside them, pointers in their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from vla.featurize.caches.arrays import ArraysCache
from vla.featurize.caches.opentrackvla import OpenTrackVLACache
from vla.featurize.caches.rgb2pc_windows import WindowsCache
from vla.stores.errors import PointerError, SourceError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
EPISODE = "seed_1/SCENE/0"


def samples(separator: str = "\n", head: str = "") -> str:
    lines = [
        json.dumps({"current": f"frame_{n:05d}.jpg", "instruction": "go", "actions": [[n, 2, 3]]}) for n in (1, 2, 3)
    ]
    return head + separator.join(lines) + separator


def write_tokens(root: Path, dtype: torch.dtype = torch.float16, text: str | None = None) -> Path:
    folder = root / "vision_cache/frames" / EPISODE
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        for name, tokens in {"fine": 64, "coarse": 4}.items():
            torch.save(torch.full((tokens, 1536), 1.5).to(dtype), folder / f"frame_{number:05d}_v{name}.pt")
    jsonl = root / "jsonl" / f"{EPISODE}.jsonl"
    jsonl.parent.mkdir(parents=True)
    jsonl.write_text(samples() if text is None else text)
    return root


def test_tokens_in_bfloat16_are_read(tmp_path: Path) -> None:
    cache = OpenTrackVLACache(write_tokens(tmp_path, torch.bfloat16))
    assert cache.index().features["fine"].dtype == "float16"
    np.testing.assert_array_equal(cache.features(0, 0, 3)["coarse"], np.full((3, 1, 4, 1536), 1.5, np.float16))


@pytest.mark.parametrize(("separator", "head"), [("\n\n", ""), ("\r\n", ""), ("\n", "\ufeff")])
def test_samples_may_be_written_as_other_editors_do(separator: str, head: str, tmp_path: Path) -> None:
    cache = OpenTrackVLACache(write_tokens(tmp_path, text=samples(separator, head)))
    assert cache.index().episodes[0].task == "go"
    np.testing.assert_array_equal(cache.steps(0)["action"][:, 0], [1, 2, 3])


def test_samples_that_are_a_pointer_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(PointerError):
        OpenTrackVLACache(write_tokens(tmp_path, text=POINTER), skip_bad=True).index()


def test_a_cache_of_bad_episodes_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="jsonl"):
        OpenTrackVLACache(write_tokens(tmp_path, text="{}"), skip_bad=True).index()


def test_samples_of_an_episode_without_tokens_are_named(tmp_path: Path) -> None:
    root = write_tokens(tmp_path)
    (root / "jsonl/seed_1/SCENE/7.jsonl").write_text(samples())
    with pytest.raises(SourceError, match="SCENE/7"):
        OpenTrackVLACache(root).index()
    assert list(OpenTrackVLACache(root, skip_bad=True).index().skipped) == ["seed_1/SCENE/7"]


def write_windows(root: Path, **how: Any) -> Path:
    folder = root / "task/episode_0.zarr"
    folder.mkdir(parents=True)
    windows = np.stack([np.arange(first, first + 4) for first in (0, 2, 4)])
    array = zarr.create_array(
        folder / "per_frame_features", shape=(3, 4, 2, 2, 3), chunks=(1, 4, 2, 2, 3), **({"zarr_format": 2} | how)
    )
    array[:] = np.broadcast_to(windows[:, :, None, None, None] + 1, array.shape)
    (folder / "meta.json").write_text(json.dumps({"num_frames": 8, "stride": 2}))
    (folder / "frame_paths.json").write_text(
        json.dumps([[f"{frame}.png" for frame in row] for row in windows.tolist()])
    )
    return root


@pytest.mark.parametrize("how", [{"dtype": ">f2"}, {"dtype": "<f2", "zarr_format": 3}, {"dtype": ">f4"}])
def test_windows_are_read_however_they_are_encoded(how: dict[str, Any], tmp_path: Path) -> None:
    cache = WindowsCache(write_windows(tmp_path, **how))
    assert [episode.length for episode in cache.index().episodes] == [8]
    np.testing.assert_array_equal(cache.features(0, 0, 8)["grid"][:, 0, 0, 0, 0], np.arange(1, 9))


@pytest.mark.parametrize("name", ["meta.json", "frame_paths.json"])
def test_descriptions_of_windows_that_are_a_pointer_are_one_error(name: str, tmp_path: Path) -> None:
    (write_windows(tmp_path, dtype="<f2") / "task/episode_0.zarr" / name).write_text(POINTER)
    with pytest.raises(PointerError):
        WindowsCache(tmp_path, skip_bad=True).index()


def test_tensors_in_bfloat16_are_read_exactly(tmp_path: Path) -> None:
    values = torch.linspace(-300, 300, 20).reshape(5, 4).to(torch.bfloat16)
    save_file({"grid": values, "action": torch.ones(5, 2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    cache = ArraysCache(tmp_path)
    assert cache.index().features["grid"].dtype == "float32"
    np.testing.assert_array_equal(cache.features(0, 1, 5)["grid"][:, 0], values[1:].float().numpy())
    np.testing.assert_array_equal(cache.steps(0)["action"], np.ones((5, 2)))


def test_an_action_of_one_number_is_a_vector_of_one(tmp_path: Path) -> None:
    save_file({"grid": torch.ones(5, 4), "action": torch.arange(5)}, tmp_path / "a.safetensors")
    cache = ArraysCache(tmp_path)
    np.testing.assert_array_equal(cache.steps(0)["action"], np.arange(5)[:, None])
    assert cache.index().steps["action"].shape == (1,)


READS: dict[str, Callable[[Path], Any]] = {
    "features": lambda path: ArraysCache(path).features(0, 0, 5),
    "steps": lambda path: ArraysCache(path).steps(0),
}


@pytest.mark.parametrize("read", READS)
def test_a_cache_may_be_read_without_asking_for_its_index_first(read: str, tmp_path: Path) -> None:
    save_file({"grid": torch.ones(5, 4), "action": torch.ones(5, 2)}, tmp_path / "a.safetensors")
    assert set(READS[read](tmp_path)) == {"grid" if read == "features" else "action"}
