"""Small heads ready to train, on one toy data set: find the bright cell of a grid and move to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.heads.batch import Batch, FeatureIO, HeadIO, TextIO
from vla.heads.checkpoint import Artefact, StoreRecord, TrainedHead, build_head
from vla.heads.data import DataConfig
from vla.heads.encoded import projections
from vla.heads.encoders import ObservationEncoder
from vla.heads.model import HeadModel
from vla.heads.normalize import ChannelScaler
from vla.heads.registry import head_class
from vla.heads.texts import TextRows
from vla.stores.manifest import FeatureInfo

GRID = (2, 4, 4, 3)
FEATURES: dict[str, dict[str, FeatureIO]] = {
    **{
        head: {
            "siglip": FeatureIO(shape=(2, 16, 64), dims=("token", "channel")),
            "ray": FeatureIO(shape=(2, 4, 4, 6), dims=("y", "x", "channel")),
        }
        for head in ("pi0", "pi05")
    },
    "spatial": {
        "spatial": FeatureIO(shape=(2, 16, 3), dims=("token", "channel"), masked=True),
        "spatial_xyz": FeatureIO(shape=(2, 16, 3), dims=("token", "channel")),
    },
    "track": {
        "coarse": FeatureIO(shape=(2, 4, 8), dims=("token", "channel")),
        "fine": FeatureIO(shape=(2, 16, 8), dims=("token", "channel")),
    },
}
"""What the toy data set shows to heads that need features of their own, by head; all others see `grid`. Features have
16 cells or tokens in their last-but-one axes, or a divisor of it."""

LABELS: dict[str, tuple[dict[str, str], ...]] = {
    "hier": (
        {"high_level_task": "reach it", "subtask": "go there"},
        {"high_level_task": "clear the table", "subtask": "go away"},
    )
}
"""What else the toy data set says of its two instructions, to heads that read it."""
TEXTS = {"track": TextIO(length=6, width=16)}
"""The text store beside the toy data set, for heads that read one."""
PLACED = ("siglip", "ray", "coarse", "fine")
"""Features whose tokens also tell where in the picture they are, as SigLIP's position embeddings and DA3's rays do."""

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 64, "layers": 2},
    "fm-mlp": {"net": "mlp", "width": 96, "layers": 2},
    "fm-expert": {"net": "expert", "width": 32, "layers": 2, "heads": 4},
    "hier-joint": {"mode": "joint", "width": 32, "layers": 2, "max_subtask": 6, "encoder": {"dim": 32, "queries": 4}},
    "hier-expert": {"mode": "expert", "width": 32, "layers": 2, "encoder": {"dim": 32, "queries": 4}},
    "dp-mlp": {"net": "mlp", "hidden": 96, "layers": 2},
    "pi0-rgb": {"weights": "random"},
    "pi0-rays": {"weights": "random", "use_geom_prefix": True, "geom_target_hw": [4, 4]},
    "pi05-rays": {"weights": "random", "use_geom_prefix": True, "geom_target_hw": [4, 4]},
    "dp-unet": {"net": "unet", "down_dims": [16, 32], "diffusion_step_embed_dim": 32},
    "spatial-net": {"width": 32, "layers": 2, "heads": 4},
    "track-light": {"n_obs": 3, "width": 96, "token_width": 16, "beta": 1.0},
    "track-llm": {"variant": "llm", "n_obs": 3, "llm_weights": "random", "max_time": 3, "beta": 1.0},
}
"""Every head with every net, at sizes that train in a second. The name is "head-net"."""


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def io_of(head: str) -> HeadIO:
    """What the toy data set is for a head: its features, a state of 3, an action of 2, two instructions."""
    return HeadIO(
        action_dim=2,
        action_names=("x", "y"),
        state_dim=3,
        state_names=("a", "b", "c"),
        features=FEATURES.get(head, {"grid": FeatureIO(shape=GRID, dims=("y", "x", "channel"))}),
        tasks=("go there", "go away"),
        labels=LABELS.get(head, ()),
        text=TEXTS.get(head),
    )


def text_rows(io: HeadIO) -> TextRows:
    """Rows of a text store for the instructions of `io`: 2 tokens, 3 tokens, …, padded on the store's side."""
    assert io.text is not None
    L, K = io.text.length, len(io.tasks)
    count = torch.arange(K)[:, None] % (L - 1) + 2
    mask = torch.arange(L).expand(K, L) < count
    ids = (torch.arange(L) + 7 * torch.arange(1, K + 1)[:, None]) % 250 * mask
    embedding = torch.randn(K, L, io.text.width, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    rows = TextRows(ids, mask, embedding)
    return rows if io.text.side == "right" else TextRows(ids.flip(1), mask.flip(1), embedding.flip(1))


@pytest.fixture(scope="session")
def toy_io() -> HeadIO:
    """Two views of a 4 x 4 grid of 3 channels, a state of 3, an action of 2, two instructions."""
    return io_of("mlp")


def _show(
    cell: np.ndarray[Any, Any], frames: int, feature: FeatureIO, rng: np.random.Generator, *, places: bool = False
) -> torch.Tensor:
    """Light up a cell [B] in view 0 of a feature [B, frames, V, *layout, C], of 16 cells or of a divisor of it.

    `places`: every cell also tells where it is.
    """
    count, cells = len(cell), math.prod(feature.layout)
    values = rng.normal(0, 0.1, (count, frames, *feature.shape)).astype(np.float32)
    flat = values.reshape(count, frames, feature.views, cells, feature.channels)
    # In half of many channels: where all are the same, a LayerNorm over them sees nothing.
    flat[np.arange(count), :, 0, cell * cells // 16, : feature.channels // 2 if feature.channels > 3 else None] += 3.0
    if places:
        flat += np.random.default_rng(1).normal(size=(cells, feature.channels)).astype(np.float32)
    return torch.from_numpy(values).half()


def _places(count: int, frames: int, feature: FeatureIO) -> torch.Tensor:
    """Where each of 16 tokens of a view is: on the grid of the targets, in metres [count, frames, V, 16, 3]."""
    token = torch.arange(16)
    xyz = torch.stack([token % 4 / 1.5 - 1, token // 4 / 1.5 - 1, torch.ones(16)], dim=1)
    return xyz.expand(count, frames, feature.views, 16, 3).clone()


@pytest.fixture(scope="session")
def toy_batch() -> Callable[..., Batch]:
    """`toy_batch(model or (n_obs, horizon, offset), count, seed)`.

    View 0 shows where to go, view 1 noise; the second instruction turns the direction round; the state is noise.
    """

    def make(model: HeadModel, count: int = 8, seed: int = 0) -> Batch:
        window = model.config.window
        N, H = window.n_obs, window.horizon
        rng = np.random.default_rng(seed)
        cell = rng.integers(0, 16, count)
        features = {
            name: _places(count, frames, model.io.features[name])
            if name.endswith("_xyz")
            else _show(cell, frames, model.io.features[name], rng, places=name in PLACED)
            for name, frames in model.reads.items()
        }
        target = np.stack([cell % 4, cell // 4], axis=1) / 3 * 2 - 1
        task = rng.integers(0, 2, count)
        direction = target * np.where(task, -1.0, 1.0)[:, None]
        steps = np.arange(1, H + 1) / H
        return Batch(
            features=features,
            state=torch.from_numpy(rng.normal(size=(count, N, 3)).astype(np.float32)),
            task=torch.from_numpy(task),
            obs_valid=torch.ones(count, N, dtype=torch.bool),
            action=torch.from_numpy((5 + 10 * direction[:, None] * steps[:, None]).astype(np.float32)),
            action_valid=torch.ones(count, H, dtype=torch.bool),
            label=torch.from_numpy(task) if model.io.labels else None,
            feature_valid={
                name: torch.ones(values.shape[:-1], dtype=torch.bool)
                for name, values in features.items()
                if model.io.features[name].masked
            },
        )

    return make


@pytest.fixture(scope="session")
def toy_head(toy_batch: Callable[..., Batch]) -> Callable[..., HeadModel]:
    """`toy_head("dp-unet", encoder={...}, **settings)`: a small head with every statistic fitted. Seeded."""

    def make(
        name: str,
        *,
        encoder: dict[str, Any] | None = None,
        io: HeadIO | None = None,
        fitted: bool = True,
        **settings: Any,
    ) -> HeadModel:
        torch.manual_seed(0)
        head = name.partition("-")[0]
        small = {"dim": 64, "components": 48, "queries": 4, "noise": 0.0}
        encoded = "encoder" in head_class(head).Config.model_fields
        reading = {"encoder": {**small, **SMALL[name].get("encoder", {}), **(encoder or {})}} if encoded else {}
        values = {"horizon": 4, "n_action": 2, **SMALL[name], **reading, **settings}
        io = io or io_of(head)
        model = build_head(head, values, io)
        if not fitted:
            return model
        sample = toy_batch(model, 256, seed=99)
        assert sample.action is not None
        assert sample.state is not None
        actions, states = sample.action.flatten(0, 1).numpy(), sample.state.flatten(0, 1).numpy()
        model.fit_normalisers(np.resize(actions, (len(actions), io.action_dim)), states[:, : io.state_dim])
        if io.text is not None:
            model.fit_texts(text_rows(io))  # type: ignore[operator]
        for scaler in (module for module in model.modules() if isinstance(module, ChannelScaler)):
            scaler.fit(np.full(len(scaler.mean), 0.1), np.full(len(scaler.mean), 0.6))
        for seen in (module for module in model.modules() if isinstance(module, ObservationEncoder)):
            for reader in projections(seen).values():
                reader.projection.fit([reader.scaler(sample.features["grid"][:, 0]).flatten(1, -2)])
        return model

    return make


@pytest.fixture(scope="session")
def awake_head(toy_head: Callable[..., HeadModel]) -> Callable[..., HeadModel]:
    """`toy_head` with every weight drawn at random: last layers start at zero, and would hide all that is before."""

    def make(name: str, **settings: Any) -> HeadModel:
        model = toy_head(name, **settings).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def as_trained() -> Callable[[HeadModel, str], TrainedHead]:
    """`as_trained(model, head name)`: what `load_head` returns, of a head that was never saved."""

    def make(model: HeadModel, head: str) -> TrainedHead:
        features = {
            # Places in the room are kept in float32, all else as features usually are.
            name: FeatureInfo(
                shape=io.shape, dims=("view", *io.dims), dtype="float32" if name.endswith("_xyz") else "float16"
            )
            for name, io in model.io.features.items()
        }
        store = StoreRecord(
            path="store",
            sha256="0",
            fingerprint={},
            recipe={},
            features=features,
            cameras=("top",),
            random_weights=True,
        )
        artefact = Artefact(
            head=head,
            config=model.config.model_dump(mode="json"),
            data=DataConfig(stores=("store",)),
            io=model.io,
            state=("state",),
            stores=(store,),
            training_episodes=1,
            vla_version="0",
        )
        return TrainedHead(model.eval(), artefact, 1, Path("run"))

    return make


def _rows_of(batch: Batch, rows: torch.Tensor) -> Batch:
    """The windows of these numbers, each as often as it is named."""

    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    return Batch(
        features={name: value[rows] for name, value in batch.features.items()},
        state=pick(batch.state),
        task=batch.task[rows],
        obs_valid=batch.obs_valid[rows],
        action=pick(batch.action),
        action_valid=pick(batch.action_valid),
        label=pick(batch.label),
        action_dims=pick(batch.action_dims),
        feature_valid={name: value[rows] for name, value in batch.feature_valid.items()},
    )


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Batch, torch.Tensor], Batch]:
    """`rows_of(batch, rows int64)`: the windows of these numbers, each as often as it is named."""
    return _rows_of


@pytest.fixture(params=list(SMALL))
def every(request: pytest.FixtureRequest) -> str:
    """Each "head-net" in turn."""
    name: str = request.param
    return name


@pytest.fixture(params=[name for name in SMALL if name != "hier-joint"])
def every_told(request: pytest.FixtureRequest) -> str:
    """Each "head-net" in turn whose actions depend on the instruction directly, not by what it says of it."""
    name: str = request.param
    return name
