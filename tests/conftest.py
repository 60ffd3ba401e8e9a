"""Shared by all rooms: one thread per library, no fsync, small stores, and a check that no thread outlives its test."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.stores.interrupt import SIGNALS
from vla.stores.manifest import FeatureInfo, Manifest, StepInfo
from vla.stores.settings import Settings
from vla.stores.store import Store, open_store
from vla.stores.tables import EpisodeTable
from vla.stores.writer import open_writer

# `pytest --hypothesis-profile=long` for the nightly run. The short one is the same on every machine and every day.
settings.register_profile("short", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("long", max_examples=10_000, deadline=None, database=None, print_blob=True)
settings.load_profile("short")


def pytest_configure() -> None:
    """One thread a library, set before torch is imported: test processes share the cores, and waiting threads spin.

    This process never waits for a disk: a store of 21 rows takes 0.1 s, and 0.5 s more of fsync on a virtual disk. What
    is synced, and in which order, `test_filesystem.py` records; processes that tests start do wait.
    """
    for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():
        os.environ.setdefault(name, value)
    os.fsync = _check_descriptor


def _check_descriptor(descriptor: Any) -> None:
    """Raise `OSError` where `os.fsync` would for a descriptor that is closed; do nothing else."""
    os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno())


@dataclass(frozen=True)
class MadeStore:
    """A store on disk beside the arrays that went into it: `features` in the store's dtype, `steps` likewise."""

    root: Path
    manifest: Manifest
    episodes: EpisodeTable
    features: dict[str, NDArray[Any]]
    steps: dict[str, NDArray[Any]]

    def open(self, **options: Any) -> Store:
        return open_store(self.root, **options)


def write_store(
    root: Path,
    *,
    lengths: Sequence[int] = (5, 9, 6),
    ids: Sequence[str] | None = None,
    unit_rows: int = 8,
    features: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    units: Sequence[int] | None = None,
    seed: int = 0,
    source: str = "source-a",
    fingerprint: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    form: Mapping[str, str] | None = None,
    **writer_options: bool,
) -> MadeStore:
    """Write a store of random features, the values of an episode depending on its id and `seed` alone.

    `form` is {"format": "h5", ...} where it is not the zarr form.

    `units`: which units to commit, in this order (all of the pending ones where None).
    """
    names = tuple(ids) if ids is not None else tuple(f"episode-{number}" for number in range(len(lengths)))
    episodes = EpisodeTable.plan(names, list(lengths), [f"task {number % 2}" for number in range(len(lengths))])
    infos = {
        name: FeatureInfo(shape=shape, dims=("view", *(f"{name}_{axis}" for axis in range(1, len(shape)))), dtype=dtype)
        for name, (shape, dtype) in (features or {"grid": ((1, 3, 4), "float16")}).items()
    }
    steps = {
        "action": StepInfo(shape=(2,), dtype="float32", role="action", names=("x", "y")),
        "done": StepInfo(shape=(), dtype="bool", role="other"),
        "clock": StepInfo(shape=(1,), dtype="int64", role="other"),
    }
    manifest = Manifest(
        rows=episodes.rows,
        unit_rows=unit_rows,
        fps=10.0,
        cameras=("front",),
        features=infos,
        steps=steps,
        fingerprint={"source": {"digest": source}, **(fingerprint or {})},
        tables={},
        provenance=dict(provenance or {}),
        **(form or {}),
    )
    values = _values_of(episodes, infos, seed)
    made = _steps_of(episodes)
    with open_writer(root, manifest, episodes, **writer_options) as writer:
        for unit in writer.pending() if units is None else units:
            buffer = writer.begin(unit)
            rows = slice(buffer.rows.start, buffer.rows.stop)
            buffer.put(rows.start, {name: array[rows].astype(np.float32) for name, array in values.items()})
            for name, array in made.items():
                buffer.steps[name][: len(buffer.rows)] = array[rows]
            writer.commit(buffer)
        written = writer.manifest
    return MadeStore(root, written, episodes, values, made)


