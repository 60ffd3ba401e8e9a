"""What backbones are given beyond one picture: past frames, the instruction, what a source knows besides; exact ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.registry import BACKBONES
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.sources.registry import SOURCES, Entry
from vla.featurize.sources.synthetic import SyntheticSource
from vla.heads.train import HeadTrainConfig, train_head
from vla.rollout.envs.base import Observation
from vla.rollout.policy import Policy
from vla.stores.errors import DataError, UsageError
from vla.stores.settings import Settings
from vla.stores.store import open_store

LENGTHS = "synthetic:episodes=3,length=[7,7],cameras=2,image_size=16"


class ProbeSettings(Settings):
    context: int = 0
    inputs: tuple[str, ...] = ("image",)


class Probe:
    """Keeps what it is given: of each frame in its context the mean of each picture, or the number it was told."""

    settings_type: ClassVar[type[Settings]] = ProbeSettings

    def __init__(self, settings: ProbeSettings) -> None:
        self.settings = settings

    def spec(self) -> BackboneSpec:
        context = self.settings.context
        features = {
            "seen": FeatureSpec((context + 1,), ("frame",), "float32"),
            "ids": FeatureSpec((1,), ("n",), "int32"),
        }
        identity = self.settings.model_dump(mode="json")
        return BackboneSpec("probe", features, identity, "x", "x", context=context, inputs=self.settings.inputs)

    def preprocess(self, view: Any) -> torch.Tensor:
        if self.settings.inputs == ("image",):
            return torch.from_numpy(view.astype(np.float32).mean(axis=(0, 1), keepdims=True).transpose(2, 0, 1))
        total = sum(len(value) if isinstance(value, str) else float(np.mean(value)) for value in view.values())
        return torch.full((3, 1, 1), float(total))

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = images.mean(dim=(-3, -2, -1))
        seen = seen.transpose(1, 2) if self.settings.context else seen[..., None]
        return {"seen": seen, "ids": torch.full((*seen.shape[:2], 1), float(1 << 20))}

    def to(self, device: torch.device) -> None:
        pass


class Deep(SyntheticSource):
    def index(self) -> Any:
        import dataclasses

        return dataclasses.replace(super().index(), extras=("depth",))

    def describe(self, names: Any) -> Any:
        from vla.featurize.sources.base import ExtrasRecord

        return ExtrasRecord()

    def views(self, episode: int, start: int, stop: int, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        for frame in range(start, stop):
            yield tuple({"depth": np.full((4, 4), 100 * episode + frame + 0.5 * view)} for view in range(2))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("probe_module")
    module.Probe, module.Deep = Probe, Deep
    monkeypatch.setitem(sys.modules, "probe_module", module)
    monkeypatch.setitem(BACKBONES, "probe", BACKBONES["toy"]._replace(target="probe_module:Probe"))
    monkeypatch.setitem(SOURCES, "deep", Entry("probe_module:Deep", (), "a source that knows depth"))


def featurize(root: Path, source: str = LENGTHS, unit_rows: int = 5, **options: Any) -> Path:
    store = {"unit_rows": unit_rows}
    values = {"source": source, "backbone": "probe", "options": options, "store": store, "batch_size": 3}
    run(prepare(FeaturizeConfig.build(values)), root)
    return root


def means(episode: int) -> np.ndarray[Any, Any]:
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    return np.stack([[view.mean() for view in views] for views in source.frames(episode, 0, 7)])


def test_a_context_is_the_past_of_its_own_episode_padded_by_its_first_frame(tmp_path: Path) -> None:
    store = open_store(featurize(tmp_path / "s", context=2))
    for episode in range(3):
        wanted = means(episode)
        rows = np.arange(7) + int(store.episodes.row_start[episode])
        seen = store.read("seen", rows)
        for frame in range(7):  # units of 5 rows cut every episode of 7
            past = [max(frame - 2, 0), max(frame - 1, 0), frame]
            np.testing.assert_allclose(seen[frame], wanted[past].T, atol=1e-3)


def test_a_context_does_not_depend_on_how_the_store_is_cut(tmp_path: Path) -> None:
    one, other = (open_store(featurize(tmp_path / str(n), unit_rows=n, context=3)) for n in (4, 21))
    np.testing.assert_array_equal(one.read("seen", np.arange(21)), other.read("seen", np.arange(21)))


def test_a_context_live_equals_the_context_cached(tmp_path: Path) -> None:
    root = featurize(tmp_path / "s", context=2)
    values = {
        "head": "mlp",
        "data": {"stores": [str(root)], "validation": 0.34, "features": ["seen"]},
        "model": {"horizon": 4, "n_action": 1, "encoder": {"components": 2, "dim": 16}, "hidden": 16},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
    }
    train_head(HeadTrainConfig.build(values), tmp_path / "run")
    policy, store = Policy.from_run(tmp_path / "run", device="cpu"), open_store(root)
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    cameras, states = source.index().cameras, source.steps(1)["state"]
    policy.reset(seed=0, task=source.index().episodes[1].task)
    for frame, views in enumerate(source.frames(1, 0, 7)):
        policy.act(Observation(dict(zip(cameras, views, strict=True)), states[frame], np.zeros(1, np.float32)))
        cached = store.read("seen", np.array([7 + frame]))[0]
        np.testing.assert_array_equal(policy._history[-1]["features"]["seen"].numpy(), cached)


def test_the_instruction_reaches_the_backbone_without_a_picture_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SyntheticSource, "frames", lambda *_: pytest.fail("a picture was asked for"))
    store = open_store(featurize(tmp_path / "s", inputs=["instruction"]))
    wanted = [len(store.episodes.tasks[task]) for task in store.episodes.task]
    assert store.read("seen", np.array([0, 7, 14]))[:, 0, 0].tolist() == wanted


def test_picture_and_instruction_come_together(tmp_path: Path) -> None:
    store = open_store(featurize(tmp_path / "s", inputs=["image", "instruction"]))
    np.testing.assert_allclose(store.read("seen", np.array([3]))[0, :, 0], means(0)[3] + len(store.episodes.tasks[0]))


def test_what_a_source_knows_beside_pictures_is_given(tmp_path: Path) -> None:
    store = open_store(featurize(tmp_path / "s", "deep:episodes=3,length=[7,7]", inputs=["depth"]))
    assert store.read("seen", np.array([8]))[0, :, 0].tolist() == [101.0, 101.5]


def test_inputs_that_a_source_lacks_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'probe' needs depth of each frame, and synthetic has image, instruction"):
        featurize(tmp_path / "s", inputs=["image", "depth"])
    assert not (tmp_path / "s").exists()


def test_ids_are_kept_exactly_whatever_dtype_is_asked_for(tmp_path: Path) -> None:
    values = {"source": LENGTHS, "backbone": "probe", "store": {"dtype": "float16", "format": "h5"}}
    run(prepare(FeaturizeConfig.build(values)), tmp_path / "s")
    store = open_store(tmp_path / "s")
    ids = store.read("ids", np.arange(21))
    assert (ids.dtype, set(ids.ravel().tolist())) == (np.int32, {1 << 20})
    assert store.manifest.features["seen"].dtype == "float16"


def test_numbers_that_are_no_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Probe.encode
    for wrong in (0.5, -3e9, float("nan")):
        monkeypatch.setattr(
            Probe, "encode", lambda self, x, w=wrong: {**plain(self, x), "ids": torch.full((*x.shape[:2], 1), w)}
        )
        with pytest.raises(DataError, match="'ids' is not all int32 from row 0"):
            featurize(tmp_path / str(wrong))
