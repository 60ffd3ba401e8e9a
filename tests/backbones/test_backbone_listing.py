"""What `vla backbones` says, compared with the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from vla.cli import app
from vla.featurize.backbones import registry
from vla.featurize.backbones.registry import BACKBONES, load_backbone_class, make_backbone, missing

CHECKOUTS = {"croco": "VLA_CROCO_CHECKOUT", "vggt": "VLA_VGGT_CHECKOUT"}
RANDOM = {"weights": "random"}
STUDENT = {"inputs": {"grid": [2, 2, 4]}, "teacher_dim": 8}
SIZED_BY_THE_USER: dict[str, dict[str, Any]] = {"rgb2pc": {"student": STUDENT}}
"""A student has no published size; its width is that of the user's teacher."""
BUILT: dict[str, dict[str, str]] = {
    "efficientnet": {},
    "pixels": {},
    "toy": {},
    "da3": RANDOM,
    "dino-siglip": RANDOM,
    "siglip-prefix": RANDOM,
    "spatial": RANDOM,
    "text": RANDOM,
    "rgb2pc": {
        "weights": "random",
        "student": {"inputs": {"grid": [2, 2, 4]}, "teacher_dim": 4, "dim": 1280, "layers": 1},
    },
}


@pytest.mark.parametrize("name", [name for name, entry in BACKBONES.items() if not entry.checkout])
def test_the_features_listed_are_those_that_are_made(name: str) -> None:
    listed = dict(re.findall(r"(\w+) \[([^\]]*)\]", BACKBONES[name].features))
    made = make_backbone(name, **BUILT[name]).spec().features
    assert listed.keys() == made.keys()
    for feature, shape in listed.items():
        # The channels of tiny random networks are their own.
        places = [int(size) for size in shape.split(",")]
        kept = places[: len(places) - bool(BUILT[name]) * (len(places) > 1)]
        assert tuple(kept) == made[feature].shape[: len(kept)]


def has_weights(name: str) -> bool:
    return "weights" in load_backbone_class(name).settings_type.model_fields


@pytest.mark.parametrize("name", [name for name in BACKBONES if has_weights(name)])
def test_random_weights_are_a_tiny_network(name: str) -> None:
    """A trial run takes seconds on a CPU. EfficientNet-Lite0, the largest, has 4.6 M as published."""
    options = {"weights": "random", **SIZED_BY_THE_USER.get(name, {})}
    if name in CHECKOUTS:
        options["checkout"] = os.environ.get(CHECKOUTS[name], "")
        if not options["checkout"]:
            pytest.skip(f"{CHECKOUTS[name]} does not name a checkout")
    assert make_backbone(name, **options).spec().parameters < 5e6


def test_a_model_that_is_named_has_its_published_size_with_random_weights() -> None:
    spec = make_backbone("da3", weights="random", model="DA3-SMALL").spec()
    assert spec.identity["network"] == "da3-small"
    assert spec.parameters > 2e7


def test_every_backbone_is_listed_with_its_licences_and_what_is_missing() -> None:
    listed = json.loads(CliRunner().invoke(app, ["backbones", "--json"]).stdout)
    assert listed.keys() == BACKBONES.keys()
    for entry in listed.values():
        assert all(entry[key] for key in ("summary", "features", "parameters", "code_licence", "weights_licence"))
    assert "hf download google/siglip-so400m-patch14-384" in listed["dino-siglip"]["missing"]
    assert CliRunner().invoke(app, ["backbones"]).exit_code == 0


def test_a_package_that_is_not_there_is_missing_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("efficientnet") == []
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name: None if name.startswith("efficientnet") else plain(name)
    )
    assert missing("efficientnet")[0] == "pip install efficientnet-lite-pytorch"
    assert len(missing("efficientnet")) == 2


def test_a_checkout_is_named() -> None:
    entry = BACKBONES["toy"]._replace(checkout="https://example.org/net")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "cloned", entry)
        assert missing("cloned") == ["git clone https://example.org/net DIR, then --set options.checkout=DIR"]
