"""OpenTrackVLA's `vision_cache`: two .pt files a frame, beside the jsonl files that hold the actions.

    ROOT/vision_cache/frames/EPISODE/frame_00001_vfine.pt     [64, 1536] tensor
    ROOT/vision_cache/frames/EPISODE/frame_00001_vcoarse.pt   [4, 1536] tensor
    ROOT/jsonl/EPISODE.jsonl    one sample a line: `current` (the frame), `actions` [K][3] from it on, `instruction`

EPISODE is a path such as `seed_100/SCENE/4`. An action is the base velocity (vx, vy, wz) of one frame, 10 a second.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import FeatureSpec
from vla.featurize.caches.base import CacheIndex
from vla.featurize.caches.checks import SKIP, as_feature, digest_files, natural
from vla.featurize.sources.base import Episode, StepSpec
from vla.featurize.sources.trackvla_samples import iterate_samples
from vla.stores.errors import SourceError
from vla.stores.pointers import refuse_pointer

FPS = 10.0
"""make_tracking_data.py integrates with dt = 0.1 s."""

CHANNELS = 1536
TOKENS = {"fine": 64, "coarse": 4}
MAX_OVERHEAD = 1 << 16
"""Bytes of a .pt beyond its float32 tensor: the zip container takes about 1 KiB; more is not what it says."""


class OpenTrackVLACache:
    """Features `fine` [1, 64, 1536] and `coarse` [1, 4, 1536] float16, actions [3] where the jsonl files are there.

    `path` is `vision_cache` or the folder that holds it. An action that two samples state must be the same in both.
    """

    def __init__(self, path: Path, *, camera: str = "rgb", skip_bad: bool = False) -> None:
        root = path / "vision_cache" if (path / "vision_cache").is_dir() else path
        self._root, self._camera, self._skip_bad = root.resolve().parent, camera, skip_bad
        self._cache = root.resolve()
        self._stems: list[tuple[Path, list[str]]] = []
        self._jsonl: list[Path | None] = []
        self._index: CacheIndex | None = None

    def settings(self) -> dict[str, Any]:
        """See `Cache.settings`."""
        return {"camera": self._camera}

    def index(self) -> CacheIndex:
        """See `Cache.index`. Frames are numbered without a gap, and each has both files."""
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def digest(self) -> str:
        """See `Cache.digest`."""
        self.index()
        files = [folder / f"{stem}_v{name}.pt" for folder, stems in self._stems for stem in stems for name in TOKENS]
        files += [path for path in self._jsonl if path is not None]
        return digest_files(self._root, [path.relative_to(self._root).as_posix() for path in files])

    def features(self, episode: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """See `Cache.features`."""
        folder, stems = self._stems[episode]
        specs = self.index().features
        made = {name: np.empty((stop - start, 1, tokens, CHANNELS), np.float16) for name, tokens in TOKENS.items()}
        for at, stem in enumerate(stems[start:stop]):
            for name, tokens in TOKENS.items():
                path = folder / f"{stem}_v{name}.pt"
                values = _load(path, (tokens, CHANNELS))[None]
                made[name][at] = as_feature(values, specs[name], False, str(path), start + at)[0]
        return made

    def steps(self, episode: int) -> dict[str, NDArray[Any]]:
        """See `Cache.steps`."""
        path, (_, stems) = self._jsonl[episode], self._stems[episode]
        return {} if path is None else {"action": _actions(path, stems, self.index().episodes[episode].task)}

    def _read_index(self) -> CacheIndex:
        folders = {path.parent for path in self._cache.rglob("*_v*.pt")}
        if not folders:
            raise SourceError(f"{self._cache} holds no *_vfine.pt", expected="frames/EPISODE/frame_00001_vfine.pt")
        names = {self._name(folder): folder for folder in folders}
        with_actions = (self._root / "jsonl").is_dir()
        episodes, skipped = [], {}
        for name in sorted(names, key=natural):
            try:
                stems = _frames(names[name])
                jsonl = self._root / "jsonl" / f"{name}.jsonl" if with_actions else None
                task = _first(jsonl) if jsonl is not None else ""
            except SourceError as error:
                if not self._skip_bad:
                    raise
                skipped[name] = str(error)
                continue
            episodes.append(Episode(name, len(stems), task))
            self._stems.append((names[name], stems))
            self._jsonl.append(jsonl)
        for name in self._without_tokens(names) if with_actions else ():
            missing = f"{self._root / 'jsonl'} names {name}, which {self._cache} has no tokens of"
            if not self._skip_bad:
                raise SourceError(missing, expected="tokens of each episode", fix=SKIP)
            skipped[name] = missing
        if not episodes:
            raise SourceError(f"{self._root} has no sound episode: {next(iter(skipped.values()))}")
        features = {
            name: FeatureSpec((tokens, CHANNELS), (f"{name}_token", "channel")) for name, tokens in TOKENS.items()
        }
        steps = {"action": StepSpec((3,), "float32", "action", ("vx", "vy", "wz"))} if with_actions else {}
        return CacheIndex(FPS, (self._camera,), tuple(episodes), features, steps, skipped)

    def _without_tokens(self, names: Collection[str]) -> list[str]:
        jsonl = self._root / "jsonl"
        listed = [path.relative_to(jsonl).with_suffix("").as_posix() for path in jsonl.rglob("*.jsonl")]
        return sorted((name for name in listed if name not in names), key=natural)

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._cache).as_posix().removeprefix("frames/")


def _frames(folder: Path) -> list[str]:
    """Return the stems of an episode in the order of their numbers, none missing."""
    found = {name: {p.name.removesuffix(f"_v{name}.pt") for p in folder.glob(f"*_v{name}.pt")} for name in TOKENS}
    for stem in sorted(found["fine"] ^ found["coarse"]):
        name = "coarse" if stem in found["fine"] else "fine"
        raise SourceError(f"{folder / f'{stem}_v{name}.pt'} is missing", expected="both files of a frame", fix=SKIP)
    numbers: dict[int, str] = {}
    for stem in sorted(found["fine"]):
        match = re.search(r"(\d{1,9})$", stem)
        if match is None or int(match[1]) in numbers:
            raise SourceError(f"{folder / stem}: no number of a frame of its own", expected="frame_00001", fix=SKIP)
        numbers[int(match[1])] = stem
    order = sorted(numbers)
    for number in range(order[0], order[-1]):
        if number not in numbers:
            raise SourceError(f"{folder} lacks frame {number}", expected=f"{order[0]} to {order[-1]}", fix=SKIP)
    return [numbers[number] for number in order]


def _load(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """Load one tensor and nothing else: no code of a pickle runs."""
    # What torch raises on a truncated zip, a foreign pickle, a damaged pickle, and an unreadable file.
    damage = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, OSError)
    if path.is_file() and path.stat().st_size > 4 * int(np.prod(shape)) + MAX_OVERHEAD:
        raise SourceError(f"{path} has {path.stat().st_size} bytes", expected=f"one tensor {shape}", fix=SKIP)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle that is then refused
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except damage as error:
        refuse_pointer(path)
        reason = type(error).__name__ + (": holds more than tensors" if isinstance(error, damage[1]) else "")
        raise SourceError(f"{path} does not load ({reason})", expected=f"one tensor {shape}", fix=SKIP) from None
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tuple(tensor.shape) != shape:
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise SourceError(f"{path} holds {found}", expected=f"one tensor {shape}", fix=SKIP)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise SourceError(f"{path} holds {tensor.dtype}", expected="float16, bfloat16 or float32", fix=SKIP)
    # numpy has no bfloat16; float32 holds each of its values
    values: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    return values


def _sample(path: Path, number: int, sample: dict[str, Any]) -> tuple[str, NDArray[np.float32], str]:
    """Return (stem of the current frame, actions [K, 3], instruction) of a line."""
    try:
        stem, task = PurePosixPath(str(sample["current"])).stem, str(sample["instruction"])
        actions = np.asarray(sample["actions"], np.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{path}, line {number}: no sample ({type(error).__name__})", fix=SKIP) from None
    if actions.ndim != 2 or actions.shape[1] != 3 or not np.isfinite(actions).all():
        raise SourceError(f"{path}, line {number}: actions {actions.shape}", expected="finite [K, 3]", fix=SKIP)
    return stem, actions, task


def _first(path: Path) -> str:
    """Return the instruction of the first sample."""
    return _sample(path, *next(iterate_samples(path)))[2]


def _actions(path: Path, stems: list[str], task: str) -> NDArray[np.float32]:
    """Return [T, 3] from samples that each state the actions of the K frames from theirs on."""
    places = {stem: frame for frame, stem in enumerate(stems)}
    actions, known = np.zeros((len(stems), 3), np.float32), np.zeros(len(stems), bool)
    for number, sample in iterate_samples(path):
        stem, stated, instruction = _sample(path, number, sample)
        if stem not in places or instruction != task:
            raise SourceError(
                f"{path}, line {number}: {stem!r}, {instruction!r}", expected=f"a frame, {task!r}", fix=SKIP
            )
        first = places[stem]
        stated = stated[: len(stems) - first]
        part = slice(first, first + len(stated))
        if (actions[part] != stated)[known[part]].any():
            raise SourceError(f"{path}, line {number}: other actions than the samples before", fix=SKIP)
        actions[part], known[part] = stated, True
    if not known.all():
        raise SourceError(f"{path} has no action for {stems[int((~known).argmax())]}", expected="one a frame", fix=SKIP)
    return actions
