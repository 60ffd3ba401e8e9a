"""OpenTrackVLA's token recipe, written anew from its description, at its real sizes: 384 px, 24x24, 64 + 4 tokens.

Pictures go through transformers' own Pillow processors and models; pooling is plain numpy loops over cells. DINOv3 has
no Pillow processor, and OpenTrackVLA resizes before it: at the final size only its rescaling and ImageNet statistics
are left, which BitImageProcessorPil does too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image as Picture

from vla.featurize.backbones.dino_siglip import DinoSiglip, DinoSiglipSettings
from vla.featurize.job import FeaturizeConfig, prepare, run
from vla.stores.store import open_store

NARROW = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 48}
DINO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov3-vits16": ("DINOv3ViTModel", "DINOv3ViTConfig", {"intermediate_size": 96, "num_register_tokens": 4}),
    "dinov3-vits16plus": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"intermediate_size": 96, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"patch_size": 14, "image_size": 518, "mlp_ratio": 2}),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"patch_size": 14, "image_size": 518, "mlp_ratio": 2, "num_register_tokens": 4},
    ),
}
"""Name -> model, configuration, and what sets it apart."""
SIGLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = [
    ("dinov3-vits16", 14, 384, 24, 27, 5),
    ("dinov3-vits16plus", 16, 384, 24, 24, 5),
    ("dinov2", 14, 378, 27, 27, 1),
    ("dinov2-registers", 14, 392, 28, 28, 5),
]
"""Networks, SigLIP's patch, picture size, patches a side of each, tokens before the patches of DINO."""


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    """A wide, a tall, a small and an exact picture of smooth colour with noise."""
    random = np.random.default_rng(0)
    made = []
    for height, width in ((240, 320), (480, 270), (60, 80), (384, 384)):
        waves = np.sin(np.arange(height)[:, None, None] / (9, 17, 31) + np.arange(width)[:, None] / (23, 11, 19))
        made.append((127 + 90 * waves + random.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8))
    return made


def save_models(name: str, siglip_patch: int, root: Path) -> tuple[Any, Any]:
    model_class, config_class, options = DINO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        dino = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**NARROW, **options}))
        vision = {**SIGLIP, "patch_size": siglip_patch, "image_size": 384}
        text = {**SIGLIP, "vocab_size": 50}
        siglip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    transformers.utils.logging.disable_progress_bar()
    dino.eval().save_pretrained(root / "dino")
    siglip.eval().save_pretrained(root / "siglip")
    transformers.utils.logging.enable_progress_bar()
    return dino, siglip.vision_model


def pool(cells: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Average [n, n, C] to [side, side, C]: cell i covers rows floor(i n / side) to ceil((i + 1) n / side)."""
    n = len(cells)
    edges = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    return np.stack([[cells[a:b, c:d].mean((0, 1)) for c, d in edges] for a, b in edges])


def recipe(
    picture: NDArray[np.uint8], dino: Any, siglip: Any, size: int, prefix: int
) -> dict[str, NDArray[np.float16]]:
    """Return {"fine": [64, C], "coarse": [4, C]} as OpenTrackVLA caches a frame."""
    square = Picture.fromarray(picture).resize((size, size), Picture.BICUBIC)  # type: ignore[attr-defined]
    shape = {"height": size, "width": size}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    first = transformers.BitImageProcessorPil(size=shape, do_center_crop=False, **imagenet)
    second = transformers.SiglipImageProcessorPil(size=shape)
    with torch.no_grad():
        dino_tokens = dino(**first(square, return_tensors="pt")).last_hidden_state[0, prefix:]
        pixels = second(square, return_tensors="pt")
        siglip_tokens = siglip(**pixels, interpolate_pos_encoding=size != 384).last_hidden_state[0]
    side, siglip_side = int(len(dino_tokens) ** 0.5), int(len(siglip_tokens) ** 0.5)
    dino_map = dino_tokens.double().numpy().reshape(side, side, -1)
    siglip_map = siglip_tokens.double().numpy().reshape(siglip_side, siglip_side, -1)
    joined = np.concatenate([dino_map, pool(siglip_map, side)], axis=-1)
    return {
        name: pool(joined, cells).reshape(cells**2, -1).astype(np.float16)
        for name, cells in (("fine", 8), ("coarse", 2))
    }


def assert_same_tokens(ours: NDArray[Any], theirs: NDArray[np.float16]) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() >= 0.9999, "of every token"
    assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max()


@pytest.mark.parametrize(("name", "siglip_patch", "size", "side", "siglip_side", "prefix"), CASES)
def test_tokens_equal_opentrackvlas_recipe_for_every_family_of_networks(
    name: str,
    siglip_patch: int,
    size: int,
    side: int,
    siglip_side: int,
    prefix: int,
    pictures: list[NDArray[np.uint8]],
    tmp_path: Path,
) -> None:
    dino, siglip = save_models(name, siglip_patch, tmp_path)
    backbone = DinoSiglip(DinoSiglipSettings(weights=str(tmp_path), size=size))
    assert [(tower.side, tower.prefix) for tower in backbone.towers] == [(side, prefix), (siglip_side, 0)]
    assert backbone.spec().identity["pool"]["grid"] == side, "DINO's own grid, as upstream"
    for picture in pictures[:2]:
        made = backbone.encode(backbone.preprocess(picture)[None, None])
        theirs = recipe(picture, dino, siglip, size, prefix)
        for feature, spec in backbone.spec().features.items():
            assert_same_tokens(made[feature][0, 0].numpy().astype(spec.dtype), theirs[feature])


def test_a_store_holds_the_recipes_tokens_in_float16(tmp_path: Path) -> None:
    dino, siglip = save_models("dinov3-vits16", 14, tmp_path / "weights")
    job = prepare(
        FeaturizeConfig(
            source="synthetic:episodes=1,length=[3,3]", backbone="dino-siglip", weights=f"{tmp_path}/weights"
        )
    )
    run(job, tmp_path / "store")
    store = open_store(tmp_path / "store")
    frames = list(job.source.frames(0, 0, 3))
    for feature in ("fine", "coarse"):
        cached = store.read(feature, np.arange(3))
        for row, views in enumerate(frames):
            for view, picture in enumerate(views):
                assert_same_tokens(cached[row, view], recipe(picture, dino, siglip, 384, 5)[feature])


@pytest.mark.parametrize("size", [384, 224])
def test_preprocessing_equals_transformers_own_processors(size: int, pictures: list[NDArray[np.uint8]]) -> None:
    backbone = DinoSiglip(DinoSiglipSettings(weights="random", size=size))
    square = {"height": size, "width": size}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processors = (
        transformers.BitImageProcessorPil(size=square, do_center_crop=False, **imagenet),
        transformers.SiglipImageProcessorPil(size=square),
    )
    for picture in pictures:
        ours = backbone.preprocess(picture)
        for processor, tower in zip(processors, backbone.towers, strict=True):
            theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
            assert theirs.dtype == ours.dtype
            assert ((ours - tower.mean)[0] / tower.std[0] - theirs).abs().max() <= 1e-6
