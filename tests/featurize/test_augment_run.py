"""`featurize` with augmented copies: what is cached, and that nothing but the settings decides it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import zarr

from vla.featurize.augment import AugmentConfig, adjust, draw
from vla.featurize.backbones.base import BackboneSpec, FeatureSpec
from vla.featurize.backbones.registry import BACKBONES, make_backbone
from vla.featurize.job import FeaturizeConfig, Job, prepare, run
from vla.featurize.sources.synthetic import SyntheticSource
from vla.stores.convert import ConvertOptions, convert_store
from vla.stores.errors import FingerprintError, UsageError
from vla.stores.repair import repair_store
from vla.stores.settings import Settings
from vla.stores.store import Store, open_store
from vla.stores.verify import verify_store

SOURCE = "synthetic:episodes=3,length=[7,7],cameras=2,image_size=16"
ROWS = np.arange(21)


class TrailSettings(Settings):
    context: int = 2


class Trail:
    """Keeps the mean of each picture in its context, to tell which pictures it was shown."""

    settings_type: ClassVar[type[Settings]] = TrailSettings

    def __init__(self, settings: TrailSettings) -> None:
        self.context, self.largest = settings.context, 0

    def spec(self) -> BackboneSpec:
        features = {"seen": FeatureSpec((self.context + 1,), ("frame",), "float32")}
        return BackboneSpec("trail", features, {"network": "trail"}, "x", "x", context=self.context)

    def preprocess(self, view: Any) -> torch.Tensor:
        return torch.from_numpy(view.astype(np.float32).mean(axis=(0, 1), keepdims=True).transpose(2, 0, 1))

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.largest = max(self.largest, len(images))
        return {"seen": images.mean(dim=(-3, -2, -1)).transpose(1, 2)}

    def to(self, device: torch.device) -> None:
        pass


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("trail_module")
    module.Trail = Trail
    monkeypatch.setitem(sys.modules, "trail_module", module)
    monkeypatch.setitem(BACKBONES, "trail", BACKBONES["toy"]._replace(target="trail_module:Trail"))


def job(copies: int, *, backbone: str = "toy", batch_size: int = 4, store: Any = None, **augment: Any) -> Job:
    values = {
        "source": SOURCE,
        "backbone": backbone,
        "batch_size": batch_size,
        "store": {"unit_rows": 5, **(store or {})},
        "augment": {"copies": copies, **augment},
    }
    return prepare(FeaturizeConfig.build(values))


def made(root: Path, copies: int, **options: Any) -> Store:
    run(job(copies, **options), root)
    return open_store(root)


def pictures() -> list[tuple[str, int, tuple[Any, ...]]]:
    """Episode id, frame and views of every row."""
    source = SyntheticSource(episodes=3, length=(7, 7), cameras=2, image_size=16)
    return [
        (episode.id, frame, views)
        for at, episode in enumerate(source.index().episodes)
        for frame, views in enumerate(source.frames(at, 0, 7))
    ]


@pytest.mark.parametrize("per", ["episode", "frame"])
def test_a_copy_is_the_feature_of_the_augmented_picture(tmp_path: Path, per: str) -> None:
    store, config = made(tmp_path / "s", 2, per=per, batch_size=9), AugmentConfig(copies=2, per=per)  # type: ignore[arg-type]
    assert list(store.manifest.features) == ["grid", "grid.aug1", "grid.aug2"]
    assert list(store.manifest.plain) == ["grid"]
    backbone, cameras = make_backbone("toy"), store.manifest.cameras
    for copy in (1, 2):
        cached = store.read(f"grid.aug{copy}", ROWS)
        for row, (episode, frame, views) in enumerate(pictures()):
            shown = [adjust(v, draw(config, episode, frame, c, copy)) for v, c in zip(views, cameras, strict=True)]
            wanted = backbone.encode(torch.stack([backbone.preprocess(view) for view in shown])[None])["grid"][0]
            np.testing.assert_array_equal(cached[row], wanted.numpy().astype(np.float16))


def test_the_plain_features_are_those_of_a_store_without_copies(tmp_path: Path) -> None:
    plain, with_copies = made(tmp_path / "plain", 0), made(tmp_path / "copies", 2)
    np.testing.assert_array_equal(plain.read("grid", ROWS), with_copies.read("grid", ROWS))
    grids = [with_copies.read(name, ROWS) for name in with_copies.manifest.features]
    assert all((a != b).any(axis=(1, 2, 3, 4)).all() for a, b in ((grids[0], grids[1]), (grids[1], grids[2])))
    assert with_copies.statistics("grid").mean.tolist() == plain.statistics("grid").mean.tolist()


@pytest.mark.parametrize(
    ("backbone", "unit_rows", "batch_size"), [("toy", 5, 1), ("toy", 21, 64), ("trail", 4, 7), ("trail", 21, 2)]
)
def test_copies_do_not_depend_on_units_or_batches(
    tmp_path: Path, backbone: str, unit_rows: int, batch_size: int
) -> None:
    one = made(tmp_path / "one", 2, backbone=backbone, per="frame")
    options = {"batch_size": batch_size, "store": {"unit_rows": unit_rows}}
    other = made(tmp_path / "other", 2, backbone=backbone, per="frame", **options)
    for name in one.manifest.features:
        np.testing.assert_array_equal(one.read(name, ROWS), other.read(name, ROWS))


@pytest.mark.parametrize("stop_at", [3, 14])
def test_a_resumed_run_gives_the_files_of_an_uninterrupted_one(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]], stop_at: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= stop_at:
            raise InterruptedError

    made(tmp_path / "whole", 2, batch_size=3)
    with pytest.raises(InterruptedError):
        run(job(2, batch_size=3), tmp_path / "cut", progress=stop)
    committed = len(open_store(tmp_path / "cut", allow_partial=True).commits)
    report = run(job(2, batch_size=3), tmp_path / "cut", resume=True)
    assert report.frames == 21 - committed * 5
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("per", ["episode", "frame"])
def test_the_past_of_a_copy_is_of_the_same_copy(tmp_path: Path, per: str) -> None:
    store = made(tmp_path / "s", 2, backbone="trail", per=per)
    config, cameras = AugmentConfig(copies=2, per=per), store.manifest.cameras  # type: ignore[arg-type]
    every = pictures()
    for copy in (1, 2):
        means = [
            [adjust(v, draw(config, episode, frame, c, copy)).mean() for v, c in zip(views, cameras, strict=True)]
            for episode, frame, views in every
        ]
        cached = store.read(f"seen.aug{copy}", ROWS)
        for row in ROWS.tolist():
            first = row // 7 * 7
            past = [max(row - 2, first), max(row - 1, first), row]
            np.testing.assert_allclose(cached[row], np.asarray(means)[past].T, atol=1e-3)


@pytest.mark.parametrize(("batch_size", "largest"), [(1, 1), (2, 2), (7, 6), (64, 63)])
def test_the_network_sees_at_most_a_batch_at_once_copies_counted(tmp_path: Path, batch_size: int, largest: int) -> None:
    planned = job(2, backbone="trail", batch_size=batch_size, store={"unit_rows": 21})
    report = run(planned, tmp_path / "s")
    assert planned.backbone.largest == largest  # type: ignore[attr-defined]
    assert report.frames == 21, "frames are those of the source"


def test_the_fingerprint_knows_every_setting_and_nothing_of_augmentation_where_there_is_none() -> None:
    def fingerprint(copies: int, **augment: Any) -> dict[str, Any]:
        return job(copies, **augment).plan.manifest.fingerprint

    changes: dict[str, Any] = {
        "copies": 3,
        "crop": 0.9,
        "rotate": 4.0,
        "brightness": (0.8, 1.3),
        "contrast": (0.6, 1.3),
        "saturation": (0.5, 1.4),
        "colour_only": (),
        "seed": 1,
        "per": "frame",
    }
    assert changes.keys() == AugmentConfig.model_fields.keys()
    plain = fingerprint(0)
    assert "augment" not in plain
    for name, value in changes.items():
        if name == "copies":
            assert fingerprint(3) != fingerprint(2)
        else:
            assert fingerprint(0, **{name: value}) == plain
            assert fingerprint(2, **{name: value})["augment"] != fingerprint(2)["augment"]
    assert fingerprint(2)["backbone"] == plain["backbone"], "a live policy compares it"


def test_a_run_with_other_augmentation_is_not_resumed(tmp_path: Path) -> None:
    made(tmp_path / "s", 1)
    for other in (job(1, seed=3), job(0), job(2)):
        with pytest.raises(FingerprintError, match="augment"):
            run(other, tmp_path / "s", resume=True)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"inputs": ("image", "instruction")}, "image, instruction"),
        ({"inputs": ("instruction",), "per": "instruction", "context": 0}, "instruction"),
    ],
)
def test_backbones_that_read_more_than_pictures_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reads: str
) -> None:
    spec = Trail(TrailSettings()).spec()
    monkeypatch.setattr(Trail, "spec", lambda self: dataclasses.replace(spec, **changes))
    with pytest.raises(UsageError, match=f"'trail' reads {reads}, which --augment"):
        job(1, backbone="trail")
    assert job(0, backbone="trail").plan.manifest.copies == 0


@pytest.mark.parametrize("form", ["zarr", "h5", "plain-zarr"])
def test_copies_are_converted_bit_for_bit(tmp_path: Path, form: str) -> None:
    store = made(tmp_path / "s", 2, store={"dtype": "int8"})
    source = tmp_path / "s"
    if form == "zarr":
        convert_store(source, tmp_path / "h5", ConvertOptions(format="h5"))
        source = tmp_path / "h5"
    convert_store(source, tmp_path / "out", ConvertOptions.build({"format": form}))
    for name in ("grid", "grid.aug1", "grid.aug2"):
        if form == "plain-zarr":
            found = zarr.open_group(tmp_path / "out", mode="r")[f"frames/{name}"][:]
        else:
            found = open_store(tmp_path / "out").read(name, ROWS)
        np.testing.assert_array_equal(found, store.read(name, ROWS))


@pytest.mark.parametrize("form", ["zarr", "h5"])
def test_damage_in_a_copy_is_found_and_repaired(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]], form: str
) -> None:
    root = tmp_path / "s"
    made(root, 2, store={"format": form})
    whole = files_of(root)
    assert verify_store(root).findings == []
    if form == "zarr":
        file = root / "frames/grid.aug2/c.1.0.0.0.0"
        raw = bytearray(file.read_bytes())
        raw[99] ^= 1
        file.write_bytes(raw)
    else:
        file = root / "units/unit-000001.h5"
        file.write_bytes(file.read_bytes()[:-9])
    assert any(file.name in finding for finding in verify_store(root).findings)
    assert repair_store(root).dropped == [1]
    run(job(2, store={"format": form}), root, resume=True)
    assert files_of(root) == whole
