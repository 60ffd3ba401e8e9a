"""`spatial` against the code it follows, in checkouts that environment variables name.

VLA_LLAVA_3D_CHECKOUT: github.com/ZCMax/LLaVA-3D (its leaf modules import with torch alone; 91d979d was compared).
VLA_MAP_ANYTHING_CHECKOUT: github.com/facebookresearch/map-anything at the commit of `mapanything.REPOSITORY`, with its
packages (uniception, hydra-core, jaxtyping, timm, opencv, torchvision) importable.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from safetensors.torch import load_file, save_file, save_model

from vla.featurize.backbones.base import Backbone
from vla.featurize.backbones.mapanything import REPOSITORY, load_mapanything, tiny_config
from vla.featurize.backbones.registry import make_backbone
from vla.featurize.backbones.spatial_geometry import cut_square, make_square, patch_positions
from vla.featurize.backbones.spatial_tokens import make_position_encoder, pool_voxels
from vla.featurize.views import live_view
from vla.pretrained.weights import digest_tensors
from vla.stores.errors import DataError
from vla.stores.fingerprint import canonical

LLAVA, MAPANYTHING = os.environ.get("VLA_LLAVA_3D_CHECKOUT"), os.environ.get("VLA_MAP_ANYTHING_CHECKOUT")
needs_llava = pytest.mark.skipif(not LLAVA, reason="VLA_LLAVA_3D_CHECKOUT is not set")
needs_mapanything = pytest.mark.skipif(not MAPANYTHING, reason="VLA_MAP_ANYTHING_CHECKOUT is not set")


@pytest.fixture(scope="module")
def llava() -> Iterator[dict[str, ModuleType]]:
    """The modules that need torch alone; the package around them needs an old transformers."""
    folder, modules = Path(LLAVA or "") / "llava" / "model" / "multimodal_encoder", {}
    package = ModuleType("llava_leaves")
    package.__path__ = [str(folder)]
    sys.modules["llava_leaves"] = package
    for name in ("position_encodings", "unproject", "spatial_aware_module"):
        spec = importlib.util.spec_from_file_location(f"llava_leaves.{name}", folder / f"{name}.py")
        assert spec
        assert spec.loader
        modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[f"llava_leaves.{name}"] = modules[name]
        spec.loader.exec_module(modules[name])
    yield modules
    for name in [name for name in sys.modules if name.startswith("llava_leaves")]:
        del sys.modules[name]


def make_scene(size: int, views: int) -> dict[str, NDArray[Any]]:
    """Depth [V, size, size], intrinsics [4, 4] and poses [V, 4, 4] of cameras that turn about the vertical."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (views, 1, 1))
    for view, angle in enumerate(np.linspace(-0.4, 0.4, views)):
        cos, sin = np.cos(angle), np.sin(angle)
        poses[view, :3, :3] = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]
        poses[view, :3, 3] = (0.2 * view, 0.1, -0.3)
    intrinsics = np.eye(4)
    intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2] = 300, 310, 170, 165
    return {"depth": rng.uniform(0.5, 3, (views, size, size)), "intrinsics": intrinsics, "poses": poses}


@needs_llava
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_positions_encoding_and_voxels_equal_llava_3ds(
    llava: dict[str, ModuleType], record_property: Callable[[str, object], None]
) -> None:
    views, size, side, width = 3, 336, 24, 64
    scene = make_scene(size, views)
    depth, poses = (torch.tensor(scene[name], dtype=torch.float32)[None] for name in ("depth", "poses"))
    intrinsics = torch.tensor(scene["intrinsics"], dtype=torch.float32).expand(1, views, 4, 4)
    features = torch.randn(views, width, side, side, generator=torch.Generator().manual_seed(0))
    theirs, _ = llava["unproject"].backprojector_dataloader([features], depth, poses, intrinsics)
    square = make_square(size, size, size, "crop")
    ours = torch.from_numpy(
        np.stack(
            [
                patch_positions(
                    {"depth": scene["depth"][v], "intrinsics": scene["intrinsics"][:3, :3], "pose": scene["poses"][v]},
                    square,
                    side,
                )
                for v in range(views)
            ]
        )
    )
    torch.testing.assert_close(ours[..., :3], theirs.reshape(views, side * side, 3), rtol=1e-5, atol=2e-6)

    tower = llava["spatial_aware_module"].SpatialAwareModule(latent_dim=width)
    encoder = make_position_encoder(width)
    encoder.load_state_dict(tower.positional_embedding.position_embedding_head.state_dict())
    positions = theirs.reshape(views, side * side, 3)  # theirs in both, so that no voxel's edge is crossed
    with torch.no_grad():
        encoded = tower([features], [theirs.flatten(0, 1)], (1, views))[0][0]
        values = features.flatten(2).transpose(1, 2) + encoder(positions)
    torch.testing.assert_close(values.flatten(0, 1), encoded, rtol=1e-5, atol=1e-5)

    voxel = llava["unproject"].voxelize(theirs.clone(), 0.2)[0]
    count = int(voxel.max()) + 1
    # What torch_scatter's scatter_mean does; it has no wheel for this torch.
    pooled = torch.zeros(count, width).index_add(0, voxel, encoded) / torch.bincount(voxel)[:, None]
    made = pool_voxels(values, positions, torch.ones(views, side * side) > 0, size=0.2, count=2000, across_views=True)
    kept = made.values[made.mask > 0]
    assert len(kept) == count
    # The same tokens; theirs stand in the order of the cells, ours by view first.
    nearest = torch.cdist(pooled.double(), kept.double()).min(dim=1)
    assert len(nearest.indices.unique()) == count
    cosine = torch.nn.functional.cosine_similarity(pooled, kept[nearest.indices], dim=1).min().item()
    record_property("voxels", count)
    record_property("cosine", cosine)
    record_property("largest_difference", (pooled - kept[nearest.indices]).abs().max().item())
    torch.testing.assert_close(kept[nearest.indices], pooled, rtol=1e-4, atol=1e-5)
    assert cosine >= 0.9999


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    return [np.asarray(Picture.fromarray(part).resize((72, 60), Picture.Resampling.BICUBIC)) for part in small]


