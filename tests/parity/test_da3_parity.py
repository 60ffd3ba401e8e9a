"""Depth Anything 3 against the package's own network, its own configurations, and its own processor's pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_model

pytest.importorskip("depth_anything_3", reason="depth-anything-3 is not installed (pip install --no-deps)")
with warnings.catch_warnings():  # it calls deprecated functions of torch and omegaconf as it is imported
    warnings.simplefilter("ignore")
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.model.dinov2 import vision_transformer
    from depth_anything_3.registry import MODEL_REGISTRY

from vla.featurize.backbones.da3 import DepthAnything3
from vla.featurize.backbones.da3_network import ARCHITECTURES, build_network, quiet
from vla.featurize.backbones.da3_resize import resize_upper_bound

ALL = ["ray_full", "ray_conf", "depth"]
PROCESSED = Path(__file__).parent / "da3_processor.npz"


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A picture with edges, gradients and fine texture, the same on every machine: whole numbers only."""
    y, x = np.mgrid[0:height, 0:width]
    layers = [(x * 7 + y * 3) % 256, (x * y) % 251, np.where((x // 9 + y // 7) % 2, 240, 15)]
    return np.stack(layers, axis=-1).astype(np.uint8)


def scenes(views: int, height: int = 56, width: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(2, views, 3, height, width, generator=generator)


def build(**options: Any) -> DepthAnything3:
    tiny = {"weights": "random", "model": "tiny", "size": 56, "picture": [56, 70], "features": ALL}
    return DepthAnything3(DepthAnything3.settings_type.build({**tiny, **options}))


@pytest.mark.parametrize("strategy", ["first", "middle", "saddle_balanced", "saddle_sim_range"])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_rays_confidence_and_depth_equal_the_networks_own_forward_bit_for_bit(views: int, strategy: str) -> None:
    ours, images = build(views=views, ref_view_strategy=strategy), scenes(views)
    with quiet(), torch.no_grad():
        theirs = build_network("da3-tiny")(images, ref_view_strategy=strategy)
    made = ours.encode(images)
    assert torch.equal(made["ray_full"], theirs["ray"])
    assert torch.equal(made["ray_conf"][..., 0], theirs["ray_conf"])
    assert torch.equal(made["depth"][..., 0], theirs["depth"])
    assert {values.dtype for values in made.values()} == {torch.float32}


@pytest.mark.parametrize("views", [1, 4])
def test_tokens_of_the_heads_layers_are_the_backbones_own(views: int) -> None:
    ours = build(views=views, features=["tokens_2", "tokens_5"])
    with quiet(), torch.no_grad():
        theirs, _ = build_network("da3-tiny").backbone(scenes(views), cam_token=None, ref_view_strategy="first")
    made = ours.encode(scenes(views))
    assert torch.equal(made["tokens_2"].flatten(2, 3), theirs[0][0])
    assert torch.equal(made["tokens_5"].flatten(2, 3), theirs[3][0])


def upstream_config(name: str) -> Any:
    return load_config(MODEL_REGISTRY[name])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "da3-tiny"])
def test_architectures_equal_the_packages_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = ARCHITECTURES[name], upstream_config(name)
    monkeypatch.setattr(vision_transformer, "DinoVisionTransformer", dict)  # the arguments only
    makers = {"vits": "vit_small", "vitb": "vit_base", "vitl": "vit_large", "vitg": "vit_giant2"}
    built = getattr(vision_transformer, makers[theirs.net.name])()
    assert (built["embed_dim"], built["depth"], built["num_heads"]) == (ours.width, ours.depth, ours.heads)
    assert theirs.net.name == ours.vit
    assert tuple(theirs.net.out_layers) == ours.layers
    assert {theirs.net.alt_start, theirs.net.qknorm_start, theirs.net.rope_start} == {ours.alt_start}
    assert theirs.net.cat_token is True
    assert theirs.head.dim_in == 2 * ours.width
    assert theirs.head.output_dim == 2
    assert (theirs.head.features, tuple(theirs.head.out_channels)) == (ours.features, ours.channels)


def test_da3_small_as_the_package_builds_and_saves_it_loads_to_the_same_rays(tmp_path: Path) -> None:
    """The real size and layout, camera branches among the weights; the numbers in it are random."""
    config = upstream_config("da3-small")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = create_object(config).eval()
    save_model(torch.nn.ModuleDict({"model": theirs}), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "da3-small"}))
    ours = build(model="DA3-SMALL", weights=str(tmp_path), features=["ray_full", "tokens_11"])
    images = scenes(1)[:1]
    theirs.cam_dec = None  # with a camera decoder the forward pass deletes the rays
    with quiet(), torch.no_grad():
        wanted = theirs(images)["ray"]
    made = ours.encode(images)
    assert torch.equal(made["ray_full"], wanted)
    assert made["tokens_11"].shape == (1, 1, 4, 5, 768)
    assert ours.spec().parameters == sum(
        p.numel() for name, p in theirs.named_parameters() if name.startswith(("backbone", "head"))
    )


@pytest.mark.parametrize(("height", "width", "size"), [(60, 80, 56), (97, 53, 84), (30, 40, 84), (50, 100, 56)])
def test_pictures_equal_those_of_the_packages_processor_within_one_grey_level(
    height: int, width: int, size: int
) -> None:
    """`da3_processor.npz` holds what `InputProcessor` of depth-anything-3 0.1.1 made of `picture`, with OpenCV 5.0.0,
    times std plus mean, times 255. OpenCV rounds the cubic's weights to 1/2048, so one level may differ."""
    with np.load(PROCESSED) as wanted:
        theirs = wanted[f"{height}x{width}_{size}"].astype(int)
    ours = resize_upper_bound(picture(height, width), size).astype(int)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.01
    made = build(size=size, picture=None, features=["ray"], target_hw=[8, 8]).preprocess(picture(height, width))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of its NORMALIZE
    normalised = ((torch.tensor(ours) / 255 - mean) / std).permute(2, 0, 1)
    assert torch.allclose(made, normalised, atol=1e-6)
