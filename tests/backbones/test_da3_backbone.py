"""Depth Anything 3: scenes of one to four views, the rays' grids, and every way weights and options can be wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from vla.featurize.backbones import da3
from vla.featurize.backbones.da3 import DepthAnything3
from vla.featurize.backbones.da3_network import ARCHITECTURES, INSTALL, MODELS, build_network
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.rebuild import rebuild_backbone
from vla.pretrained import hub
from vla.pretrained.weights import digest_files
from vla.stores.errors import DataError, FingerprintError, MachineError, UsageError
from vla.stores.store import open_store

pytest.importorskip("depth_anything_3", reason="depth-anything-3 is not installed (pip install --no-deps)")

Pictures = list[NDArray[np.uint8]]
Models = dict[str, tuple[Path, Any]]

ALL = ["ray", "ray_full", "ray_conf", "depth", "tokens_3"]
TINY = {"weights": "random", "model": "tiny", "size": 56, "picture": [60, 80]}


def build(**options: Any) -> DepthAnything3:
    merged = {**TINY, **options}
    chosen = {key: value for key, value in merged.items() if value is not None}
    return DepthAnything3(DepthAnything3.settings_type.build(chosen, where="backbone 'da3'"))


def batch(backbone: DepthAnything3, pictures: Pictures, views: int) -> torch.Tensor:
    flat = torch.stack([backbone.preprocess(picture) for picture in pictures])
    return flat.reshape(-1, views, *flat.shape[1:])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture
def folder(models: Models, tmp_path: Path) -> Path:
    """A folder in the hub's layout, to spoil."""
    return Path(shutil.copytree(models["da3"][0], tmp_path / "weights"))


