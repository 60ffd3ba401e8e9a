"""Small caches in the exact layouts of the projects they come from, beside the arrays that went into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save_file

LENGTHS = (5, 9, 6)


@dataclass(frozen=True)
class MadeCache:
    """What `vla import` is told, and what it should make: rows of all episodes, end to end."""

    settings: dict[str, Any]
    features: dict[str, NDArray[Any]]
    action: NDArray[Any] | None


def _random(*shape: int, seed: int = 0, dtype: str = "float16") -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _write(group: zarr.Group, name: str, values: NDArray[Any], chunks: tuple[int, ...]) -> None:
    codec = numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE)
    group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codec)[:] = values


def opentrackvla(root: Path) -> MadeCache:
    fine, coarse, action = [], [], []
    for number, length in enumerate(LENGTHS):
        name = f"seed_100/scene/{number}"
        folder = root / "vision_cache" / "frames" / name
        folder.mkdir(parents=True)
        fine.append(_random(length, 64, 1536, seed=number))
        coarse.append(_random(length, 4, 1536, seed=number + 10))
        action.append(_random(length + 8, 3, seed=number + 20, dtype="float32"))
        for t in range(length):
            torch.save(torch.from_numpy(fine[-1][t]), folder / f"frame_{t + 1:05d}_vfine.pt")
            torch.save(torch.from_numpy(coarse[-1][t]), folder / f"frame_{t + 1:05d}_vcoarse.pt")
        paths = [f"frames/{name}/frame_{t + 1:05d}.jpg" for t in range(length)]
        lines = [
            {
                "images": paths[max(0, t - 31) : t],
                "current": paths[t],
                "instruction": f"follow {number}",
                "actions": action[-1][t : t + 9].tolist(),
            }
            for t in range(length)
        ]
        jsonl = root / "jsonl" / f"{name}.jsonl"
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        jsonl.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = {"fine": np.concatenate(fine)[:, None], "coarse": np.concatenate(coarse)[:, None]}
    actions = np.concatenate([a[:n] for a, n in zip(action, LENGTHS, strict=True)])
    return MadeCache({"kind": "opentrackvla", "path": root}, made, actions)


def rgb2pc_windows(root: Path) -> MadeCache:
    grids = [_random(length + 8, 2, 3, 4, seed=number) for number, length in enumerate(LENGTHS)]
    for number, grid in enumerate(grids):
        folder = root / f"episode_{number}.zarr"
        windows = np.stack([grid[w : w + 8] for w in range(len(grid) - 7)])
        group = zarr.open_group(folder, mode="w", zarr_format=2)
        array = group.create_array(
            "per_frame_features", shape=windows.shape, dtype="f2", chunks=(1, *windows.shape[1:])
        )
        array[:] = windows
        paths = [[f"RGB/task/episode/step_{w + t:04d}.png" for t in range(8)] for w in range(len(windows))]
        (folder / "frame_paths.json").write_text(json.dumps(paths))
        (folder / "meta.json").write_text(json.dumps({"num_frames": len(grid), "window_size": 8, "stride": 1}))
    source = {"length": [13, 17], "episodes": 3, "seed": 5}
    settings = {"kind": "rgb2pc-windows", "path": root, "match": "order", "source": "synthetic"}
    return MadeCache(settings | {"source_options": source}, {"grid": np.concatenate(grids)[:, None]}, None)


def replay_buffer(root: Path) -> MadeCache:
    values, action = _random(20, 3, 4, dtype="float32"), _random(20, 2, seed=1, dtype="float32")
    group = zarr.open_group(root, mode="w", zarr_format=2)
    for name, array, chunks in (("data/img", values, (7, 3, 4)), ("data/action", action, (20, 2))):
        _write(group, name, array, chunks)
    _write(group, "meta/episode_ends", np.cumsum(LENGTHS), (3,))
    settings = {"kind": "replay-buffer", "path": root, "fps": 10, "options": {"features": {"picture": "img"}}}
    return MadeCache(settings, {"picture": values[:, None]}, action)


def robomimic(root: Path) -> MadeCache:
    root.mkdir(parents=True, exist_ok=True)
    values, action = _random(20, 2, 6, dtype="float32"), _random(20, 7, seed=1, dtype="float64")
    with h5py.File(root / "demo.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for number, stop in enumerate(np.cumsum(LENGTHS)):
            rows = slice(stop - LENGTHS[number], stop)
            file[f"data/demo_{number + 8}/obs/embedding"] = values[rows]
            file[f"data/demo_{number + 8}/obs/eef"] = action[rows, :3]
            file[f"data/demo_{number + 8}/actions"] = action[rows]
    options = {"features": {"embedding": "embedding"}, "state": ["eef"], "has_views": True, "cameras": ["a", "b"]}
    settings = {"kind": "robomimic", "path": root / "demo.hdf5", "options": options}
    return MadeCache(settings, {"embedding": values}, action)


def arrays(root: Path) -> MadeCache:
    root.mkdir(parents=True, exist_ok=True)
    values, action = _random(20, 5, 8), _random(20, 2, seed=1, dtype="float32")
    for number, stop in enumerate(np.cumsum(LENGTHS)):
        rows = slice(stop - LENGTHS[number], stop)
        tensors = {"tokens": values[rows].copy(), "action": action[rows].copy()}
        save_file(tensors, root / f"episode_{number + 8}.safetensors")
    return MadeCache({"kind": "arrays", "path": root, "fps": 10}, {"tokens": values[:, None]}, action)


MAKERS = {
    "opentrackvla": opentrackvla,
    "rgb2pc-windows": rgb2pc_windows,
    "replay-buffer": replay_buffer,
    "robomimic": robomimic,
    "arrays": arrays,
}


@pytest.fixture
def make_cache(memory_path: Path) -> Callable[[str], MadeCache]:
    """`make_cache(kind)` writes a cache of three episodes."""
    return lambda kind: _with_source(MAKERS[kind](memory_path / "cache"))


def _with_source(cache: MadeCache) -> MadeCache:
    """Give the windows' partner the lengths that the cache has: one synthetic source has them by its seed."""
    if "source" not in cache.settings:
        return cache
    from vla.featurize.sources.registry import open_source

    wanted = [length + 8 for length in LENGTHS]
    for seed in range(5000):
        options = {"length": [13, 17], "episodes": 3, "seed": seed}
        if [e.length for e in open_source("synthetic", **options).index().episodes] == wanted:
            return MadeCache(cache.settings | {"source_options": options}, cache.features, None)
    raise AssertionError("no seed gives these lengths")
