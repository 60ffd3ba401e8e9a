"""`spatial` as the pipeline sees it: what every backbone must keep, from a source that knows depth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.registry import load_backbone_class, make_backbone
from vla.featurize.backbones.spatial_weights import POSITION, PROJECTOR
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.featurize.rebuild import rebuild_backbone
from vla.featurize.sources.synthetic import SyntheticSource
from vla.featurize.views import live_view
from vla.stores.errors import DataError, MachineError, UsageError
from vla.stores.fingerprint import canonical
from vla.stores.store import open_store

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PATCHES = 16
"""Of a picture of the folder's networks: 4 x 4."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip/` and `llava-3d/` as they are published, narrow: the whole CLIP, and a language model around the parts."""
    root = tmp_path_factory.mktemp("weights")
    eye = {**WIDE, "image_size": 56, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = {**WIDE, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.CLIPConfig(vision_config=eye, text_config=text)
        transformers.utils.logging.disable_progress_bar()
        transformers.CLIPModel(config).eval().save_pretrained(root / "clip")
        transformers.utils.logging.enable_progress_bar()
        parts = {
            f"{POSITION}0.weight": torch.randn(32, 3),
            f"{POSITION}0.bias": torch.randn(32),
            f"{POSITION}1.weight": torch.rand(32),
            f"{POSITION}1.bias": torch.randn(32),
            f"{POSITION}3.weight": torch.randn(32, 32),
            f"{POSITION}3.bias": torch.randn(32),
            f"{PROJECTOR}0.weight": torch.randn(24, 32),
            f"{PROJECTOR}0.bias": torch.randn(24),
            f"{PROJECTOR}2.weight": torch.randn(24, 24),
            f"{PROJECTOR}2.bias": torch.randn(24),
            "model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head.0.weight": torch.randn(24, 3),
            "model.embed_tokens.weight": torch.randn(5, 24),
        }
    (root / "llava-3d").mkdir()
    (root / "llava-3d" / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    save_file({name: values.half() for name, values in parts.items()}, root / "llava-3d" / "model.safetensors")
    return root


@pytest.fixture
def views(pictures: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    """Eight views of 60x80: a slope that cameras side by side look at."""
    y, x = np.mgrid[0:60, 0:80].astype(np.float32)
    made = []
    for number, picture in enumerate(pictures):
        pose = np.eye(4, dtype=np.float32)
        pose[0, 3] = 0.1 * number
        depth = 1 + x / 100 + y / 200
        depth[:10, :24] = 0
        intrinsics = np.array([[70, 0, 40], [0, 70, 30], [0, 0, 1]], np.float32)
        made.append({"image": picture, "depth": depth, "intrinsics": intrinsics, "pose": pose})
    return made


@pytest.fixture
def make(folder: Path) -> Callable[..., Backbone]:
    def made(**options: Any) -> Backbone:
        return make_backbone("spatial", **{"weights": str(folder), "count": 12, **options})

    return made


def batch(backbone: Backbone, views: Sequence[Any], cameras: int = 1) -> torch.Tensor:
    flat = torch.stack([backbone.preprocess(view) for view in views])
    return flat.reshape(-1, cameras, flat.shape[-1])


@pytest.mark.parametrize(
    ("options", "count", "width"),
    [({"count": 12}, 12, 32), ({"tokens": "patch"}, PATCHES, 32), ({"count": 12, "projector": True}, 12, 24)],
    ids=["voxel", "patch", "projector"],
)
def test_features_are_as_the_spec_says_and_padded_with_zeros(
    folder: Path, views: list[dict[str, Any]], options: dict[str, Any], count: int, width: int
) -> None:
    backbone = make_backbone("spatial", weights=str(folder), **options)
    made, spec = backbone.encode(batch(backbone, views[:6], cameras=3)), backbone.spec()
    assert {name: (info.shape, info.dtype) for name, info in spec.features.items()} == {
        "spatial": ((count, width), "float16"),
        "spatial_mask": ((count,), "uint8"),
        "spatial_xyz": ((count, 3), "float32"),
    }
    assert list(made) == list(spec.features)
    for feature, values in made.items():
        assert values.shape == (2, 3, *spec.features[feature].shape)
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    assert set(made["spatial_mask"].unique().tolist()) == {0.0, 1.0}
    assert not made["spatial"][made["spatial_mask"] == 0].any()
    assert not made["spatial_xyz"][made["spatial_mask"] == 0].any()
    assert spec.inputs == ("image", "depth", "intrinsics", "pose")
    assert json.loads(canonical(spec.identity)) == spec.identity


def test_a_patch_token_is_clips_state_before_its_last_layer_plus_the_encoded_position(
    folder: Path, views: list[dict[str, Any]]
) -> None:
    backbone = make_backbone("spatial", weights=str(folder), tokens="patch", fit="square")
    made = backbone.encode(batch(backbone, views[:1]))
    clip = transformers.CLIPVisionModel.from_pretrained(folder / "clip")
    picture = backbone.preprocess(views[0])[: 3 * 56 * 56].reshape(1, 3, 56, 56)
    mean, std = ((torch.tensor(values).view(3, 1, 1)) for values in STATISTICS)
    with torch.no_grad():
        states = clip(pixel_values=(picture - mean) / std, output_hidden_states=True).hidden_states[-2][0, 1:]
    parts = {name: values.float() for name, values in load_file(folder / "llava-3d" / "model.safetensors").items()}
    hidden = made["spatial_xyz"][0, 0] @ parts[f"{POSITION}0.weight"].T + parts[f"{POSITION}0.bias"]
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * parts[f"{POSITION}1.weight"] + parts[f"{POSITION}1.bias"]).clamp(min=0)
    wanted = states + hidden @ parts[f"{POSITION}3.weight"].T + parts[f"{POSITION}3.bias"]
    known = made["spatial_mask"][0, 0] > 0
    assert known.tolist() == [False] * 2 + [True] * 14, "the first two patches have no depth"
    torch.testing.assert_close(made["spatial"][0, 0][known], wanted[known], rtol=1e-4, atol=1e-4)


STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("options", [{}, {"across_views": False}, {"count": 3}], ids=["scene", "views", "subset"])
def test_a_feature_does_not_depend_on_its_batch_mates(
    make: Callable[..., Backbone], views: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    backbone = make(**options)
    images = batch(backbone, views, cameras=2)
    together = backbone.encode(images)
    for index in range(len(images)):
        alone = backbone.encode(images[index : index + 1])
        for feature, values in together.items():
            torch.testing.assert_close(alone[feature][0], values[index], rtol=1e-5, atol=1e-5)


def test_the_views_of_a_time_step_are_one_scene_unless_told_otherwise(
    make: Callable[..., Backbone], views: list[dict[str, Any]]
) -> None:
    scene, apart = make(count=16), make(count=16, across_views=False)
    same = [views[0], views[0]]
    made = scene.encode(batch(scene, same, cameras=2))
    assert made["spatial_mask"][0].sum(-1).tolist()[1] == 0, "the second view sees no voxel that the first does not"
    both = apart.encode(batch(apart, same, cameras=2))
    assert torch.equal(both["spatial"][0, 0], both["spatial"][0, 1])
    torch.testing.assert_close(made["spatial"][0, 0], both["spatial"][0, 0])


def test_features_change_with_picture_depth_intrinsics_and_pose(
    make: Callable[..., Backbone], views: list[dict[str, Any]]
) -> None:
    backbone, view = make(), views[0]
    moved = view["pose"].copy()
    moved[2, 3] = 0.5
    changes = {
        "image": view["image"][:, ::-1],
        "depth": view["depth"] * np.float32(1.5),
        "intrinsics": view["intrinsics"] * np.array([[1.2], [1], [1]], np.float32),
        "pose": moved,
    }
    plain = backbone.encode(batch(backbone, [view]))["spatial"]
    for name, value in changes.items():
        made = backbone.encode(batch(backbone, [{**view, name: value}]))["spatial"]
        assert (made - plain).norm() > 1e-3 * plain.norm(), name


def test_a_rebuilt_backbone_is_the_same_bit_for_bit_wherever_it_runs(
    make: Callable[..., Backbone], views: list[dict[str, Any]]
) -> None:
    one, again = make(), make()
    assert one.spec() == again.spec()
    images = batch(one, views[:2])
    plain = one.encode(images)
    state = torch.random.get_rng_state()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        made = again.encode(images.clone().requires_grad_())
    assert torch.equal(torch.random.get_rng_state(), state)
    for feature, values in made.items():
        assert not values.requires_grad
        assert torch.equal(values, plain[feature])
    again.to(torch.device("meta"))
    assert again.spec() == one.spec()


def test_preprocessing_is_safe_in_threads(make: Callable[..., Backbone], views: list[dict[str, Any]]) -> None:
    preprocess = make().preprocess
    serial = [preprocess(view) for view in views]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(made, serial[i % 8]) for i, made in enumerate(pool.map(preprocess, views * 3)))


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": ({"count": None}, {"count": None, "tokens": "patch"}),
    "voxel": ({}, {"voxel": 0.3}),
    "count": ({}, {"count": 11}),
    "across_views": ({}, {"across_views": False}),
    "projector": ({}, {"projector": True}),
    "fit": ({}, {"fit": "square"}),
    "weights": ({}, {"weights": "random"}),
    "seed": ({"weights": "random"}, {"weights": "random", "seed": 1}),
    "clip": ({"weights": None, "clip": "<clip>", "llava": "<llava>"}, {"weights": "random"}),
    "llava": ({"weights": None, "clip": "<clip>", "llava": "<llava>"}, {"weights": "random"}),
}
WITH_MAPANYTHING = {"geometry", "dense", "mapanything", "checkout", "any_commit", "geometry_size"}
"""Options that need a checkout: see tests/parity."""


def test_every_option_is_known_to_change_the_identity() -> None:
    assert load_backbone_class("spatial").settings_type.model_fields.keys() == CHANGES.keys() | WITH_MAPANYTHING


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_identity_and_features(option: str, folder: Path, views: list[dict[str, Any]]) -> None:
    places = {"<clip>": str(folder / "clip"), "<llava>": str(folder / "llava-3d")}
    pair = []
    for options in CHANGES[option]:
        merged = {"weights": str(folder), "count": 12, **options}
        given = {key: places.get(str(value), value) for key, value in merged.items() if value is not None}
        pair.append(make_backbone("spatial", **given))
    one, other = pair
    assert canonical(one.spec().identity) != canonical(other.spec().identity)
    made, changed = (backbone.encode(batch(backbone, views[:2], cameras=2))["spatial"] for backbone in pair)
    assert made.shape != changed.shape or not torch.equal(made, changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "patch", "voxel": 0.1}, "has no voxels, and voxel was given"),
        ({"checkout": "x"}, "checkout was given without geometry"),
        ({"clip": "a/b"}, "either weights, or clip and llava"),
        ({"dense": 64, "checkout": "x"}, "dense=64 exceeds the 37 patches"),
        ({"geometry": "mapanything", "geometry_size": 100}, "geometry_size"),
        ({"no_such_option": 1}, "unknown key 'no_such_option'"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_backbone("spatial", weights="random", **options)


@pytest.mark.parametrize("picture", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_anything_but_an_rgb_uint8_picture_is_refused(
    make: Callable[..., Backbone], views: list[dict[str, Any]], picture: Any
) -> None:
    with pytest.raises(DataError, match=r"expected \[H, W, 3\] uint8"):
        make().preprocess({**views[0], "image": picture, "depth": np.ones((8, 8))})


def test_weights_with_missing_unexpected_or_misshapen_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = load_file(folder / "llava-3d" / "model.safetensors")

    def load(tensors: Mapping[str, torch.Tensor], **options: Any) -> Backbone:
        save_file(dict(tensors), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        return make_backbone("spatial", clip=str(folder / "clip"), llava=str(tmp_path), **options)

    position = {name: values for name, values in whole.items() if name.startswith(POSITION)}
    load(position)  # the projector is not asked for where it does not run
    with pytest.raises(DataError, match=rf"lacks {PROJECTOR}0.bias, {PROJECTOR}0.weight, {PROJECTOR}2.bias and 1 more"):
        load(position, projector=True)
    with pytest.raises(DataError, match=rf"lacks {POSITION}3.bias"):
        load({name: values for name, values in position.items() if not name.endswith("3.bias")})
    with pytest.raises(DataError, match=rf"unexpected {POSITION}4.bias"):
        load({**position, f"{POSITION}4.bias": torch.zeros(2)})
    with pytest.raises(DataError, match=r"0.weight is \(32, 6\), the network's is \(32, 3\)"):
        load({**position, f"{POSITION}0.weight": torch.zeros(32, 6)})
    with pytest.raises(DataError, match="holds a 'None' model; expected clip"):
        make_backbone("spatial", clip=str(tmp_path), llava=str(folder / "llava-3d"))


def test_what_is_missing_is_named_with_what_supplies_it(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"openai/clip-vit-large-patch14-336.*--weights weights"):
        make_backbone("spatial")
    with pytest.raises(MachineError, match=r"facebookresearch/map-anything.*git clone .*options.checkout=DIR"):
        make_backbone("spatial", weights="random", geometry="mapanything")
    with pytest.raises(DataError, match=r"no checkout of facebookresearch/map-anything"):
        make_backbone("spatial", weights="random", geometry="mapanything", checkout=str(tmp_path))


def test_a_package_that_mapanything_needs_is_named_in_one_line(tmp_path: Path) -> None:
    model = tmp_path / "mapanything" / "models" / "mapanything" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("import no_such_package_at_all\n")
    with pytest.raises(MachineError, match=r"needs the module 'no_such_package_at_all'.*pip install") as caught:
        make_backbone("spatial", weights="random", dense=2, checkout=str(tmp_path), any_commit=True)
    assert "\n" not in str(caught.value)


def test_a_store_holds_what_a_rebuilt_backbone_makes_of_the_same_views(folder: Path, tmp_path: Path) -> None:
    deep = "synthetic:episodes=2,length=[3,3],cameras=2,image_size=16,depth=true"
    values = {"source": deep, "backbone": "spatial", "weights": str(folder), "options": {"count": 9}, "batch_size": 4}
    job = prepare(FeaturizeConfig.build(values))
    run(job, tmp_path / "s")
    store = open_store(tmp_path / "s")
    dtypes = {name: info.dtype for name, info in store.manifest.features.items()}
    assert dtypes == {"spatial": "float16", "spatial_mask": "uint8", "spatial_xyz": "float32"}
    backbone = rebuild_backbone(
        store.manifest.provenance["backbone"],
        store.manifest.fingerprint["backbone"],
        {"spatial": {"weights": str(folder)}},
    )
    source = SyntheticSource(episodes=2, length=(3, 3), cameras=2, image_size=16, depth=True)
    for episode in range(2):
        for frame, views in enumerate(source.views(episode, 0, 3, backbone.spec().inputs)):
            made = backbone.encode(batch(backbone, views, cameras=2))
            row = np.array([3 * episode + frame])
            for feature, kept in made.items():
                stored = store.read(feature, row)[0]
                np.testing.assert_allclose(stored, kept[0].numpy(), rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(store.read("spatial_mask", row)[0], made["spatial_mask"][0].numpy())
    assert store.read("spatial_mask", np.arange(6)).sum() > 6


def test_a_source_without_depth_and_a_live_policy_are_refused(folder: Path) -> None:
    values = {"source": "synthetic:episodes=1", "backbone": "spatial", "weights": str(folder)}
    with pytest.raises(UsageError, match="'spatial' needs depth, intrinsics, pose of each frame"):
        prepare(FeaturizeConfig.build(values))
    spec = make_backbone("spatial", weights=str(folder)).spec()
    with pytest.raises(UsageError, match=r"needs depth, intrinsics, pose of each frame, and a live policy has only"):
        live_view(spec, np.zeros((8, 8, 3), np.uint8), "push")