def from_folder(folder: Path, **options: Any) -> DepthAnything3:
    return build(weights=str(folder), model=None, **options)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_every_feature_has_its_grid_in_float32_at_one_to_four_views(views: int, pictures: Pictures) -> None:
    backbone = build(features=ALL, views=views)
    made = backbone.encode(batch(backbone, (pictures * 3)[: 2 * views], views))
    rows, columns = 42 // 14, 56 // 14  # 60x80 at size 56
    assert {name: tuple(values.shape) for name, values in made.items()} == {
        "ray": (2, views, 14, 14, 6),
        "ray_full": (2, views, 42 * 8 // 14, 56 * 8 // 14, 6),
        "ray_conf": (2, views, 8 * rows, 8 * columns, 1),
        "depth": (2, views, 42, 56, 1),
        "tokens_3": (2, views, rows, columns, 2 * 64),
    }
    specs = backbone.spec().features
    assert list(made) == list(specs) == ALL
    for name, values in made.items():
        assert values.shape[2:] == specs[name].shape
        assert values.dtype == torch.float32
        assert values.is_contiguous()
    assert (made["ray_conf"] > 1).all()
    assert (made["depth"] > 0).all()


@pytest.mark.parametrize(
    ("picture", "network", "rays"),
    [
        ((480, 640), (378, 504), (216, 288)),
        ((720, 1280), (280, 504), (160, 288)),
        ((224, 224), (504, 504), (288, 288)),
        ((640, 480), (504, 378), (288, 216)),
    ],
)
def test_a_picture_has_eight_rays_for_fourteen_pixels_of_the_networks_input(
    picture: tuple[int, int], network: tuple[int, int], rays: tuple[int, int]
) -> None:
    features = build(picture=picture, size=504, features=ALL).spec().features
    assert features["ray"].shape == (14, 14, 6)
    assert features["ray_full"].shape == (*rays, 6)
    assert features["ray_conf"].shape == (*rays, 1)
    assert features["depth"].shape == (*network, 1)
    assert features["tokens_3"].shape == (network[0] // 14, network[1] // 14, 128)
    assert rays == (network[0] * 8 // 14, network[1] * 8 // 14)


def test_the_pooled_ray_is_what_a_geometry_adapter_makes_of_the_full_one_bit_for_bit(pictures: Pictures) -> None:
    backbone = build(features=["ray", "ray_full"], views=2)
    made = backbone.encode(batch(backbone, pictures[:4], 2))
    for step in range(2):
        planes = made["ray_full"][step].permute(0, 3, 1, 2)
        adapter = torch.nn.functional.interpolate(planes, size=(14, 14), mode="bilinear", align_corners=False)
        assert torch.equal(made["ray"][step], adapter.permute(0, 2, 3, 1))


def test_where_the_cells_divide_the_rays_evenly_a_cell_is_the_mean_of_its_four_middle_rays(pictures: Pictures) -> None:
    square = pictures[0][:, :60]
    backbone = build(features=["ray", "ray_full"], picture=[60, 60], size=98, target_hw=[14, 14])
    made = backbone.encode(batch(backbone, [square], 1))
    assert made["ray_full"].shape[2:4] == (56, 56)
    blocks = made["ray_full"][0, 0].reshape(14, 4, 14, 4, 6)[:, 1:3, :, 1:3]
    assert torch.allclose(made["ray"][0, 0], blocks.mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_views_of_a_scene_see_each_other_and_time_steps_do_not(views: int, pictures: Pictures) -> None:
    backbone = build(features=ALL, views=views)
    images = batch(backbone, (pictures * 2)[: 3 * views], views)
    made = backbone.encode(images)
    for step in range(3):
        for name, values in backbone.encode(images[step : step + 1]).items():
            assert_close(made[name][step], values[0])
    changed = images.clone()
    changed[0, -1] = images[1, 0]
    after = backbone.encode(changed)
    assert not torch.allclose(after["ray"][0, 0], made["ray"][0, 0], atol=1e-3), "the first view saw the last one"
    assert_close(after["ray"][1:], made["ray"][1:])


@pytest.mark.parametrize("strategy", ["saddle_balanced", "saddle_sim_range"])
def test_views_come_back_in_their_own_order_whichever_was_the_reference(strategy: str, pictures: Pictures) -> None:
    """The network moves a view chosen by content to the front; no feature may keep that order."""
    features = ["ray", "depth", "tokens_1", "tokens_3"]
    backbone = build(features=features, views=4, ref_view_strategy=strategy)
    images = batch(backbone, pictures[:4], 4)
    made = backbone.encode(images)
    for order in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]):
        for name, values in backbone.encode(images[:, order]).items():
            assert_close(values, made[name][:, order])


def test_with_first_the_frame_is_that_of_the_first_camera(pictures: Pictures) -> None:
    backbone = build(views=3)
    images = batch(backbone, pictures[:3], 3)
    made, swapped = backbone.encode(images)["ray"], backbone.encode(images[:, [1, 0, 2]])["ray"]
    assert (made[:, 2] - swapped[:, 2]).abs().max() > 5e-5, "the third view is told relative to another"


def test_the_number_of_views_is_checked_and_recorded(pictures: Pictures) -> None:
    backbone = build(views=2)
    with pytest.raises(UsageError, match=r"3 views in a time step, and views=2.*options.views=3"):
        backbone.encode(batch(backbone, pictures[:3], 3))
    assert [build(views=views).spec().identity["scene"] for views in (1, 2, 3)] == [
        {"views": 1, "ref_view_strategy": None},
        {"views": 2, "ref_view_strategy": None},
        {"views": 3, "ref_view_strategy": "first"},
    ]


@pytest.mark.parametrize("views", [1, 2])
def test_how_many_pictures_pass_at_once_changes_nothing(
    views: int, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build(features=ALL, views=views)
    images = batch(backbone, pictures, views)
    together = backbone.encode(images)
    monkeypatch.setitem(da3.PIXELS, "cpu", 1)
    for name, values in backbone.encode(images).items():
        assert values.shape == together[name].shape
        assert_close(values, together[name])


def test_tokens_are_the_last_local_layers_output_beside_the_normalised_output_of_their_own(
    pictures: Pictures,
) -> None:
    """Layer 2 attends within a view, layer 3 across views; layer 1 comes before the first that does."""
    backbone = build(features=["tokens_1", "tokens_3"], views=2)
    vit, seen = backbone._network.backbone.pretrained, {}
    for layer in (1, 2, 3):
        vit.blocks[layer].register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out.clone()}))
    made = backbone.encode(batch(backbone, pictures[:2], 2))
    outputs = {layer: out.reshape(1, 2, 1 + 3 * 4, 64) for layer, out in seen.items()}
    for name, local, own in (("tokens_1", 1, 1), ("tokens_3", 2, 3)):
        tokens = made[name].flatten(2, 3)
        assert_close(tokens[..., :64], outputs[local][:, :, 1:])
        assert_close(tokens[..., 64:], vit.norm(outputs[own][:, :, 1:]))


def test_asking_for_tokens_does_not_change_the_rays(pictures: Pictures) -> None:
    plain, more = build(), build(features=["tokens_0", "ray", "tokens_4"])
    images = batch(plain, pictures[:2], 1)
    assert torch.equal(more.encode(images)["ray"], plain.encode(images)["ray"])


