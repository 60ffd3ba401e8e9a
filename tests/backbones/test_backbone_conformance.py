"""What every line of the registry must keep: one suite, run over all of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class, make_backbone
from vla.stores.errors import DataError, UsageError
from vla.stores.fingerprint import canonical, differences

PICTURES = [name for name in BACKBONES if name not in ("text", "spatial")]
"""Those that see pictures alone; the others have suites of their own."""

Pictures = list[NDArray[np.uint8]]
Models = dict[str, tuple[Path, Any]]

SMALL: dict[str, dict[str, Any]] = {
    "efficientnet": {"size": 64},
    "dino-siglip": {"weights": "random", "size": 112, "grid": 7, "fine": 4},
}
"""Options that make a backbone quick; any that is not named runs with its defaults."""

RANDOM = {"weights": "random"}
FOLDERS = {"dino": "<dinov3_vit>", "siglip": "<siglip>"}
CHANGES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "efficientnet": {
        "block": ({}, {"block": [4, 10]}),
        "size": ({}, {"size": 96}),
        "resample": ({}, {"resample": "bilinear"}),
        "pool": ({}, {"pool": 2}),
        "weights": ({}, RANDOM),
        "seed": (RANDOM, {**RANDOM, "seed": 1}),
    },
    "dino-siglip": {
        "weights": ({}, {"weights": None, **FOLDERS}),
        "dino": ({"weights": None, **FOLDERS}, {"weights": None, **FOLDERS, "dino": "<dinov2>"}),
        "siglip": ({"weights": None, **FOLDERS}, {"weights": None, **FOLDERS, "siglip": "<siglip_vision_model>"}),
        "size": ({}, {"size": 224}),
        "grid": ({}, {"grid": 6}),
        "fine": ({}, {"fine": 3}),
        "coarse": ({}, {"coarse": 3}),
        "seed": ({}, {"seed": 1}),
    },
    "pixels": {"size": ({}, {"size": 16})},
    "toy": {"grid": ({}, {"grid": 5}), "channels": ({}, {"channels": 9}), "seed": ({}, {"seed": 1})},
}
"""Backbone -> option -> (options, options of which that one differs): pairs that must differ in identity."""
NEUTRAL = {"toy": {"delay_ms": 0.5}}


def small(name: str, **options: Any) -> Backbone:
    return make_backbone(name, **{**SMALL.get(name, {}), **options})


@pytest.fixture(scope="module")
def built() -> dict[str, Backbone]:
    return {name: small(name) for name in PICTURES}


def batch(backbone: Backbone, pictures: Pictures, views: int = 1) -> torch.Tensor:
    """Return [B, V, 3, h, w] with B * V = all pictures."""
    flat = torch.stack([backbone.preprocess(picture) for picture in pictures])
    return flat.reshape(-1, views, *flat.shape[1:])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to float32 rounding: 1e-5 of the largest value, and a cosine of 1 within 1e-6."""
    scale = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= 1e-5 * scale
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0).item() > 1 - 1e-6