def make(**options: Any) -> Backbone:
    given = {"weights": "random", "checkout": MAPANYTHING, "geometry_size": 56, "count": 20, **options}
    return make_backbone("spatial", **given)


def batch(backbone: Backbone, pictures: list[NDArray[np.uint8]], cameras: int) -> torch.Tensor:
    ready = [backbone.preprocess(live_view(backbone.spec(), picture, "any")) for picture in pictures]
    return torch.stack(ready).reshape(-1, cameras, len(ready[0]))


@needs_mapanything
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
class TestMapAnything:
    """One class: the network takes tens of seconds to build."""

    @pytest.fixture(scope="class")
    def backbone(self) -> Backbone:
        return make(geometry="mapanything", dense=2)

    def test_points_and_features_are_those_of_its_own_infer(
        self, backbone: Any, pictures: list[NDArray[np.uint8]], record_property: Callable[[str, object], None]
    ) -> None:
        loaded, taken = backbone._mapanything, []
        square = make_square(60, 72, 56, "crop")
        ready = [torch.from_numpy(cut_square(p, square, Picture.Resampling.LANCZOS).copy()) for p in pictures[:3]]
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        images = torch.stack([((image / 255 - mean) / std).permute(2, 0, 1) for image in ready])
        network = loaded.network
        hook = network.info_sharing.register_forward_hook(lambda module, given, out: taken.append(out))
        with torch.no_grad():
            views = [{"img": image[None], "data_norm_type": ["dinov2"]} for image in images]
            theirs = network.infer(views, use_amp=False, apply_mask=False, memory_efficient_inference=False)
            ours = loaded.see(images[None])
        hook.remove()
        points = torch.stack([view["pts3d"][0] for view in theirs])
        torch.testing.assert_close(ours.points[0], points, rtol=1e-5, atol=1e-5)
        features = torch.cat(list(taken[0][0].features))
        torch.testing.assert_close(ours.features[0], features, rtol=1e-5, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(ours.features.flatten(), features.flatten(), 0).item()
        record_property("features_cosine", cosine)
        record_property("features_shape", str(tuple(ours.features.shape)))
        record_property("points_largest_difference", (ours.points[0] - points).abs().max().item())
        assert cosine >= 0.9999

    def test_its_picture_is_that_of_its_own_loader(self, pictures: list[NDArray[np.uint8]]) -> None:
        from vla.featurize.backbones.checkout import open_checkout

        with open_checkout(REPOSITORY, MAPANYTHING).importing() as load:
            crop = load("mapanything.utils.cropping").crop_resize_if_necessary
            theirs = np.asarray(crop(Picture.fromarray(pictures[0]), resolution=(56, 56))[0])
        ours = cut_square(pictures[0], make_square(60, 72, 56, "crop"), Picture.Resampling.LANCZOS)
        np.testing.assert_array_equal(ours, theirs)

    def test_pictures_alone_suffice_so_live_features_equal_cached_ones(
        self, backbone: Backbone, pictures: list[NDArray[np.uint8]]
    ) -> None:
        assert backbone.spec().inputs == ("image",)
        state = torch.random.get_rng_state()
        images = batch(backbone, pictures, cameras=2)
        together = backbone.encode(images)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert list(together) == list(backbone.spec().features)
        for index in range(2):
            alone = backbone.encode(images[index : index + 1])
            for name, values in together.items():
                assert values.shape[2:] == backbone.spec().features[name].shape
                torch.testing.assert_close(alone[name][0], values[index], rtol=1e-4, atol=1e-5)

    def test_a_saved_model_loads_and_its_keys_are_accounted_for(self, backbone: Any, tmp_path: Path) -> None:
        network = backbone._mapanything.network
        save_model(network, str(tmp_path / "model.safetensors"))  # as its own save_pretrained does
        (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
        loaded = load_mapanything(str(tmp_path), MAPANYTHING, any_commit=False, seed=5)
        tensors = load_file(tmp_path / "model.safetensors")
        assert len(tensors) < len(network.state_dict()), "its heads are tied"
        assert digest_tensors(loaded.network.state_dict()) == digest_tensors(network.state_dict())
        assert loaded.identity["config_sha256"] == backbone._mapanything.identity["config_sha256"]
        assert "weights" not in loaded.identity
        del tensors["scale_token"]
        save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(DataError, match="lacks scale_token"):
            load_mapanything(str(tmp_path), MAPANYTHING, any_commit=False, seed=5)

    def test_each_option_changes_identity_and_features(
        self, backbone: Backbone, pictures: list[NDArray[np.uint8]]
    ) -> None:
        base = backbone.encode(batch(backbone, pictures[:2], cameras=2))
        for change in ({"geometry_size": 70}, {"seed": 1}, {"dense": 3}):
            other = make(**{"geometry": "mapanything", "dense": 2, **change})
            assert canonical(other.spec().identity) != canonical(backbone.spec().identity)
            made = other.encode(batch(other, pictures[:2], cameras=2))
            assert any(made[name].shape != base[name].shape or not torch.equal(made[name], base[name]) for name in base)