def test_the_head_is_not_run_where_only_tokens_are_wanted(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(features=["tokens_0", "tokens_5"])
    monkeypatch.setattr(backbone._network.head, "forward", lambda *args, **kwargs: pytest.fail("ran the head"))
    assert set(backbone.encode(batch(backbone, pictures[:1], 1))) == {"tokens_0", "tokens_5"}


def test_nothing_is_printed_and_the_packages_logger_stays_as_it_was(
    pictures: Pictures, capfd: pytest.CaptureFixture[str]
) -> None:
    from depth_anything_3.utils.logger import logger

    before = logger.level
    backbone = build(views=3)
    backbone.encode(batch(backbone, pictures[:3], 3))
    assert capfd.readouterr() == ("", "")
    assert logger.level == before > 0


def test_moving_the_network_forgets_the_positions_kept_on_the_old_device(pictures: Pictures) -> None:
    backbone = build()
    backbone.encode(batch(backbone, pictures[:1], 1))
    cache = backbone._network.backbone.pretrained.position_getter.position_cache
    assert cache
    backbone.to(torch.device("meta"))
    assert not cache


def test_features_cached_equal_features_live_and_the_licence_is_printed_and_recorded(
    models: Models, tmp_path: Path
) -> None:
    options = {"size": 56, "features": ["ray", "ray_conf"], "picture": [32, 32], "views": 2}
    config = FeaturizeConfig.build(
        {
            "source": "synthetic:episodes=2,length=[3,4],cameras=2",
            "backbone": "da3",
            "weights": str(models["da3"][0]),
            "options": options,
            "batch_size": 3,
        }
    )
    job = prepare(config)
    run(job, tmp_path / "da3")
    store = open_store(tmp_path / "da3")
    assert store.manifest.provenance["weights_licence"] == job.plan.to_json()["weights_licence"] == "none"
    identity = store.manifest.fingerprint["backbone"]
    live = rebuild_backbone(store.manifest.provenance["backbone"], identity, {"da3": {"weights": config.weights}})
    row = 0
    for episode, plan in enumerate(job.source.index().episodes):
        for views in job.source.frames(episode, 0, plan.length):
            made = live.encode(torch.stack([live.preprocess(view) for view in views])[None])
            for name, values in made.items():
                cached = store.read(name, np.array([row]))[0]
                np.testing.assert_allclose(values[0].half().numpy(), cached, rtol=2e-3, atol=1e-4)
            row += 1
    assert row == store.manifest.rows
    with pytest.raises(FingerprintError, match="scene"):
        rebuild_backbone(
            {"name": "da3", "weights": config.weights, "options": {**options, "views": 1}},
            identity,
            {"da3": {"weights": config.weights}},
        )


def test_random_weights_are_a_tiny_network_of_the_real_classes() -> None:
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
    from depth_anything_3.model.dualdpt import DualDPT

    backbone = build()
    assert isinstance(backbone._network, DepthAnything3Net)
    assert isinstance(backbone._network.backbone.pretrained, DinoVisionTransformer)
    assert isinstance(backbone._network.head, DualDPT)
    spec = backbone.spec()
    assert (spec.random_weights, spec.weights_licence) == (True, "none (random)")
    assert spec.code_licence == "Apache-2.0 (depth-anything-3)"
    assert spec.parameters == 875_070
    assert not any(parameter.requires_grad for parameter in backbone._network.parameters())


def test_a_folder_gives_its_own_weights_whatever_was_random(models: Models, pictures: Pictures) -> None:
    folder, network = models["da3"]
    backbone = from_folder(folder, features=["ray_full"])
    images = batch(backbone, pictures[:1], 1)
    with torch.no_grad():
        wanted = network(images)["ray"]
    assert torch.equal(backbone.encode(images)["ray_full"], wanted)
    spec = backbone.spec()
    assert spec.identity["weights_sha256"] == digest_files([folder / "model.safetensors"])
    assert "seed" not in spec.identity
    assert not spec.random_weights


def test_camera_and_gaussian_branches_of_a_published_file_are_left_unread(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"model.{part}.x": torch.zeros(2) for part in ("cam_enc", "cam_dec", "gs_head", "gs_adapter")}

    change_weights(folder, add)
    assert from_folder(folder).spec().parameters == build().spec().parameters


SHARED = "model.head.scratch.output_conv2_aux.{}.2.weight"
"""One LayerNorm under four names; safetensors keeps the first."""


def test_any_one_name_of_a_tied_parameter_is_enough_and_none_is_too_few(folder: Path, pictures: Pictures) -> None:
    network = build_network("da3-tiny")
    tied = [name for name in network.state_dict() if name.endswith(".2.weight") and "output_conv2_aux" in name]
    assert [f"model.{name}" for name in tied] == [SHARED.format(level) for level in range(4)]
    assert len({id(network.get_parameter(name)) for name in tied}) == 1
    kept = [name for name in load_file(folder / "model.safetensors") if name.removeprefix("model.") in tied]
    assert len(kept) == 1, "the saved file has one name of the four"
    before = from_folder(folder)
    wanted = before.encode(batch(before, pictures[:1], 1))["ray"]

    change_weights(folder, lambda tensors: tensors.update({SHARED.format(2): tensors.pop(kept[0])}))
    after = from_folder(folder)
    assert torch.equal(after.encode(batch(after, pictures[:1], 1))["ray"], wanted)

    change_weights(folder, lambda tensors: tensors.pop(SHARED.format(2)))
    with pytest.raises(DataError, match=r"it lacks head\.scratch\.output_conv2_aux\.0\.2\.weight"):
        from_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.backbone.pretrained.cls_token"), r"it lacks backbone\.pretrained\.cls_token$"),
        (lambda t: t.update({"model.stray": torch.zeros(1)}), "it has unexpected stray$"),
        (
            lambda t: t.update({"model.backbone.pretrained.cls_token": torch.zeros(1, 1, 65)}),
            r"cls_token is \(1, 1, 65\), the network's is \(1, 1, 64\)",
        ),
        (lambda t: t.update({"head.norm.weight": torch.zeros(1)}), "1 names without 'model.', first head.norm.weight"),
        (
            lambda t: [t.pop(name) for name in list(t) if "refinenet1_aux" in name],
            r"it lacks head\.scratch\.refinenet1_aux.*, .*, .* and 7 more$",
        ),
    ],
    ids=["missing", "unexpected", "shape", "no prefix", "many"],
)
def test_weights_that_would_leave_parameters_random_or_unused_are_refused(
    change: Any, message: str, folder: Path
) -> None:
    change_weights(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_half_precision_on_disk_is_computed_in_float32(folder: Path, pictures: Pictures) -> None:
    wanted = from_folder(folder)
    change_weights(folder, lambda t: t.update({name: values.half() for name, values in t.items()}))
    backbone = from_folder(folder)
    assert {p.dtype for p in backbone._network.parameters()} == {torch.float32}
    made = backbone.encode(batch(backbone, pictures[:1], 1))["ray"]
    assert torch.allclose(made, wanted.encode(batch(wanted, pictures[:1], 1))["ray"], atol=0.02)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("model.safetensors", None, MachineError, "no model in"),
        ("config.json", None, MachineError, "no model in"),
        ("model.safetensors", b"", DataError, "not a file of weights"),
        ("model.safetensors", b"\xff" * 64, DataError, "not a file of weights"),
        ("config.json", b"{", DataError, "cannot read"),
        ("config.json", b"{}", DataError, "has model_name 'None'; expected a model with rays"),
        ("config.json", b'{"model_name": "da3mono-large"}', DataError, "did you mean 'da3-large'"),
        ("config.json", b'{"model_name": ["da3-large"]}', DataError, "expected a model with rays"),
    ],
)
def test_a_damaged_or_incomplete_folder_is_one_line(
    file: str, content: bytes | None, error: type[Exception], message: str, folder: Path
) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_model_than_the_one_asked_for_is_refused(folder: Path) -> None:
    assert build(weights=str(folder), model="tiny").spec().identity["network"] == "da3-tiny"
    with pytest.raises(UsageError, match=r"holds da3-tiny, and model asks for da3-base"):
        build(weights=str(folder), model="DA3-BASE")


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("DA3-SMALL", "Apache-2.0"),
        ("DA3-BASE", "Apache-2.0"),
        ("DA3-LARGE", "CC BY-NC 4.0 (non-commercial)"),
        ("DA3-LARGE-1.1", "CC BY-NC 4.0 (non-commercial)"),
        ("DA3-GIANT", "CC BY-NC 4.0 (non-commercial)"),
        ("DA3-GIANT-1.1", "CC BY-NC 4.0 (non-commercial)"),
    ],
)
def test_the_licence_is_that_of_the_published_weights(
    model: str, licence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks are shrunk here, the table of licences is not."""
    name = MODELS[model]
    small = dataclasses.replace(ARCHITECTURES["da3-tiny"], licence=ARCHITECTURES[name].licence)
    monkeypatch.setitem(ARCHITECTURES, name, small)
    (folder / "config.json").write_text(json.dumps({"model_name": name}))
    assert build(weights=str(folder), model=model).spec().weights_licence == licence


def test_the_default_is_da3_large_from_the_hub_and_offline_it_says_how_to_supply_it() -> None:
    with pytest.raises(MachineError, match="no weights of depth-anything/DA3-LARGE: it is in no cache") as caught:
        build(weights=None, model=None)
    text = str(caught.value)
    assert "hf download depth-anything/DA3-LARGE --local-dir weights/da3" in text
    assert "--weights random" in text
    assert "\n" not in text


def test_a_cached_model_is_found_by_its_name_without_a_network(models: Models, tmp_path: Path) -> None:
    entry = tmp_path / "empty-cache" / "models--depth-anything--DA3-BASE"
    shutil.copytree(models["da3"][0], entry / "snapshots" / ("0" * 40))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    with pytest.raises(UsageError, match="holds da3-tiny, and model asks for da3-base"):
        build(weights=None, model="DA3-BASE")
    found = build(weights="depth-anything/DA3-BASE", model=None)
    assert found.spec() == from_folder(models["da3"][0]).spec(), "the identity is the weights', not the address's"


@pytest.mark.parametrize("absent", ["depth_anything_3", "omegaconf", "einops"])
def test_without_its_packages_the_error_says_the_two_commands(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("depth_anything_3", absent)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MachineError, match=f"backbone 'da3' needs the package {absent}") as caught:
        build()
    assert INSTALL in str(caught.value)
    assert "pip install einops addict omegaconf" in INSTALL
    assert "pip install --no-deps depth-anything-3==0.1.1" in INSTALL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["tokens_6"]}, "tokens_6 of da3-tiny; expected a layer of 0 to 5"),
        ({"features": ["tokens_12"], "model": "DA3-SMALL"}, "tokens_12 of da3-small; expected a layer of 0 to 11"),
        ({"features": ["rays"]}, "no feature 'rays', did you mean 'ray'.*; there are ray, ray_full, .*tokens_<layer>"),
        ({"features": ["tokens_-1"]}, "no feature 'tokens_-1'"),
        ({"features": ["tokens_03"]}, "no feature 'tokens_03'"),
        ({"features": ["ray", "ray"]}, "each feature is named once"),
        ({"features": []}, "features = "),
        ({"features": ["ray", "depth"], "picture": None}, "the shape of depth depends on the source's pictures"),
        ({"size": 500}, "size = 500: .*multiple of 14"),
        ({"size": 14}, "size = 14"),
        ({"views": 0}, "views = 0"),
        ({"target_hw": [1, 14]}, "a grid has at least 2x2 cells"),
        ({"picture": [0, 80]}, "height and width in pixels"),
        ({"model": "DA3-HUGE"}, "model = 'DA3-HUGE'"),
        ({"ref_view_strategy": "last"}, "ref_view_strategy = 'last'"),
        ({"weights": None}, "no weights of the tiny model were ever published. Try: --weights random"),
    ],
)
def test_options_that_cannot_be_met_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


def test_pictures_that_do_not_fit_are_refused_before_the_network_runs(pictures: Pictures) -> None:
    with pytest.raises(DataError, match=r"of shape \(60, 70, 3\), uint8; expected .* of picture=\[60, 80\]"):
        build().preprocess(pictures[0][:, :70])
    with pytest.raises(UsageError, match=r"target_hw=\[25, 14\] exceeds the 24x32 rays"):
        build(target_hw=[25, 14]).preprocess(pictures[0])
    with pytest.raises(DataError, match="a picture of 5x80 has no 14 px patch along its short side at size 56"):
        build(picture=None).preprocess(pictures[0][:5])
    assert build(target_hw=[24, 32]).preprocess(pictures[0]).shape == (3, 42, 56)


def test_without_a_declared_picture_the_pooled_ray_takes_any_shape(pictures: Pictures) -> None:
    backbone = build(picture=None)
    for picture in (pictures[0], pictures[0][:, :60], np.swapaxes(pictures[0], 0, 1)):
        assert backbone.encode(batch(backbone, [picture], 1))["ray"].shape == (1, 1, 14, 14, 6)


def test_a_relative_folder_that_is_not_there_names_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(MachineError, match=r"no model in weights; expected config.json and model.safetensors"):
        build(weights="weights", model=None)
