"""Stores made from stores: what they depend on, that they join, and that a live policy makes the same features."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.registry import BACKBONES
from vla.featurize.caches import job as caches
from vla.featurize.caches.job import ImportConfig
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.launch import Where, launch
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.registry import open_source
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.errors import FingerprintError, SourceError, UsageError
from vla.stores.join import join_stores
from vla.stores.settings import Settings
from vla.stores.store import open_store

SPEC = "synthetic:episodes=3,length=[7,7],cameras=2,image_size=16"


class MixSettings(Settings):
    gain: float = 1.0


class Mix:
    """The mean of two cached features, each averaged over its positions."""

    settings_type: ClassVar[type[Settings]] = MixSettings

    def __init__(self, settings: MixSettings) -> None:
        self.settings = settings

    def spec(self) -> BackboneSpec:
        features = {"mixed": FeatureSpec((2,), ("channel",), "float32")}
        return BackboneSpec("mix", features, {"gain": self.settings.gain}, "x", "x", inputs=("grid", "colour"))

    def preprocess(self, view: Any) -> torch.Tensor:
        return torch.tensor(
            [float(view["grid"].astype(np.float32).mean()), float(view["colour"].astype(np.float32).mean())]
        )

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mixed": images * self.settings.gain}

    def to(self, device: torch.device) -> None:
        pass


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, colour_backbone: type) -> None:
    module: Any = type(sys)("mix_module")
    module.Mix, module.Colour = Mix, colour_backbone
    monkeypatch.setitem(sys.modules, "mix_module", module)
    monkeypatch.setitem(BACKBONES, "mix", BACKBONES["toy"]._replace(target="mix_module:Mix"))
    monkeypatch.setitem(BACKBONES, "colour", BACKBONES["toy"]._replace(target="mix_module:Colour"))


def make(root: Path, backbone: str, source: str = SPEC, dtype: str | None = None, **more: Any) -> Path:
    store = {"unit_rows": 5, "dtype": dtype}
    run(prepare(FeaturizeConfig.build({"source": source, "backbone": backbone, "store": store, **more})), root)
    return root


@pytest.fixture(params=["float16", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    toy = make(tmp_path / "toy", "toy", dtype=request.param)
    colour = make(tmp_path / "colour", "colour")
    mix = make(tmp_path / "mix", "mix", str(toy), source_options={"join": [str(colour)]})
    return toy, colour, mix


def test_a_store_made_from_stores_joins_with_them(made: tuple[Path, Path, Path]) -> None:
    joined = join_stores([open_store(path) for path in made])
    assert set(joined.owner) == {"grid", "colour", "mixed"}
    toy, mix = joined.stores[0], joined.stores[2]
    np.testing.assert_array_equal(toy.steps("action"), mix.steps("action"))
    assert mix.episodes.tasks == toy.episodes.tasks
    wanted = joined.stores[1].read("colour", np.array([9])).astype(np.float32).reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(mix.read("mixed", np.array([9]))[0, :, 1], wanted, rtol=1e-6)


def test_a_chain_seen_live_equals_the_chain_cached(made: tuple[Path, Path, Path]) -> None:
    store = open_store(made[2])
    recipe, identity = store.manifest.provenance["backbone"], store.manifest.fingerprint["backbone"]
    live = rebuild_backbone(recipe, identity)
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    for frame, views in enumerate(source.frames(1, 0, 7)):
        images = torch.stack([live.preprocess(view) for view in views])[None]
        seen = live.encode(images)["mixed"][0]
        np.testing.assert_array_equal(seen.numpy(), store.read("mixed", np.array([7 + frame]))[0])


def test_what_inputs_were_made_with_is_part_of_the_fingerprint(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    toy, colour, mix = made
    inputs = open_store(mix).manifest.fingerprint["backbone"]["inputs"]
    assert inputs["grid"]["backbone"] == open_store(toy).manifest.fingerprint["backbone"]
    other = make(tmp_path / "other", "toy", options={"seed": 5}, dtype=open_store(toy).manifest.features["grid"].dtype)
    options = {"join": [str(colour)]}
    again = prepare(
        FeaturizeConfig.build(
            {"source": str(other), "backbone": "mix", "source_options": options, "store": {"unit_rows": 5}}
        )
    )
    with pytest.raises(FingerprintError, match=r"backbone\.inputs\.grid\.backbone\.seed"):
        run(again, mix, resume=True)


def test_random_weights_below_are_random_weights_above(tmp_path: Path) -> None:
    toy = make(tmp_path / "toy", "toy")
    for random in (False, True):
        colour = make(tmp_path / f"colour-{random}", "colour", options={"random": random})
        mix = make(tmp_path / f"mix-{random}", "mix", str(toy), source_options={"join": [str(colour)]})
        assert open_store(mix).manifest.random_weights is random


def test_a_store_has_no_pictures(made: tuple[Path, Path, Path]) -> None:
    with pytest.raises(UsageError, match="'toy' needs image of each frame"):
        make(made[0].parent / "again", "toy", str(made[0]))
    with pytest.raises(SourceError, match="holds features, not pictures"):
        next(iter(open_source(made[0]).frames(0, 0, 1)))


def test_episodes_left_out_of_a_store_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SyntheticSource.frames

    def broken(self: SyntheticSource, episode: int, start: int, stop: int) -> Any:
        if episode == 1:
            raise SourceError("episode 1 is broken")
        return plain(self, episode, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSource, "frames", broken)
        for name in ("toy", "colour"):
            job = prepare(FeaturizeConfig.build({"source": SPEC, "backbone": name}))
            run(dataclasses.replace(job, config=job.config.model_copy(update={"skip_bad": True})), tmp_path / name)
    toy, options = tmp_path / "toy", {"join": [str(tmp_path / "colour")]}
    index = open_source(toy, **options).index()
    assert [episode.id for episode in index.episodes] == ["episode_000000", "episode_000002"]
    assert list(index.skipped) == ["episode_000001"]
    mixed = open_store(make(tmp_path / "mix", "mix", str(toy), source_options=options))
    np.testing.assert_array_equal(mixed.steps("action")[7:], open_store(toy).steps("action")[14:])


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["source", "joined", "above", "linked"])
@pytest.mark.parametrize("workers", [None, 1])
def test_a_store_that_is_read_is_never_overwritten(tmp_path: Path, place: str, workers: int | None) -> None:
    """Neither the source, nor one joined to it, nor a store in whose folder it lies, nor through a link."""
    outer = make(tmp_path / "outer", "toy")
    toy, colour = make(outer / "toy", "toy"), make(tmp_path / "colour", "colour")
    (tmp_path / "link").symlink_to(toy)
    config = {"source": str(toy), "backbone": "mix", "source_options": {"join": [str(colour)]}}
    job = prepare(FeaturizeConfig.build(config))
    root = {"source": toy, "joined": colour, "above": outer, "linked": tmp_path / "link"}[place]
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"^--overwrite of {root} would delete {tmp_path}.*Try: another --out"):
        launch(job, root, Where(workers), resume=False, overwrite=True, accept=True)
    assert contents(tmp_path) == before


def test_a_store_that_gives_an_import_its_actions_is_never_overwritten(tmp_path: Path) -> None:
    source, before = make(tmp_path / "toy", "toy"), contents(tmp_path / "toy")
    (tmp_path / "cache").mkdir()
    for episode in open_source(source).index().episodes:
        np.save(tmp_path / "cache" / f"{episode.id}.npy", np.zeros((episode.length, 3), np.float32))
    job = caches.prepare(ImportConfig.build({"kind": "arrays", "path": tmp_path / "cache", "source": str(source)}))
    with pytest.raises(UsageError, match=f"--overwrite of {source} would delete"):
        caches.run(job, source, overwrite=True)
    assert contents(source) == before
