"""Backbone rgb2pc: what every backbone must keep, on cached grids instead of pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.registry import load_backbone_class, make_backbone
from vla.stores.errors import CheckpointError, DataError, UsageError
from vla.stores.fingerprint import canonical, differences

STUDENT: dict[str, Any] = {
    "inputs": {"near": [4, 4, 3], "far": [6, 6, 5]},
    "teacher_dim": 8,
    "dim": 16,
    "heads": 2,
    "gate_hidden": 8,
}
View = dict[str, NDArray[np.float16]]


def small(*, student: dict[str, Any] | None = None, **options: Any) -> Backbone:
    return make_backbone("rgb2pc", **{"weights": "random", "student": {**STUDENT, **(student or {})}, **options})


def views(count: int = 6) -> list[View]:
    rng = np.random.default_rng(0)
    return [
        {name: rng.normal(size=shape).astype(np.float16) for name, shape in STUDENT["inputs"].items()}
        for _ in range(count)
    ]


def batch(backbone: Backbone, of: list[View], cameras: int = 1) -> torch.Tensor:
    flat = torch.stack([backbone.preprocess(view) for view in of])
    return flat.reshape(-1, cameras, *flat.shape[1:])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() <= 1e-5 * wanted.abs().max().item()


@pytest.fixture(scope="module", params=["weighted", "moe"])
def built(request: pytest.FixtureRequest) -> Backbone:
    return small(student={"fusion": request.param}, projected=True, means=True)


def test_features_have_the_shapes_that_the_spec_says_in_float32(built: Backbone) -> None:
    made, spec = built.encode(batch(built, views(), cameras=3)), built.spec()
    assert list(made) == list(spec.features) == ["fused", "projected", "mean_far", "mean_near"]
    assert {name: info.shape for name, info in spec.features.items()} == {
        "fused": (16,),
        "projected": (8,),
        "mean_far": (5,),
        "mean_near": (3,),
    }
    for name, values in made.items():
        assert values.shape == (2, 3, *spec.features[name].shape)
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert torch.isfinite(values).all()
        assert values.std() > 0
        assert spec.features[name].dtype == "float16"
    assert list(small().spec().features) == ["fused"]
    assert spec.inputs == ("far", "near")


def test_a_feature_does_not_depend_on_its_batch_mates_or_other_views(built: Backbone) -> None:
    images = batch(built, views(), cameras=2)
    together = built.encode(images)
    for row in range(3):
        for view in range(2):
            alone = built.encode(images[row : row + 1, view : view + 1])
            for name, values in together.items():
                assert_close(alone[name][0, 0], values[row, view])


def test_a_rebuilt_backbone_has_the_same_identity_and_the_same_features_bit_for_bit(built: Backbone) -> None:
    fusion = built.spec().identity["network"]["fusion"]
    torch.manual_seed(123)
    again = small(student={"fusion": fusion}, projected=True, means=True)
    assert again.spec() == built.spec()
    images = batch(again, views())
    for name, values in built.encode(images).items():
        assert torch.equal(again.encode(images)[name], values)


def test_means_are_those_of_the_whole_grids_unfused(built: Backbone) -> None:
    (view,) = views(1)
    made = built.encode(batch(built, [view]))
    for name, grid in view.items():
        wanted = grid.astype(np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(made[f"mean_{name}"][0, 0].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["near", "far"])
def test_every_input_reaches_the_fused_vector_and_its_places_count(built: Backbone, name: str) -> None:
    (view,) = views(1)
    other = {**view, name: -view[name]}
    flipped = {**view, name: np.ascontiguousarray(view[name][:, ::-1])}
    made = built.encode(batch(built, [view, other, flipped]))["fused"][:, 0]
    assert (made[0] - made[1]).norm() > 1e-3 * made[0].norm()
    assert (made[0] - made[2]).norm() > 1e-3 * made[0].norm()


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ({}, {"student": {"fusion": "moe"}}),
        ({}, {"student": {"grid": [2, 2]}}),
        ({}, {"student": {"layers": 1}}),
        ({}, {"student": {"heads": 4}}),
        ({}, {"student": {"dim": 32}}),
        ({}, {"student": {"inputs": {"close": [4, 4, 3], "far": [6, 6, 5]}}}),
        ({"student": {"fusion": "moe"}}, {"student": {"fusion": "moe", "top_k": 1}}),
        ({}, {"seed": 1}),
        ({}, {"projected": True}),
        ({}, {"means": True}),
    ],
)
def test_each_option_that_changes_features_changes_spec_and_features(
    base: dict[str, Any], changed: dict[str, Any]
) -> None:
    one, other = small(**base), small(**changed)
    before, after = one.spec(), other.spec()
    assert canonical(before.identity) != canonical(after.identity) or before.features.keys() != after.features.keys()
    renamed = [{"close": view["near"], **view} for view in views(2)]
    mine, theirs = one.encode(batch(one, renamed)), other.encode(batch(other, renamed))
    same = mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name]) for name in mine
    )
    assert not same or before.inputs != after.inputs


def test_what_matters_in_training_alone_is_not_in_the_identity() -> None:
    assert small(student={"tokens": 3, "dropout": 0.5}).spec() == small().spec()


def test_every_option_is_known_here() -> None:
    options = load_backbone_class("rgb2pc").settings_type.model_fields.keys()
    assert options == {"weights", "student", "seed", "projected", "means"}


def test_the_identity_is_canonical_json_and_stays_on_another_device(built: Backbone) -> None:
    spec = built.spec()
    identity = json.loads(canonical(spec.identity))
    assert differences(identity, spec.identity) == []
    assert {"layer", "preprocess", "weights_sha256"} <= identity.keys()
    assert "name" not in identity
    moved = small()
    before = moved.spec()
    moved.to(torch.device("meta"))
    assert moved.spec() == before


def test_autocast_gradient_mode_and_random_state_of_the_caller_do_not_matter(built: Backbone) -> None:
    images = batch(built, views(2))
    plain, state = built.encode(images), torch.random.get_rng_state()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        made = built.encode(images.clone().requires_grad_())
    small()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, values in made.items():
        assert not values.requires_grad
        assert torch.equal(values, plain[name])


def test_a_grid_of_another_shape_is_refused(built: Backbone) -> None:
    (view,) = views(1)
    with pytest.raises(DataError, match=r"'far' is \[6, 5, 5\] a view; expected \[6, 6, 5\]"):
        built.preprocess({**view, "far": view["far"][:, :5]})


def test_random_weights_are_marked_and_never_the_default() -> None:
    assert small().spec().random_weights
    with pytest.raises(UsageError, match="no weights of its own"):
        make_backbone("rgb2pc")
    with pytest.raises(CheckpointError):
        make_backbone("rgb2pc", weights="/nowhere")
    with pytest.raises(UsageError, match="is for random weights"):
        make_backbone("rgb2pc", weights="/nowhere", student=STUDENT)
    with pytest.raises(UsageError, match=r"options\.student is not given"):
        make_backbone("rgb2pc", weights="random")