def _values_of(episodes: EpisodeTable, infos: Mapping[str, FeatureInfo], seed: int) -> dict[str, NDArray[Any]]:
    values = {name: np.zeros((episodes.rows, *info.shape), np.float32) for name, info in infos.items()}
    for name, start, length in zip(episodes.ids, episodes.row_start, episodes.length, strict=True):
        for feature, array in values.items():
            key = int.from_bytes(hashlib.sha256(f"{name}/{feature}/{seed}".encode()).digest()[:8], "little")
            shape = (length, *array.shape[1:])
            drawn = np.random.default_rng(key).normal(size=shape)
            # As numpy stores them where it can: what is read back is then equal, not only near.
            numpy_has_it = infos[feature].dtype in ("float16", "float32")
            array[start : start + length] = drawn.astype(infos[feature].stored) if numpy_has_it else drawn
    return {
        name: array.astype(infos[name].dtype) if infos[name].dtype == "float16" else array
        for name, array in values.items()
    }


def _steps_of(episodes: EpisodeTable) -> dict[str, NDArray[Any]]:
    row = np.arange(episodes.rows)
    return {
        "action": np.stack([row, -row], axis=1).astype(np.float32),
        "done": np.isin(row, episodes.row_start + episodes.length - 1),
        "clock": row[:, None].astype(np.int64) * 1_000_003,
    }


@pytest.fixture(scope="session")
def make_store() -> Callable[..., MadeStore]:
    """`make_store(root, **what)` writes a small store; see `write_store`."""
    return write_store


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """`files_of(root)` returns `{relative path: content}` of every file below a folder."""

    def read(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def lerobot_sets() -> ModuleType:
    """The module `support.lerobot_sets`, imported on first use: most tests need no encoder."""
    return importlib.import_module("support.lerobot_sets")


@pytest.fixture(scope="session")
def write_lerobot(lerobot_sets: ModuleType) -> Callable[..., Path]:
    """`write_lerobot(root, **what)`; see `Plan`."""
    write: Callable[..., Path] = lerobot_sets.write_lerobot
    return write


@pytest.fixture(scope="session")
def write_video(lerobot_sets: ModuleType) -> Callable[..., None]:
    """`write_video(path, pictures, **options)`."""
    write: Callable[..., None] = lerobot_sets.write_video
    return write


@pytest.fixture(scope="session")
def picture(lerobot_sets: ModuleType) -> Callable[[int, int, int], NDArray[np.uint8]]:
    """`picture(episode, frame, camera)`."""
    draw: Callable[[int, int, int], NDArray[np.uint8]] = lerobot_sets.picture
    return draw


@pytest.fixture(scope="session")
def number_of(lerobot_sets: ModuleType) -> Callable[[NDArray[np.uint8]], tuple[int, int, int]]:
    """`number_of(image)` is (episode, frame, camera)."""
    read: Callable[[NDArray[np.uint8]], tuple[int, int, int]] = lerobot_sets.number_of
    return read


@pytest.fixture(scope="session")
def encoded(lerobot_sets: ModuleType) -> Callable[..., bytes]:
    """`encoded(pixels, kind)` is a picture's file."""
    encode: Callable[..., bytes] = lerobot_sets.encoded
    return encode


@pytest.fixture
def edit_info() -> Callable[..., None]:
    """`edit_info(root, key=value)` changes `meta/info.json`; a value None removes the key."""

    def edit(root: Path, **values: Any) -> None:
        file = root / "meta/info.json"
        info = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))

    return edit


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals do in this test, and in the processes it starts, what they do by default: `nohup make test &` hands down
    SIGHUP and SIGINT as ignored, and what is ignored stays ignored in a child."""
    defaults = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """An empty folder in memory where there is such a folder, else on the disk.

    For tests of thousands of small files, and of processes that wait for the disk: fsync costs nothing there. The test
    injects faults, not a power cut.
    """
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="vla-test-", dir=shm if os.access(shm, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2.0  # an abandoned generator is closed when it is collected
    while (alive := [t.name for t in threading.enumerate() if t.name.startswith("vla-")]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not alive, f"threads still running: {alive}"


class ColourSettings(Settings):
    random: bool = False


class Colour:
    """The mean colour of a picture."""

    settings_type: ClassVar[type[Settings]] = ColourSettings

    def __init__(self, settings: ColourSettings) -> None:
        self.settings = settings

    def spec(self) -> BackboneSpec:
        features = {"colour": FeatureSpec((3,), ("channel",), "float32")}
        return BackboneSpec("colour", features, {}, "x", "x", random_weights=self.settings.random)

    def preprocess(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"colour": images.mean(dim=(-1, -2))}

    def to(self, device: torch.device) -> None:
        pass


@pytest.fixture(scope="session")
def colour_backbone() -> type:
    """A backbone whose feature is `colour`, to go beside those of `grid`."""
    return Colour
