"""VGGT against the repository's own model, its own sizes, and its own preparation of pictures.

VLA_VGGT_CHECKOUT names a checkout of the repository.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from vla.featurize.backbones.checkout import open_checkout
from vla.featurize.backbones.registry import make_backbone
from vla.featurize.backbones.vggt_network import PUBLISHED, REPOSITORY, Architecture, build

CHECKOUT = os.environ.get("VLA_VGGT_CHECKOUT", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="VLA_VGGT_CHECKOUT does not name a checkout of VGGT")

SMALL = Architecture(width=384, depth=2, heads=6, vision_depth=12)
"""With its "dinov2_vits14_reg", the smallest that the repository builds by itself."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Callable[[str], Any]]:
    """`upstream(module)` imports from the checkout as the repository says, by `sys.path`."""
    sys.path.insert(0, CHECKOUT)
    yield lambda name: __import__(name, fromlist=["x"])
    sys.path.remove(CHECKOUT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vggt"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def theirs(upstream: Callable[[str], Any]) -> Any:
    """Their aggregator, every parameter drawn anew: as it is built, layers add a hundredth of what they could."""
    network = upstream("vggt.models.aggregator").Aggregator(
        embed_dim=SMALL.width, depth=SMALL.depth, num_heads=SMALL.heads, patch_embed="dinov2_vits14_reg"
    )
    generator = torch.Generator().manual_seed(0)
    for name, values in network.state_dict().items():
        scale = 1.0 if values.ndim == 1 and name.endswith(("weight", "gamma")) else 0.0
        values.copy_(scale + 0.05 * torch.randn(values.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def weights(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({f"aggregator.{name}": values for name, values in theirs.state_dict().items()}, file)
    return str(file)


@pytest.mark.parametrize(("frames", "views", "layer"), [(1, 1, -1), (1, 2, 0), (3, 1, 1), (2, 2, -1)])
def test_tokens_equal_their_forward(frames: int, views: int, layer: int, theirs: Any, weights: str) -> None:
    size = [42, 56]
    ours = make_backbone(
        "vggt", weights=weights, checkout=CHECKOUT, size=size, context=frames - 1, views=views, layer=layer
    )
    images = torch.rand(1, frames, views, 3, *size, generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        layers, first = theirs(images.flatten(1, 2))
    wanted = layers[layer][:, -views:, first:]
    made = ours.encode(images if frames > 1 else images[:, 0])["vggt"]
    assert made.dtype == wanted.dtype == torch.float32
    assert made.flatten(2, 3).shape == wanted.shape
    assert torch.nn.functional.cosine_similarity(made.flatten(), wanted.flatten(), 0) >= 0.9999
    assert torch.equal(made.flatten(2, 3), wanted), "the same operations in the same order"
    assert wanted.std() > 0.1


def test_the_published_sizes_are_those_that_they_build_by_themselves(
    upstream: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        ours = build(open_checkout(REPOSITORY, CHECKOUT), PUBLISHED).state_dict()
    # Theirs reads numbers out of one small tensor as it is built.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    heads = dict.fromkeys(("enable_camera", "enable_point", "enable_depth", "enable_track"), False)
    with torch.device("meta"):
        whole = upstream("vggt.models.vggt").VGGT(**heads).state_dict()
    assert {f"aggregator.{name}": values.shape for name, values in ours.items()} == {
        name: values.shape for name, values in whole.items()
    }
    assert sum(values.numel() for values in ours.values()) // 10**6 == 909


def to_tensor(picture: Picture.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy()).div(255)


@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, [392, 518]), (270, 480, [294, 518]), (64, 64, 518)])
def test_pictures_equal_those_of_their_loader_where_it_crops_nothing(
    height: int, width: int, size: Any, upstream: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transforms = ModuleType("torchvision.transforms")
    # All that its loader takes of torchvision, which need not be here.
    transforms.ToTensor = lambda: to_tensor  # type: ignore[attr-defined]
    package = ModuleType("torchvision")
    package.transforms = transforms  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Picture.fromarray(picture).save(tmp_path / "p.png")
    wanted = upstream("vggt.utils.load_fn").load_and_preprocess_images([str(tmp_path / "p.png")])[0]
    ours = make_backbone("vggt", weights="random", checkout=CHECKOUT, size=size).preprocess(picture)
    assert torch.equal(ours, wanted)