@pytest.mark.parametrize("name", PICTURES)
def test_features_have_the_shapes_that_the_spec_says_in_float32(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    backbone = built[name]
    spec = backbone.spec()
    assert spec.name == name
    images = batch(backbone, pictures[:6], views=3)
    assert images.dtype == torch.float32
    made = backbone.encode(images)
    assert list(made) == list(spec.features)
    for feature, values in made.items():
        info = spec.features[feature]
        assert values.shape == (2, 3, *info.shape)
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert torch.isfinite(values).all()
        assert values.std() > 0, "a constant says nothing"
        assert values.abs().max() < np.finfo(info.dtype).max, "the store's dtype must hold it"
        assert len(info.dims) == len(info.shape)
        assert info.dims[-1] == "channel"


@pytest.mark.parametrize("name", PICTURES)
def test_a_feature_does_not_depend_on_its_batch_mates(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    backbone = built[name]
    images = batch(backbone, pictures)
    together = backbone.encode(images)
    for index in range(len(images)):
        alone = backbone.encode(images[index : index + 1])
        for feature, values in together.items():
            assert_close(alone[feature][0], values[index])


@pytest.mark.parametrize("name", PICTURES)
def test_views_are_encoded_independently_and_keep_their_order(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    backbone = built[name]
    images = batch(backbone, pictures, views=2)
    both = backbone.encode(images)
    for view in range(2):
        alone = backbone.encode(images[:, view : view + 1])
        for feature, values in both.items():
            assert_close(alone[feature][:, 0], values[:, view])


@pytest.mark.parametrize("name", PICTURES)
def test_features_change_with_the_picture_and_tell_left_from_right(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    backbone = built[name]
    picture, mirrored = pictures[1], np.ascontiguousarray(pictures[1][:, ::-1])
    made = backbone.encode(batch(backbone, [picture, mirrored]))
    for values in made.values():
        assert (values[0] - values[1]).norm() > 1e-3 * values[0].norm()


@pytest.mark.parametrize("name", PICTURES)
def test_a_rebuilt_backbone_has_the_same_identity_and_the_same_features_bit_for_bit(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    again = small(name)
    assert again.spec() == built[name].spec()
    images = batch(again, pictures[:3])
    for feature, values in built[name].encode(images).items():
        assert torch.equal(again.encode(images)[feature], values)


@pytest.mark.parametrize("name", PICTURES)
def test_the_identity_is_canonical_json_and_names_network_layer_and_preprocessing(
    name: str, built: dict[str, Backbone]
) -> None:
    spec = built[name].spec()
    identity = json.loads(canonical(spec.identity))
    assert differences(identity, spec.identity) == []
    assert {"layer", "preprocess"} <= identity.keys()
    assert "name" not in identity, "the fingerprint puts the backbone's name there"
    assert spec.code_licence
    assert spec.weights_licence
    assert spec.context == 0


@pytest.mark.parametrize("name", PICTURES)
def test_moving_to_another_device_does_not_change_the_identity(name: str) -> None:
    backbone = small(name)
    before = backbone.spec()
    backbone.to(torch.device("meta"))
    assert backbone.spec() == before


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, table in CHANGES.items() for option in table])
def test_each_option_that_changes_features_changes_the_identity(
    name: str, option: str, models: Models, pictures: Pictures
) -> None:
    known = {f"<{kind}>": str(folder) for kind, (folder, _) in models.items()}
    base, changed = (
        _without_nones(name, {key: known.get(str(value), value) for key, value in options.items()})
        for options in CHANGES[name][option]
    )
    assert canonical(base.spec().identity) != canonical(changed.spec().identity)
    before, after = (backbone.encode(batch(backbone, pictures[:1])) for backbone in (base, changed))
    assert before.keys() != after.keys() or any(
        before[feature].shape != after[feature].shape or not torch.equal(before[feature], after[feature])
        for feature in before
    ), "an option that changes nothing does not belong in the identity"


def _without_nones(name: str, options: dict[str, Any]) -> Backbone:
    merged = {**SMALL.get(name, {}), **options}
    return make_backbone(name, **{key: value for key, value in merged.items() if value is not None})


@pytest.mark.parametrize("name", PICTURES)
def test_every_option_is_known_to_change_the_identity_or_to_be_neutral(name: str) -> None:
    options = load_backbone_class(name).settings_type.model_fields.keys()
    assert options == CHANGES.get(name, {}).keys() | NEUTRAL.get(name, {}).keys()


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_change_neither_identity_nor_features(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    changed = small(name, **NEUTRAL[name])
    assert changed.spec() == built[name].spec()
    images = batch(changed, pictures[:2])
    for feature, values in built[name].encode(images).items():
        assert torch.equal(changed.encode(images)[feature], values)


@pytest.mark.parametrize("name", PICTURES)
def test_autocast_and_gradient_mode_of_the_caller_do_not_reach_the_network(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    backbone = built[name]
    images = batch(backbone, pictures[:2])
    plain = backbone.encode(images)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        made = backbone.encode(images.clone().requires_grad_())
    for feature, values in made.items():
        assert not values.requires_grad
        assert torch.equal(values, plain[feature])


@pytest.mark.parametrize("name", PICTURES)
def test_building_and_encoding_leave_the_random_state_alone(name: str, pictures: Pictures) -> None:
    before = torch.random.get_rng_state()
    backbone = small(name)
    backbone.encode(batch(backbone, pictures[:1]))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", PICTURES)
def test_preprocessing_is_safe_in_threads_and_takes_views_of_any_memory_layout(
    name: str, built: dict[str, Backbone], pictures: Pictures
) -> None:
    preprocess = built[name].preprocess
    serial = [preprocess(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(preprocess, pictures * 4))
    assert all(torch.equal(image, serial[index % 8]) for index, image in enumerate(threaded))
    flipped = pictures[0][:, ::-1]
    assert torch.equal(preprocess(flipped), preprocess(np.ascontiguousarray(flipped)))
    assert serial[0].is_contiguous()


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    "picture",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)],
    ids=["float", "grey", "rgba"],
)
def test_anything_but_an_rgb_uint8_picture_is_refused(name: str, picture: Any, built: dict[str, Backbone]) -> None:
    with pytest.raises(DataError, match=r"expected \[H, W, 3\] uint8"):
        built[name].preprocess(picture)


@pytest.mark.parametrize("name", PICTURES)
def test_an_unknown_option_is_refused_with_the_backbone_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"backbone '{name}': unknown key 'no_such_option'"):
        make_backbone(name, no_such_option=1)


def test_a_misspelt_name_or_option_gets_its_nearest_match() -> None:
    with pytest.raises(UsageError, match="no backbone 'efficentnet', did you mean 'efficientnet'"):
        make_backbone("efficentnet")
    with pytest.raises(UsageError, match="unknown key 'blok', did you mean 'block'"):
        make_backbone("efficientnet", blok=4)


@pytest.mark.parametrize("name", ["pixels", "toy"])
def test_weights_for_a_backbone_without_weights_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="has no weights"):
        make_backbone(name, weights="random")


@pytest.mark.parametrize("name", ["efficientnet", "dino-siglip"])
def test_random_weights_are_marked_and_never_the_default(name: str) -> None:
    assert small(name, weights="random").spec().random_weights
    assert load_backbone_class(name).settings_type.model_fields["weights"].default is None
